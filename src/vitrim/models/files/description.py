"""The description of a saved model: what it may hold, checked before anything is built from it.

A folder may come from anywhere. The values only choose among architectures that are known and their plain options:
none may name a file or a class, and none may be so large that building takes for ever.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...text import short_name
from ...tokens.reduction import Phase
from ..input_format import CROP_MODES, INTERPOLATIONS
from ..widths.block_widths import BlockWidths
from .checked_values import Misfit, integer, mapping, number, numbers, one_of, optional, plain, shown, word

SCHEMA = 4
_LONGEST = 16 << 20  # Characters of the whole description.
_LARGEST = 1 << 16
_MAX_IMAGE = 8192
_NAMES_FILES = re.compile(r"(.*_)?(path|dir|file|url|fn|cfg|filter)|pretrained.*|device|dtype|features_only|scriptable")
"""Arguments of an architecture that name files, code or places; no description holds them."""
FORMATS = ("float16", "bfloat16", "float64")
"""Number formats of tables that are not float32."""
_COUNTS = (
    "depth", "embed_dim", "hidden_size", "img_size", "in_chans", "intermediate_size", "num_attention_heads",
    "num_heads", "num_hidden_layers", "patch_size", "position_size",
)  # fmt: skip
"""Arguments that are whole numbers of 1 or more wherever they are given."""


@dataclass(frozen=True)
class Cut:
    """The reduction that is attached: its text (None: only `cls_only`), phase and strength."""

    text: str | None
    phase: Phase | None
    strength: float
    cls_only: bool


@dataclass(frozen=True)
class Record:
    """What builds a saved model again, its weights aside.

    family: the name of its adapter; None in folders that do not say it. args, images: see `adapter.Description`.
    widths: of its blocks, where they differ from the architecture's own. tables: number formats of the buffers that are
    no part of the state dict, where they are not float32. extra: whatever was saved with it.
    """

    architecture: str
    args: Mapping[str, Any]
    images: Mapping[str, Any]
    num_classes: int | None = None
    family: str | None = None
    widths: tuple[BlockWidths, ...] | None = None
    reduction: Cut | None = None
    tables: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, in the order of the head, where they were saved."""
        return self.extra.get("classes")

    @property
    def position_size(self) -> tuple[int, int] | None:
        """(height, width) of the images that its positions are for, where the arguments say it.

        Models that take images of all sizes keep the positions of one, and say so.
        """
        size = self.args.get("position_size", self.args.get("img_size"))
        if isinstance(size, int):
            return size, size
        return (size[0], size[1]) if isinstance(size, tuple) and len(size) == 2 else None

    def to_json(self) -> str:
        """Text that `parse` reads."""
        cut, widths = self.reduction, self.widths
        record = {
            "schema": SCHEMA,
            "family": self.family,
            "architecture": self.architecture,
            "args": dict(self.args),
            "num_classes": self.num_classes,
            "data": dict(self.images),  # They belong to the weights and not to the architecture.
            "widths": None if widths is None else [_of_block(block) for block in widths],
            "reduction": None if cut is None else vars(cut),
            "tables": dict(self.tables),
            "versions": dict(self.versions),
            "extra": dict(self.extra),
        }
        return json.dumps(record, indent=2)


