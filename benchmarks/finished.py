"""Measurements that are finished already, so that a benchmark which was stopped goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Values = dict[str, Any]


class Finished:
    """One line of JSON for each measurement, in a file that lasts until the table is written.

    Args:
        path: the file; what another start with the same settings left in it is read.
        settings: what all measurements depend on. Lines with other settings are left out.
    """

    def __init__(self, path: Path, settings: Values) -> None:
        self.path, self.settings = path, settings
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [row for row in map(_parsed, lines) if row and row["settings"] == settings]

    def find(self, **key: Any) -> Values | None:
        """The measurement with this key, if it is finished."""
        return next((row["values"] for row in self.rows if row["key"] == key), None)

    def measured(self, measure: Callable[[], Values], **key: Any) -> Values:
        """The measurement with this key: the finished one, or a new one that is written down at once."""
        found = self.find(**key)
        if found is None:
            found = measure()
            row = {"settings": self.settings, "key": key, "values": found}
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*(f"{each}" for each in (key | found).values()), sep="  ", flush=True)
        return found

    def close(self) -> None:
        """Remove the file, once the table is written."""
        self.path.unlink(missing_ok=True)


def _parsed(line: str) -> Values | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # The last line of a benchmark that was killed.
        return None
