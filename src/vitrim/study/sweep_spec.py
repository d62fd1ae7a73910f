"""The part `sweep` of a study file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import RecipeError, UnknownNameError
from ..measure.table import Table
from ..options import from_dict
from .compare import COLUMNS
from .published import Published, add_published_columns, read_published
from .template import check_sweep, settings_of


@dataclass(frozen=True)
class SweepSpec:
    """One method at many settings, tested on the rows of the study.

    method: a reduction with names in braces, see `sweep`.
    vary: the values of each name.
    published: published figures by row and setting, such as "dense, alpha 1.5".
    """

    method: str | None = None
    vary: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] | None = None

    @classmethod
    def parse(cls, data: dict[str, Any]) -> "SweepSpec":
        """Read what the file holds.

        Raises:
            RecipeError: an option of the wrong kind.
            UnknownNameError: an option that does not exist.
        """
        part = from_dict(cls, data, "sweep")
        return replace(part, published=read_published(part.published, "sweep.published"))

    def check(self, rows: Sequence[str]) -> None:
        """Check all settings before anything is trained.

        Args:
            rows: of the study, those that are tested.

        Raises:
            RecipeError: no method, or values that are not numbers.
            ScheduleError: see `check_sweep`.
            UnknownNameError: a published figure of a row, a setting or a kind that the table does not have.
        """
        if self.method is None:
            raise RecipeError("the sweep of the study has no method; give one, such as TopK() @ KeepRate({r})")
        for name, values in self.vary.items():
            if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
                raise RecipeError(f"sweep.vary.{name} is {values!r}; it must list numbers, such as [0.5, 0.7]")
        check_sweep(self.method, self.vary)
        known = [self._label(row, setting) for row in rows for setting in ({}, *settings_of(self.vary))]
        keys = [column.key for column in COLUMNS]
        for name, figures in self._published.items():
            if name not in known:
                raise UnknownNameError("row and setting in sweep.published", str(name), known)
            for key in figures.known:
                if key not in keys:
                    raise UnknownNameError(f"column of a sweep in published {name!r}", key, keys)

    def add_published(self, table: Table, rows: Mapping[str, str]) -> Table:
        """The table of this sweep with published figures; `rows` are those of the study by the names of models."""
        labels = [self._label(rows[row["model"]], row) for row in table.rows]
        return add_published_columns(table, [self._published.get(label) for label in labels])

    @property
    def _published(self) -> dict[str, Published]:
        return self.published or {}

    def _label(self, row: str, setting: Mapping[str, Any]) -> str:
        """The name of a table row among published figures: row and setting, of the dense network the row only."""
        return ", ".join([row, *(f"{name} {setting[name]:g}" for name in self.vary if name in setting)])
