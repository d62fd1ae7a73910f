"""What was asked, what was found, and where it holds: a certificate as data, as a table and as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..measure.columns import columns
from ..measure.intervals import Interval
from ..measure.speed import DTYPES
from ..measure.table import Table
from .forms import FORMS
from .remarks import images_note, time_notes

FILE, TRIED = "certificate.json", "tried.json"
SCHEMA = 1
MOST_BATCH = 65_536


@dataclass(frozen=True)
class Line:
    """One statement of a certificate.

    key: what it is about, see `FORMS`. value: what was found. low, high: ends of its 95 % interval; None for what is
    counted. asked: the budget for it; None where nothing was asked. of: what the given model has, where that is another
    number. number: of images or sessions that it rests on.
    """

    key: str
    value: float
    low: float | None = None
    high: float | None = None
    asked: float | None = None
    of: float | None = None
    number: int | None = None

    @property
    def worst(self) -> float:
        """The end of the interval that is the worse one: the upper, as everything asked for is to be small."""
        return self.value if self.high is None else self.high

    @property
    def met(self) -> bool | None:
        """Whether what was asked is met even at the bad end; None where nothing was asked."""
        return None if self.asked is None else self.worst <= self.asked

    @property
    def interval(self) -> Interval:
        """The value with its ends."""
        return Interval(self.value, *(self.value if end is None else end for end in (self.low, self.high)))

    @property
    def cells(self) -> dict[str, float | None]:
        """The value and the ends of its interval as a row of a table has them."""
        return {self.key: self.value, f"{self.key}_low": self.low, f"{self.key}_high": self.high}

    @classmethod
    def of_interval(cls, key: str, found: Interval, **more: Any) -> "Line":
        """A line of what was measured."""
        return cls(key, found.value, found.low, found.high, **more)


@dataclass(frozen=True)
class Certificate:
    """What a cheaper model was asked to be, what it is, and how that was measured.

    asked: the budget in words. lines: all statements. reduction: of tokens, as text. weights, original: hashes of the
    weights of the cheaper and of the given model. settings: batch size, device, dtype and so on of the measured times.
    source: what the given model was opened from, its description, and its images, where these are known. tried: every
    candidate of the search as a row. load: lines of Python that load the model. notes: sentences for the reader.
    """

    asked: str
    lines: Sequence[Line]
    weights: str
    original: str
    reduction: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    tried: Sequence[Mapping[str, Any]] = ()
    load: Sequence[str] = ()
    notes: Sequence[str] = ()
    schema: int = SCHEMA

    def __repr__(self) -> str:
        lines = (
            f"{FORMS[line.key].words} {line.value:{FORMS[line.key].form}}" for line in self.lines if line.key in FORMS
        )
        tokens = "" if self.reduction is None else f"; tokens: {self.reduction}"
        return f"Certificate(asked: {self.asked}; {'met' if self.met else 'not met'}; {', '.join(lines)}{tokens})"

    def __getitem__(self, key: str) -> Line:
        """The line about `key`; `KeyError` if there is none."""
        found = {line.key: line for line in self.lines}
        return found[key]

    def __contains__(self, key: str) -> bool:
        return any(line.key == key for line in self.lines)

    @property
    def met(self) -> bool:
        """Whether everything that was asked is met at the bad end of its interval."""
        return all(line.met is not False for line in self.lines)

    def table(self) -> Table:
        """All statements as a table."""
        notes = [*self.notes, *([f"Tokens: {self.reduction}."] if self.reduction else []), *time_notes(self.lines)]
        measured: Any = self.source.get("measured")
        notes += [images_note(measured)] if isinstance(measured, dict) else []
        notes.append(
            "Brackets are 95 % intervals over n images or sessions; met: even the bad end is within what was asked. "
            "Divergence and agreement with the given model are on images that the search has not seen, times on rounds "
            "that were run after the choice was made."
        )
        if "over_tokens" in self or "over_width" in self:
            notes.append(
                "Over tokens alone, over width alone: this divergence minus that of the best answer of that kind for "
                "the same budget; below 0, this answer is closer."
            )
        notes += [f"To load it: {'; '.join(self.load)}"] if self.load else []
        asked = any(line.asked is not None for line in self.lines)
        missed = ", ".join(FORMS[line.key].words for line in self.lines if line.met is False)
        title = f"Certificate: {self.asked}" + (f", NOT MET: {missed}" if missed else ", met") * asked
        return Table(title, COLUMNS, [row_of(line) for line in self.lines], notes=notes, environment=self.environment)

    def tried_table(self) -> Table:
        """Every candidate of the search as a table, those that have seen most images first."""
        notes = [
            "The answer has the least typical divergence (power mean of exponent 1/3) of those that saw all images. "
            "Divergences on different numbers of images cannot be compared."
        ]
        return Table(f"Candidates: {self.asked}", TRIED_COLUMNS, list(self.tried), notes=notes)

    def to_json(self) -> str:
        """Text that `from_json` reads; it is a table of `vitrim report` as well."""
        table = {key: value for key, value in self.table().to_dict().items() if key != "environment"}
        return json.dumps({**table, **_finite(asdict(self))}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str | Path = "this file") -> "Certificate":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: it is not a certificate, or one of a newer version.
        """
        try:
            raw = json.loads(text)
            if raw["schema"] > SCHEMA:
                raise CheckpointError(
                    f"{source} has schema {raw['schema']}, this vitrim reads up to {SCHEMA}; update it"
                )
            own: dict[str, Any] = {name: raw[name] for name in cls.__dataclass_fields__ if name != "lines"}
            lines = [Line(**{name: _number(value) for name, value in line.items()}) for line in raw["lines"]]
            if unknown := [line.key for line in lines if line.key not in FORMS]:
                raise CheckpointError(f"{source} has a line {unknown[0]!r}, which is not known here; update vitrim")
            for name in ("weights", "original", "asked"):
                if not isinstance(own[name], str):
                    raise TypeError(f"{name} is not text")
            for line in lines:
                numbers = [value for name, value in vars(line).items() if name != "key" and value is not None]
                if not all(type(value) in (int, float) for value in numbers):
                    raise TypeError(f"{line.key} is not a number")
            _check_settings(own["settings"])
            return cls(lines=lines, **own)
        except CheckpointError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{source} is not a vitrim certificate, or a damaged one ({error!r})") from None

    @classmethod
    def read(cls, folder: str | Path) -> "Certificate":
        """The certificate in a folder.

        Raises:
            CheckpointError: there is none, or a damaged one.
        """
        path = Path(folder) / FILE
        if Path(folder).is_file():
            raise CheckpointError(
                f"{folder} is a file that holds no model; give a folder that vitrim compress wrote, or an exported "
                "file (.onnx or .pt2)"
            )
        if not Path(folder).is_dir():
            raise CheckpointError(f"there is no folder {folder}; give one that vitrim compress wrote")
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no {FILE}; give a folder that vitrim compress wrote")
        return cls.from_json(path.read_text(encoding="utf-8", errors="replace"), path)

    def in_folder(self, folder: str | Path) -> "Certificate":
        """The same with the lines that load the model from there."""
        return replace(self, load=["import vitrim", f"model = vitrim.load({str(folder)!r})"])


