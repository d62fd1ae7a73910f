"""What a teacher cache holds and to whom it belongs, and the checks that stand between it and a wrong use."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..data.views import Views
from ..errors import DistillError
from .features import Anatomy, Wanted
from .teacher import Grid, Teacher

MANIFEST, FORMAT = "manifest.json", 2


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    teacher: fingerprint. views: what determines the pixels, as `Views.describe` says. grid: of patch tokens.
    fields: dtype and shape of a row of every array.
    """

    teacher: str
    anatomy: Anatomy
    views: Mapping[str, Any]
    wanted: Wanted
    grid: Grid | None
    top_k: int
    fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def of(cls, teacher: Teacher, views: Views, wanted: Wanted, grid: Grid | None, top_k: int) -> "Manifest":
        """The manifest of a cache that is still to be laid out."""
        if wanted.tokens and grid is None:
            raise DistillError("patch tokens are kept on the student's grid; give grid=student_grid(student)")
        pixels = json.loads(json.dumps(views.describe()))
        return cls(teacher.fingerprint(), teacher.anatomy, pixels, wanted, grid if wanted.tokens else None, top_k)

    def with_fields(self, rows: Mapping[str, np.ndarray]) -> "Manifest":
        """The same with dtypes and shapes of these arrays (1, ...)."""
        return replace(self, fields={name: (str(row.dtype), *row.shape[1:]) for name, row in rows.items()})

    @property
    def rows(self) -> int:
        """Images times views."""
        return int(self.views["images"]) * int(self.views["views"])

    @property
    def num_bytes(self) -> int:
        """Size of all arrays on disk."""
        each = (np.dtype(kind).itemsize * prod(shape) for kind, *shape in self.fields.values())
        return self.rows * (1 + sum(each))

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder; `DistillError` if there is none or it cannot be read."""
        path = folder / MANIFEST
        if not path.exists():
            raise DistillError(f"no teacher cache in {folder}; build it first")
        try:
            data = json.loads(path.read_text())
            wanted = {**data["wanted"], "temperatures": tuple(data["wanted"]["temperatures"])}
            grid = None if data["grid"] is None else (data["grid"][0], data["grid"][1])
            fixed = {"anatomy": Anatomy(**data["anatomy"]), "wanted": Wanted(**wanted), "grid": grid}
            return cls(**{**data, **fixed})
        except (ValueError, TypeError, KeyError):
            raise DistillError(f"{path} cannot be read; remove {folder} and build the cache again") from None

    def check_serves(self, other: "Manifest", folder: Path) -> None:
        """Raise `DistillError` unless this cache belongs to the same things and holds whatever `other` wants."""
        mine, yours = self.views, other.views
        for differs, whose in (
            (self.format != other.format, "another version of vitrim"),
            (
                self.teacher != other.teacher,
                f"another teacher ({self.anatomy.name}: other weights, settings or input format)",
            ),
        ):
            if differs:
                raise _refusal(folder, f"is of {whose}")
        # Numbers first: another seed or length also holds other images out, and says more than their digest.
        for key in sorted({*mine, *yours} - {"data", "augmentation"}):
            if mine.get(key) != yours.get(key):
                raise _refusal(folder, f"was made with {key} {mine.get(key)}, not {yours.get(key)}")
        for key, whose in (("augmentation", "another augmentation"), ("data", "other images")):
            if mine[key] != yours[key]:
                raise _refusal(folder, f"is of {whose}")
        if not self.wanted.covers(other.wanted):
            raise _refusal(folder, f"holds {self.wanted}, but the terms need {other.wanted}")
        if other.wanted.tokens and self.grid != other.grid:
            raise _refusal(folder, f"holds tokens on a grid of {self.grid}, not of {other.grid}")
        if other.wanted.logits and self.top_k != other.top_k:
            raise _refusal(folder, f"holds the top {self.top_k} logits, not {other.top_k}")


def _refusal(folder: Path, reason: str) -> DistillError:
    return DistillError(f"the teacher cache in {folder} {reason}; choose another folder or remove this one")
