"""What a teacher cache holds and to whom it belongs, and the checks that stand between it and a wrong use."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..data.streams import Stream
from ..errors import DistillError
from ..models.files.checked_values import Misfit, integer, mapping, number, word
from ..models.outputs import ModelInfo, Wanted
from ..text import short_name
from .teacher import Grid, Teacher

MANIFEST, FORMAT = "manifest.json", 4
_MOST = 1 << 30


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    teacher: fingerprint. info: sizes of the teacher. views: what determines the pixels, see `Stream.describe`.
    outputs: keys of the teacher's outputs. temperatures: at which the logits can be softened.
    grid: of outputs by patch, None without any. fields: dtype and shape of a row of every array.
    """

    teacher: str
    info: ModelInfo
    views: Mapping[str, Any]
    outputs: tuple[str, ...]
    temperatures: tuple[float, ...]
    grid: Grid | None
    top_k: int
    fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def of(cls, teacher: Teacher, stream: Stream, wanted: Wanted, grid: Grid | None, top_k: int) -> "Manifest":
        """The manifest of a cache that is still to be laid out."""
        if wanted.per_patch and grid is None:
            raise DistillError("patch tokens are kept on the student's grid; give grid=student_grid(student)")
        pixels = json.loads(json.dumps(stream.describe()))
        return cls(
            teacher=teacher.fingerprint(),
            info=teacher.info,
            views=pixels,
            outputs=wanted.keys,
            temperatures=tuple(sorted(wanted.temperatures)),
            grid=grid if wanted.per_patch else None,
            top_k=top_k,
        )

    def wanted(self) -> Wanted:
        """The outputs that it holds; `UnknownNameError` where the term that defines one was not imported."""
        return Wanted.read(self.outputs, self.temperatures)

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
        """The text of the file, with a digest by which damage is noticed."""
        data = json.loads(json.dumps(asdict(self)))
        return json.dumps({**data, "digest": _digest(data)}, indent=2)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder; `DistillError` if there is none or it cannot be read."""
        path = folder / MANIFEST
        if not path.exists():
            raise DistillError(f"no teacher cache in {folder}; build it first")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not {"format", "teacher", "views", "fields"} <= set(data):
                raise KeyError("another program's manifest")
            if data["format"] != FORMAT:
                raise _refusal(folder, "is of another version of vitrim")
            if data.pop("digest") != _digest(data):
                raise ValueError("altered")
            return cls(**{**data, **_checked(data)})
        except DistillError:
            raise
        except (Misfit, ValueError, TypeError, KeyError, RecursionError):
            raise DistillError(
                f"{path} is not the manifest of a teacher cache, or is damaged; choose another folder, or remove "
                f"{folder} if a cache was there"
            ) from None

    def check_serves(self, other: "Manifest", folder: Path) -> None:
        """Raise `DistillError` unless this cache belongs to the same things and holds whatever `other` wants."""
        mine, yours = self.views, other.views
        if (self.teacher, self.info) != (other.teacher, other.info):
            whose = f"another teacher ({short_name(self.info.name)}: other weights, settings or input format)"
            raise _refusal(folder, f"is of {whose}")
        # Numbers first: another seed or length also holds other images out, and says more than their digest.
        for key in sorted({*mine, *yours} - {"data", "augmentation"}):
            if mine.get(key) != yours.get(key):
                was, wanted = (short_name(views.get(key)) for views in (mine, yours))
                raise _refusal(folder, f"was made with {short_name(key)} {was}, not {wanted}")
        for key, whose in (("augmentation", "another augmentation"), ("data", "other images")):
            if mine.get(key) != yours.get(key):
                raise _refusal(folder, f"is of {whose}")
        if not set(self._parts()) >= set(other._parts()):
            raise _refusal(folder, f"holds {', '.join(self._parts())}, but the terms need {', '.join(other._parts())}")
        if other.grid is not None and self.grid != other.grid:
            raise _refusal(folder, f"holds tokens on a grid of {self.grid}, not of {other.grid}")
        if "logits" in other.outputs and self.top_k != other.top_k:
            raise _refusal(folder, f"holds the top {self.top_k} logits, not {other.top_k}")

    def _parts(self) -> list[str]:
        return [*self.outputs, *(f"temperature {temperature:g}" for temperature in self.temperatures)]


def _checked(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest holds, in the types of its class; `Misfit` or `TypeError` where something is of another kind."""
    outputs = tuple(map(_name, data["outputs"]))
    temperatures = tuple(number("temperatures", one, 1e-6, 1e6) for one in data["temperatures"])
    fields = {_name(name): _field(kind) for name, kind in mapping("fields", data["fields"]).items()}
    features = {*outputs} - {"logits"}
    largest = {"top", "index", *(f"rest@{one:g}" for one in temperatures)}
    logits = [{"logits"}, largest] if "logits" in outputs else [set[str]()]
    if {*fields} not in [features | names for names in logits]:
        raise Misfit("fields are not those of the outputs")
    return {
        "info": ModelInfo(**mapping("info", data["info"])),
        "views": mapping("views", data["views"]),
        "grid": None if data["grid"] is None else _grid(*data["grid"]),
        "top_k": integer("top_k", data["top_k"], 1, _MOST),
        "outputs": outputs, "temperatures": temperatures, "fields": fields,
    }  # fmt: skip


def _name(value: Any) -> str:
    """The name of an output, which is that of a file too."""
    if not isinstance(value, str) or not value.isprintable() or {"/", "\\"} & {*value}:
        raise Misfit("a name cannot be the name of a file")
    return value


def _field(value: Any) -> tuple[Any, ...]:
    """The dtype and shape of a row."""
    kind, *shape = value
    return word("a dtype", kind), *(integer("a shape", size, 1, _MOST) for size in shape)


def _grid(rows: Any, columns: Any) -> Grid:
    return integer("grid", rows, 1, _MOST), integer("grid", columns, 1, _MOST)


def _digest(data: Mapping[str, Any]) -> str:
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _refusal(folder: Path, reason: str) -> DistillError:
    return DistillError(f"the teacher cache in {folder} {reason}; choose another folder or remove this one")
