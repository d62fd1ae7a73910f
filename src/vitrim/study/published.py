"""Figures from publications, and the columns that show them next to the measured ones."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import RecipeError
from ..measure.table import Column, Table
from ..options import check_ranges, from_dict


@dataclass(frozen=True)
class Published:
    """Published figures about a row, by the key of the column of measured ones.

    accuracy: a fraction.
    speed: ratio to the first row.
    train_seconds: of training.
    params: parameters.
    gmacs: MACs per image, in units of 1e9.
    images_per_second: of inference, on the machine of the publication.
    """

    accuracy: float | None = None
    speed: float | None = None
    train_seconds: float | None = None
    params: int | None = None
    gmacs: float | None = None
    images_per_second: float | None = None

    @property
    def known(self) -> dict[str, float]:
        """Figures by key, without those that were not published."""
        return {name: figure for name, figure in asdict(self).items() if figure is not None}


def read_published(data: Any, where: str) -> dict[str, Published]:
    """Published figures by the name of the row that they are about, from plain data.

    Raises:
        RecipeError: something else than figures, or one out of its range.
        UnknownNameError: a figure that does not exist.
    """
    found: dict[str, Published] = {}
    for name, figures in mapping(data, where).items():
        what = f"{where} {name!r}"
        found[name] = from_dict(Published, mapping(figures, what, required=True), what)
        for key, figure in found[name].known.items():
            check_ranges((f"{what}: {key}", figure, 0, 1 if key == "accuracy" else None))
    return found


def mapping(data: Any, where: str, required: bool = False) -> dict[Any, Any]:
    """Options by name as a file holds them; where they are left out, empty unless required.

    Raises:
        RecipeError: something else.
    """
    if not isinstance(data, dict) and (required or data is not None):
        raise RecipeError(f"{where} is {data!r}; it must be a mapping of options")
    return data or {}


def add_published_columns(table: Table, published: Sequence[Published | None]) -> Table:
    """The table with published figures, one entry for each row.

    Each kind of figure that any row has gets a column of its own after that of the measured ones.
    """
    known = [{} if figures is None else figures.known for figures in published]
    columns: list[Column] = []
    for column in table.columns:
        columns.append(column)
        if any(column.key in figures for figures in known):
            columns.append(Column(f"published_{column.key}", f"published {column.heading}", column.form))
    printed = ({f"published_{key}": figure for key, figure in figures.items()} for figures in known)
    return replace(
        table, columns=columns, rows=[{**row, **more} for row, more in zip(table.rows, printed, strict=True)]
    )
