"""What a model gives for a batch of images, as named outputs that distillation terms compare.

Each output is one small class that computes a tensor from the features of a forward pass. To add one, subclass `Output`
in any file: in that of the term that reads it, or in that of the family that gives it. Nothing else has to change: the
live teacher, the cache and the student compute it through `Adapter.outputs`.

Shapes: B images, K classes, S stage boundaries, P prefix and N patch tokens, C channels.
"""

from ast import literal_eval
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..tables import Table

if TYPE_CHECKING:
    from .adapter import Adapter

Outputs = Mapping[str, Tensor]
"""Tensors by the key of their output, such as "logits", "cls" or "stages@3"."""
OUTPUTS: Table[str, type["Output"]] = Table("output")


@dataclass(frozen=True)
class ModelInfo:
    """Sizes that outputs depend on. `depth` and `width` are 0 for a model that gives logits only.

    classes: of the classifier, 0 without one. width: channels of a token.
    has_dist: whether a distillation token has a classifier of its own (DeiT).
    """

    name: str
    classes: int
    depth: int = 0
    width: int = 0
    num_prefix: int = 0
    has_cls: bool = False
    has_dist: bool = False

    def boundaries(self, stages: int) -> tuple[int, ...]:
        """The last block of each of `stages` equal stages but the final one."""
        return tuple(i * self.depth // stages - 1 for i in range(1, stages))


@dataclass(frozen=True, eq=False)
class Features:
    """The inside of one forward pass, which outputs are computed from.

    final_BTC: all tokens after the last norm, prefix tokens first.
    after: (prefix tokens (B, P, C), patch tokens (B, N, C)) that leave each of the blocks asked for, before any norm.
    """

    adapter: "Adapter"
    model: nn.Module
    info: ModelInfo
    wanted: "Wanted"
    final_BTC: Tensor
    after: Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Output:
    """Base of all outputs. An instance is a request; its options become part of its key."""

    name: ClassVar[str]
    """The first part of its key, unique among all outputs."""
    per_patch: ClassVar[bool] = False
    """Whether it is (B, N, C) by patch: a teacher's is then resampled to the student's grid."""
    predicts: ClassVar[bool] = False
    """Whether these are class logits."""
    inside: ClassVar[bool] = True
    """Whether it needs `Features`; False only where the result of the usual forward pass is enough."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:  # Not a shared base.
            OUTPUTS.enter(cls.name, cls)

    @property
    def key(self) -> str:
        """Its name and options, such as "stages@3": the key of its tensor, and the name of its file in a cache."""
        return "@".join([self.name, *(str(getattr(self, option.name)) for option in fields(self))])

    def blocks(self, info: ModelInfo) -> Collection[int]:
        """The blocks whose outgoing tokens `compute` reads."""
        return ()

    def missing(self, info: ModelInfo) -> str:
        """Why such a model cannot give it, to follow the name of the model in a sentence; empty if it can."""
        return "" if info.depth else "gives logits only"

    def compute(self, features: Features) -> Tensor:
        """The tensor, (B, ...)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Logits(Output):
    """Class logits (B, K). Where `DistLogits` is read too, those of the classifier on CLS (DeiT), not the average."""

    name = "logits"
    predicts = True
    inside = False

    def missing(self, info: ModelInfo) -> str:
        return "" if info.classes else "has no classifier"

    def compute(self, features: Features) -> Tensor:
        if any(isinstance(output, DistLogits) for output in features.wanted.outputs):
            return features.adapter.heads(features.model, features.final_BTC)[0]
        return features.adapter.head(features.model, features.final_BTC)


@dataclass(frozen=True)
class DistLogits(Output):
    """Logits (B, K) of the distillation token's own classifier (DeiT)."""

    name = "dist_logits"
    predicts = True

    def missing(self, info: ModelInfo) -> str:
        return "" if info.has_dist and info.classes else "has no distillation token with a classifier"

    def compute(self, features: Features) -> Tensor:
        return features.adapter.heads(features.model, features.final_BTC)[1]


@dataclass(frozen=True)
class Cls(Output):
    """The final CLS token (B, C)."""

    name = "cls"

    def missing(self, info: ModelInfo) -> str:
        return super().missing(info) or ("" if info.has_cls else "has no CLS token; use the term Tokens")

    def compute(self, features: Features) -> Tensor:
        return features.final_BTC[:, 0]


@dataclass(frozen=True)
class Stages(Cls):
    """CLS at the boundaries of equal stages of blocks, (B, S, C)."""

    stages: int = 3

    name = "stages"

    def missing(self, info: ModelInfo) -> str:
        few = f"has {info.depth} blocks, too few for {self.stages} stages" if info.depth < self.stages else ""
        return super().missing(info) or few

    def blocks(self, info: ModelInfo) -> Collection[int]:
        return info.boundaries(self.stages)

    def compute(self, features: Features) -> Tensor:
        return torch.stack([features.after[block][0][:, 0] for block in self.blocks(features.info)], dim=1)


@dataclass(frozen=True)
class Patches(Output):
    """The final patch tokens (B, N, C)."""

    name = "tokens"
    per_patch = True

    def compute(self, features: Features) -> Tensor:
        return features.final_BTC[:, features.info.num_prefix :]


@dataclass(frozen=True)
class Wanted:
    """The outputs to compute; two of them join by `|`. `temperatures`: those at which logits are softened."""

    outputs: frozenset[Output] = frozenset()
    temperatures: frozenset[float] = frozenset()

    @classmethod
    def of(cls, *outputs: Output, temperatures: Collection[float] = ()) -> "Wanted":
        """These outputs."""
        return cls(frozenset(outputs), frozenset(temperatures))

    @classmethod
    def read(cls, keys: Collection[str], temperatures: Collection[float]) -> "Wanted":
        """The outputs of these keys; `VitrimError` for one that no class computes."""
        return cls.of(*map(_read, keys), temperatures=temperatures)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all outputs, sorted."""
        return tuple(sorted(output.key for output in self.outputs))

    @property
    def inside(self) -> bool:
        """Whether anything but the result of the usual forward pass is read."""
        return any(output.inside for output in self.outputs)

    @property
    def predicts(self) -> bool:
        """Whether any output is class logits."""
        return any(output.predicts for output in self.outputs)

    @property
    def per_patch(self) -> bool:
        """Whether any output is by patch."""
        return any(output.per_patch for output in self.outputs)

    def __or__(self, other: "Wanted") -> "Wanted":
        return Wanted(self.outputs | other.outputs, self.temperatures | other.temperatures)


def _read(key: str) -> Output:
    name, *options = key.split("@")
    return OUTPUTS.find(name)(*map(_value, options))


def _value(text: str) -> object:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def as_tensor(out: Any) -> Tensor:
    """The logits, or features, in whatever a model returned; those of several classifiers are averaged.

    Of maps of features, the last one, channels first.
    """
    if isinstance(out, tuple):
        out = sum(out) / len(out)
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "image_embeds", "pooler_output"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    if maps := getattr(out, "feature_maps", None):
        return maps[-1].mT if maps[-1].ndim == 3 else maps[-1]
    raise UnsupportedModelError(f"a {type(out).__name__} holds neither logits nor features")
