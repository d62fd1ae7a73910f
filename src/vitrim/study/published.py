"""Figures that stand in print, and the columns that show them beside those found."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import RecipeError
from ..measure.table import Column, Table
from ..options import check_ranges, fill


@dataclass(frozen=True)
class Published:
    """What stands in print about a row; each figure by the key of the column that it belongs beside.

    accuracy: a fraction.
    speed: how much faster than the first row.
    train_seconds: of training.
    params: parameters.
    gmacs: MACs per image, in thousand millions.
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
        """Figures by key, without those that nobody has published."""
        return {name: figure for name, figure in asdict(self).items() if figure is not None}


def read_published(data: Any, where: str) -> dict[str, Published]:
    """Figures by the name of what they are about, from plain data.

    Raises:
        RecipeError: something else than figures, or one out of its range.
        UnknownNameError: a figure that there is not.
    """
    if not isinstance({} if data is None else data, dict):
        raise RecipeError(f"{where} is {data!r}; it must be a mapping of options")
    found: dict[str, Published] = {}
    for name, figures in (data or {}).items():
        what = f"{where} {name!r}"
        if not isinstance(figures, dict):
            raise RecipeError(f"{what} is {figures!r}; it must be a mapping of options")
        found[name] = fill(Published, figures, what)
        for key, figure in found[name].known.items():
            check_ranges((f"{what}: {key}", figure, 0, 1 if key == "accuracy" else None))
    return found


def add_published_columns(table: Table, published: Sequence[Published | None]) -> Table:
    """The table with published figures, one for each row, behind the columns of those found.

    A column of its own has every kind of figure that any row has.
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
