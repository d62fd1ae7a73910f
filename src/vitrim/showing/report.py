"""One self-contained HTML page from run and study folders: figures, tables, curves, pictures. No torch."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from .. import __version__
from ..errors import DataError, VitrimError
from ..measure.table import Table
from ..output import check_folder, replacing
from ..text import printable, shortened
from .figures import format_cell, format_figure, heading_of
from .plots import MOST_CURVES, cost_accuracy_plot, curves_plot
from .runs import Run, average_seeds, make_table, points, read_folder

_MARK = '<meta name="generator" content="vitrim'
_COST_PLOT = "accuracy-against-cost"
_MOST_LETTERS = 60
"""Of a card."""
_CARDS = {
    "test_accuracy": "test accuracy",
    "accuracy": "accuracy",
    "macs": "MACs per image",
    "params": "parameters",
    "images_per_second": "images per second",
    "train_seconds": "training time",
}


def write_report(folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one HTML page about a run folder, a study folder with runs below it, or several of them.

    The page is one file: plots and pictures are inside, and it needs no script and no network.

    Args:
        folder: what to report on; files that are missing there are left out, and damaged ones are named on the page.
        out: the page; by default `report.html` in the folder. An older report is replaced, another file never.

    Raises:
        DataError: a folder is missing or holds nothing to report.
        VitrimError: `out` exists and is not a report of vitrim, or must be given.
    """
    folders = [Path(folder)] if isinstance(folder, str | Path) else [Path(one) for one in folder]
    if not folders:
        raise DataError("name at least one folder to report on")
    if out is None and len(folders) > 1:
        raise VitrimError("a report on several folders needs a file to go to (--out report.html)")
    path = folders[0] / "report.html" if out is None else Path(out)
    if path.is_dir():
        path = path / "report.html"
    if path.exists() and not _is_report(path):
        raise VitrimError(f"{path} exists and is not a report of vitrim; choose another file with --out")
    check_folder(path.parent)
    # Names and texts may hold anything; the page must be valid UTF-8 without control characters.
    page = printable(render([read_folder(one) for one in folders]), keep="\n\t\u202f")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _is_report(path: Path) -> bool:
    if not path.is_file():  # Reading a pipe or a device might never end.
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return _MARK in file.read(1000)


def render(studies: Sequence[tuple[Run, Sequence[Run]]]) -> str:
    """The page for these studies, each a folder with the runs below it."""
    sections = [_study(top, runs) for top, runs in studies]
    title = " · ".join(section["title"] for section in sections)
    return _template().render(title=title, studies=sections, version=__version__)


@cache
def _template() -> Template:
    return Environment(
        loader=PackageLoader("vitrim.showing"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip


def _study(top: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """A section about a run, or about a study, with an overview of its runs where it has no table of its own."""
    results = [{"run": _name(top, run), "method": _name(top, run), **run.figures} for run in runs]
    if results and not top.tables:
        known = [name for name in _CARDS if any(name in result for result in results)]
        overview = make_table({"title": "runs", "columns": ["run", *known], "rows": results})
        top = replace(top, tables=[overview] if overview else [])
    section = _run(top, str(top.result.get("title") or top.path.resolve().name))
    several = average_seeds({_name(top, run): run.metrics for run in runs if run.metrics})
    if 1 < len(several) <= MOST_CURVES:
        section["plots"] += _plot("training curves", lambda file: curves_plot(several, file))
    elif several and len(several) > MOST_CURVES:
        section["notes"].append(f"The curves of {len(several)} runs are too many for one plot; each run has its own.")
    return section | {"runs": [_run(run, _name(top, run)) for run in runs]}


def _run(run: Run, title: str) -> dict[str, Any]:
    """Everything the template shows about one folder."""
    plots: list[tuple[str, str]] = []
    for table in run.tables:
        about = f"accuracy against cost: {table.title}" if len(run.tables) > 1 else "accuracy against cost"
        if len(table.rows) > 1 and not any(picture.name == _COST_PLOT for picture in run.pictures):
            plots += _plot(about, lambda file, rows=table.rows: cost_accuracy_plot(points(rows), file))
    plots += _plot("training curves", lambda file: curves_plot(run.metrics, file))
    return {
        "title": title,
        "command": run.command,
        "cards": [
            (label, shortened(format_figure(name, run.figures[name]), _MOST_LETTERS))
            for name, label in _CARDS.items() if name in run.figures
        ],
        "tables": [_table(table) for table in run.tables],
        "plots": plots,
        "pictures": [
            (heading_of(picture.name.replace("-", " ")), _embed(picture.png)) for picture in run.pictures if picture.png
        ],
        "left_out": run.more_pictures,
        "figures": [(heading_of(name), format_figure(name, value)) for name, value in run.figures.items()],
        "environment": [(heading_of(name), format_figure(name, value)) for name, value in run.environment.items()],
        "recipe": run.recipe,
        "notes": list(run.notes),
    }  # fmt: skip


def _name(top: Run, run: Run) -> str:
    return printable(run.path.relative_to(top.path).as_posix())


def _table(table: Table) -> dict[str, Any]:
    """A table ready to print: texts, and for every column whether it holds numbers."""
    texts = [[format_cell(column, row) for column in table.columns] for row in table.rows]
    numeric = [bool(column.form) or all(_figure_like(row.get(column.key)) for row in table.rows)
               for column in table.columns]  # fmt: skip
    return {
        "title": table.title,
        "columns": [(column.heading, number) for column, number in zip(table.columns, numeric, strict=True)],
        "rows": [list(zip(row, numeric, strict=True)) for row in texts],
        "notes": list(table.notes),
    }


def _figure_like(value: object) -> bool:
    """Whether a value is one number, or looks like one: `91.2 ± 0.3`, `4.6 G`, `1.60x`."""
    if isinstance(value, str):
        return not value or (value[0] in "+-.0123456789" and value.count(" ") < 4)
    return value is None or isinstance(value, int | float)


def _plot(label: str, draw: Callable[[BytesIO], bool]) -> list[tuple[str, str]]:
    file = BytesIO()
    return [(label, _embed(file.getvalue()))] if draw(file) else []


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode()