COLUMNS = columns("statement", "found", "given", "asked", "met", "n")
TRIED_COLUMNS = columns(
    "kind", "reduction", "share", "width_macs", "price", "typical", "divergence", "agreement", "images"
)


def row_of(line: Line) -> dict[str, Any]:
    """A line as a row of the table."""
    form = FORMS[line.key]
    met = {None: None, True: "yes", False: "no"}[line.met]
    found = written(line.value, form.form)
    if line.low is not None and line.high is not None:
        found += f" [{written(line.low, form.form)}, {written(line.high, form.form)}]"
    given = None if line.of is None else written(line.of, form.form)
    asked = None if line.asked is None else f"at most {written(line.asked, form.form)}"
    return {
        "key": line.key, "statement": form.words, "found": found, "given": given, "asked": asked, "met": met,
        "n": line.number,
    }  # fmt: skip


def written(value: float, form: str) -> str:
    """A number in this form; an end that is not known is a question mark."""
    return format(value, form) if math.isfinite(value) else "?"


def _finite(data: Any) -> Any:
    """The same data with infinities as text, which JSON has no numbers for."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for settings under which nothing could be timed."""
    size, dtype = settings.get("batch_size", 1), settings.get("dtype", "float32")
    if type(size) is not int or not 1 <= size <= MOST_BATCH or dtype not in DTYPES:
        raise ValueError("settings of the times")
    if settings.get("device", "cpu") not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError("device of the times")


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
