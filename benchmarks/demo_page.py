"""Write the table of a finished demonstration into its page, and copy its picture there.

    vitrim demo
    python benchmarks/demo_page.py runs/demo

The table also goes to results/demo-cpu.json.
"""

import argparse
import json
import shutil
from pathlib import Path

from vitrim.measure.table import Table
from vitrim.showing.runs import make_table
from vitrim.text import with_written

ROOT = Path(__file__).parents[1]
PAGE, RESULT = ROOT / "docs" / "demo.md", ROOT / "results" / "demo-cpu.json"
PICTURE = "tokens-merged.png"


def with_table(page: str, table: Table) -> str:
    """The text of the page with this table between its marks."""
    return with_written(page, "demo", table.markdown(), "python benchmarks/demo_page.py")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a finished vitrim demo")
    folder = parser.parse_args().folder
    table = make_table(json.loads((folder / "result.json").read_text())["tables"][0])
    assert table is not None
    table.write(RESULT, overwrite=True)
    PAGE.write_text(with_table(PAGE.read_text(), table))
    shutil.copy(folder / PICTURE, ROOT / "docs" / "images" / PICTURE)


if __name__ == "__main__":
    main()