def parse(text: str, source: str | Path) -> Record:
    """Read a description.

    Args:
        text: what `Record.to_json` wrote.
        source: the file that it is from, for messages.

    Raises:
        CheckpointError: it was altered, or written by a newer version.
    """
    try:
        if len(text) > _LONGEST:
            raise Misfit("it is too long")
        return _record(mapping("the whole", json.loads(text)), source)
    except (Misfit, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = short_name(error, 200) if isinstance(error, Misfit) else "it is not JSON"
        raise CheckpointError(f"the description of the model in {source} is damaged: {reason}; save it again") from None


def largest(name: str) -> int:
    """The largest whole number that this argument of an architecture may be: more is a mistake, or an attack."""
    if name in ("depth", "depths", "layers", "num_hidden_layers"):
        return 1000
    return _MAX_IMAGE if name in ("img_size", "position_size") else _LARGEST


def check_args(args: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless `parse` would take these arguments of an architecture."""
    if (fault := fault_of_args(args)) is not None:
        raise CheckpointError(f"the model cannot be described: {fault}")


def fault_of_args(args: Mapping[str, Any]) -> str | None:
    """Why no description holds these arguments of an architecture: "args.NAME is ..."; None where one can."""
    try:
        _args(args)
    except Misfit as error:
        return str(error)
    return None


def _record(record: Mapping[str, Any], source: str | Path) -> Record:
    schema = integer("schema", record.get("schema"), 1, _LARGEST)
    if schema > SCHEMA:
        raise CheckpointError(f"{source} has schema {schema}, this vitrim reads up to {SCHEMA}; update vitrim")
    if missing := [name for name in ("architecture", "args") if name not in record]:
        raise Misfit(f"{missing[0]} is missing")
    return Record(
        architecture=word("architecture", record["architecture"]),
        args=_args(mapping("args", record["args"])),
        images=_images(mapping("data", record.get("data") or {})),
        num_classes=optional(integer)("num_classes", record.get("num_classes"), 0, _LARGEST * 16),
        family=optional(word)("family", record.get("family")),
        widths=optional(_widths)("widths", record.get("widths")),
        reduction=optional(_cut)("reduction", record.get("reduction")),
        tables=_tables(mapping("tables", record.get("tables") or {})),
        versions={str(key): str(value) for key, value in mapping("versions", record.get("versions") or {}).items()},
        extra=_extra(mapping("extra", record.get("extra") or {})),
    )


def _args(values: Mapping[str, Any]) -> dict[str, Any]:
    if len(values) > 100:
        raise Misfit(f"args has {len(values)} entries")
    found: dict[str, Any] = {}
    for name, value in values.items():
        word("a name in args", name)
        if _NAMES_FILES.fullmatch(name):
            raise Misfit(f"args.{name} may name a file or code, which no saved model holds")
        most = largest(name)
        found[name] = plain(f"args.{name}", value, most)
        for part in value if isinstance(value, list | tuple) else [value]:
            if name in _COUNTS and part is not None:
                integer(f"args.{name}", part, 1, most)
    return found


def _images(values: Mapping[str, Any]) -> dict[str, Any]:
    checks: dict[str, Callable[[str, Any], Any]] = {
        "mean": lambda where, value: numbers(where, value, -1e3, 1e3),
        "std": lambda where, value: numbers(where, value, 1e-6, 1e3),
        "interpolation": lambda where, value: one_of(where, value, INTERPOLATIONS),
        "crop_pct": lambda where, value: number(where, value, 0.01, 4),
        "crop_mode": lambda where, value: one_of(where, value, CROP_MODES),
    }
    if unknown := [name for name in values if name not in checks]:
        raise Misfit(f"data.{short_name(unknown[0])} is not known")
    return {name: checks[name](f"data.{name}", value) for name, value in values.items()}


def _widths(where: str, value: Any) -> tuple[BlockWidths, ...]:
    if not isinstance(value, list) or len(value) > 1000:
        raise Misfit(f"{where} is {shown(value)}; it must be a list, one entry per block")
    found = []
    for block in value:
        if not isinstance(block, dict) or set(block) - {"value_dim", "query_dim"} != {"head_dim", "hidden"}:
            raise Misfit(
                f"{where} holds {shown(block)}; it must be head_dim, hidden and perhaps value_dim and query_dim of a "
                "block"
            )
        found.append(BlockWidths(**{name: integer(f"{where}.{name}", block[name], 0, _LARGEST) for name in block}))
    return tuple(found)


def _of_block(block: BlockWidths) -> dict[str, int]:
    return {name: size for name, size in vars(block).items() if size is not None}


def _cut(where: str, value: Any) -> Cut:
    value = mapping(where, value)
    if set(value) != {"text", "phase", "strength", "cls_only"}:
        raise Misfit(f"{where} must hold text, phase, strength and cls_only")
    text, phase = value["text"], value["phase"]
    if not (text is None or (isinstance(text, str) and 0 < len(text) <= 2000)):
        raise Misfit(f"{where}.text is {shown(text)}; it must be a reduction")
    if phase not in ((None,) if text is None else ("train", "eval", "both")):
        raise Misfit(f"{where}.phase is {shown(phase)}; it must be train, eval or both")
    if not isinstance(value["cls_only"], bool):
        raise Misfit(f"{where}.cls_only is {shown(value['cls_only'])}; it must be true or false")
    return Cut(text, phase, number(f"{where}.strength", value["strength"], 0, 1), value["cls_only"])


def _tables(values: Mapping[str, Any]) -> dict[str, str]:
    return {word("a name in tables", name): one_of(f"tables.{name}", values[name], FORMATS) for name in values}


def _extra(values: Mapping[str, Any]) -> dict[str, Any]:
    names = values.get("classes")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise Misfit("extra.classes must be a list of names")
    return dict(values)
