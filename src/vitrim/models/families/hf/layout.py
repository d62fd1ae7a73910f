"""Where the parts of a Vision Transformer of Hugging Face transformers lie: data that one adapter works from.

A file of a model family enters a `Layout`, which holds names only. transformers is an extra: nothing here imports it,
and its classes are looked up once there is a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....errors import VitrimError
from ....tables import Table
from ....text import short_name
from ...macs import Macs

LAYOUTS: Table[str, "Layout"] = Table("layout")
"""By the class of the tower, such as "ViTModel"."""
Pool = Callable[[Any, Tensor, int, Tensor | None], Tensor]
"""(tower, final tokens (B, T, C), prefix tokens, input patches behind each patch token or None) -> (B, columns)."""
Stats = tuple[tuple[float, ...], tuple[float, ...]]


def pair(size: Any) -> tuple[int, int]:
    """Height and width of what transformers writes as one number or as two.

    Raises:
        VitrimError: it is neither, or a side is not a whole number of 1 or more.
    """
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise VitrimError(f"a size is {short_name(size)}; it must be a side in pixels or (height, width)")
    return sides


IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Whole:
    """A model that holds a tower: what its head does with the final tokens.

    tower: its name in the model. pool: makes the input of the heads. reads: what `pool` looks at.
    heads: names of its classifiers, or of its projection; the logits of several are averaged.
    """

    tower: str
    pool: Pool
    reads: Literal["prefix", "tokens"]
    heads: tuple[str, ...] = ("classifier",)
    classifies: bool = True


@dataclass(frozen=True, eq=False)
class Layout:
    """A model family of transformers.

    package: below `transformers.models`. prefix: of the names of its classes.
    tower: class of the bare model. wholes: classes that hold one.
    dense: classes that hold one and read all its patch tokens by their places -> its name in them.
    pool: what the bare model returns as pooled output. pool_reads: what `pool` looks at.
    layers, projection: paths in the tower to its blocks and the projection of patches.
    final_norm: name in the tower of the norm of all final tokens; "" where there is none.
    attention, mlps: classes of the two halves of a block; each kind of MLP with what it is made of.
    parts: names in a block of its two halves. norms: names in a block of the norms before them.
    after: names in a block of what follows its attention and its MLP, before the residual.
    out, heads, scale, dropout: names in an attention layer.
    prefix_tokens: without registers. any_size: whether images of all sizes are taken without asking for it.
    shuffled: whether patches enter the first block in random order.
    maps: whether this is a backbone, which gives maps of features by block in place of final tokens.
    rotary: name of the argument of a block, and of its attention, that is the rotary table. rotate: (queries or keys
        (B, H, T, D), prefix tokens first; the table for the patch tokens) -> the same with the patch tokens rotated.
    relative: whether blocks of this tower have relative positions. check: raises for towers that cannot be cut.
    others: classes inside the tower that change -> their mixins.
    place_macs: (tower, patches) -> MACs of making their positions. pool_macs: (tower, tokens) -> MACs of its pooling.
    entering: (config, patches) -> patch tokens at the first block.
    block: mixin of reduced blocks; None: the plain one.
    tower_class, whole_class: mixins of the reduced tower, and of reduced models that hold one; None: the plain ones.
    inputs: (tower, images) -> the arguments of the model for images (B, channels, H, W) of one size.
    own_size: (configuration of a tower) -> (height, width) of the images that its positions are for.
    sized: (patch size, such a size) -> what the configuration calls that size.
    stats: mean and std of the images of its published weights. types: further `model_type`s of its configurations.
    """

    package: str
    prefix: str
    tower: str
    wholes: Mapping[str, Whole]
    pool: Pool
    pool_reads: Literal["prefix", "tokens"] = "prefix"
    dense: Mapping[str, str] = field(default_factory=dict)
    layers: str = "layers"
    projection: str = "embeddings.patch_embeddings.projection"
    layer: str = "Layer"
    attention: str = "Attention"
    mlps: Mapping[str, str] = field(default_factory=lambda: {"MLP": "MLP"})
    parts: tuple[str, str] = ("attention", "mlp")
    final_norm: str = "layernorm"
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    after: tuple[tuple[str, ...], tuple[str, ...]] = (("dropout",), ("dropout",))
    out: str = "o_proj"
    heads: str = "num_attention_heads"
    scale: str = "scaling"
    dropout: str = "attention_dropout"
    prefix_tokens: int = 1
    has_cls: bool = True
    any_size: bool = False
    shuffled: bool = False
    maps: bool = False
    rotary: str = ""
    rotate: Callable[[Tensor, Any], Tensor] = lambda stream, table: stream
    relative: Callable[[Any], bool] = lambda tower: False
    check: Callable[[Any], None] = lambda tower: None
    others: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    place_macs: Callable[[Any, int], Macs] = lambda tower, patches: Macs()
    pool_macs: Callable[[Any, int], Macs] = lambda tower, tokens: Macs()
    entering: Callable[[Any, int], int] = lambda config, patches: patches
    block: type[nn.Module] | None = None
    tower_class: type[nn.Module] | None = None
    whole_class: type[nn.Module] | None = None
    inputs: Callable[[Any, Tensor], tuple[Any, ...]] = lambda tower, images: (images,)
    own_size: Callable[[Any], tuple[int, int]] = lambda config: pair(config.image_size)
    sized: Callable[[int, Any], dict[str, Any]] = lambda patch, size: {"image_size": size}
    stats: Stats = HALF
    types: tuple[str, ...] = ()

    @property
    def module(self) -> Any:
        """The module of its classes, which is imported if it has not been."""
        return import_module(f"transformers.models.{self.package}.modeling_{self.package}")

    @property
    def model_types(self) -> tuple[str, ...]:
        """What `model_type` says in the configurations that it opens."""
        return (self.package, *self.types)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of its models."""
        return (self.tower, *self.wholes)

    def part_class(self, suffix: str) -> type[nn.Module]:
        """The class of a part, such as "Layer"."""
        return getattr(self.module, self.prefix + suffix)

    def tower_of(self, model: Any) -> Any:
        """The tower inside the model, or the model itself."""
        whole = self.whole(model)
        return model if whole is None else getattr(model, whole.tower)

    def whole(self, model: Any) -> Whole | None:
        """What is around the tower; None for a bare one."""
        return next((self.wholes[c.__name__] for c in type(model).__mro__ if c.__name__ in self.wholes), None)

    def blocks(self, model: Any) -> Any:
        """The blocks of the model."""
        return attrgetter(self.layers)(self.tower_of(model))

    def num_prefix(self, model: Any) -> int:
        """Prefix tokens: CLS, distillation token, registers."""
        return self.prefix_tokens + int(getattr(self.tower_of(model).config, "num_register_tokens", 0))


def enter(layout: Layout) -> None:
    """Make the models of this layout known."""
    LAYOUTS.enter(layout.tower, layout, layout.pool)


def layout_of(model: nn.Module) -> Layout | None:
    """The layout of a model, or of a class of its own that is derived from a known one; None for other models."""
    for cls in type(model).__mro__:
        if not cls.__module__.startswith("transformers.models."):
            continue
        for layout in LAYOUTS.values():
            if cls.__name__ in layout.names and cls.__module__.startswith(f"transformers.models.{layout.package}."):
                return layout
    return None


def first_token(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    """CLS."""
    return tokens_BTC[:, 0]


def mean_of_patches(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    """The mean over input patches: a token that stands for several counts as so many."""
    patches = tokens_BTC[:, num_prefix:]
    if size_BN is None:
        return patches.mean(dim=1)
    size = size_BN.to(torch.promote_types(patches.dtype, torch.float32))
    return (patches * (size / size.sum(1, keepdim=True)).to(patches.dtype).unsqueeze(2)).sum(1)


def own_pooler(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    """What the pooling layer of the tower makes of its tokens, or CLS where it has none."""
    pooler = getattr(tower, "pooler", None)
    return tokens_BTC[:, 0] if pooler is None else pooler(tokens_BTC)
