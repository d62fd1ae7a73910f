"""A small ViT that is not timm's, and all that vitrim needs to know of it: a new family is this one file.

It also brings a distillation term of its own, on an output that no other term reads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from references import VIEWS
from vitrim.distill import Term
from vitrim.distill.losses import distance
from vitrim.distill.objective import Batch
from vitrim.models import RemovedBranch
from vitrim.models.adapter import Adapter, Classifier, Description, Geometry
from vitrim.models.foreign_macs import macs_per_row
from vitrim.models.input_format import InputFormat
from vitrim.models.macs import BlockShape, Macs, block_macs
from vitrim.models.outputs import Features, ModelInfo, Output
from vitrim.models.reduction.exchange import while_attached
from vitrim.models.reduction.forward_pass import finish
from vitrim.models.reduction.reduced_block import ReducedBlock
from vitrim.models.reduction.reduced_model import ReducedModel
from vitrim.models.widths.elastic_heads import ElasticHeads
from vitrim.models.widths.elastic_hidden import ElasticHidden
from vitrim.models.widths.slicing import Parts
from vitrim.tokens import Plan, Reducer

# The network.


class Heads(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.query, self.key, self.value)
        query, key, value = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Units(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first_norm, self.heads = nn.LayerNorm(width), Heads(width, heads)
        self.second_norm, self.units = nn.LayerNorm(width), Units(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.heads(self.first_norm(x))
        return x + self.units(self.second_norm(x))


class ToyViT(nn.Module):
    def __init__(self, num_classes: int, img_size: int, in_chans: int, width: int, depth: int, patch: int) -> None:
        super().__init__()
        self.sizes = {"img_size": img_size, "in_chans": in_chans, "width": width, "depth": depth, "patch": patch}
        self.side, self.recompute = img_size // patch, False
        self.stem = nn.Conv2d(in_chans, width, patch, patch)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 1 + self.side**2, width))
        self.layers = nn.ModuleList(Layer(width, 3) for _ in range(depth))
        self.final_norm, self.classes = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def tokens(self, images: Tensor) -> list[Tensor]:
        """Tokens (B, 1 + N, C) that leave every layer, and the final ones."""
        x = torch.cat([self.start.expand(images.shape[0], -1, -1), self.stem(images).flatten(2).mT], 1) + self.places
        found = []
        for layer in self.layers:
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            found.append(x)
        return [*found, self.final_norm(x)]

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.tokens(images)[-1][:, 0])


# What vitrim needs to know of it.


class ReducedLayer(ReducedBlock, Layer):
    @property
    def attends(self) -> bool:
        return not isinstance(self.heads, RemovedBranch)

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.first_norm(x_BTC)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        heads: Any = self.heads
        if not self.attends:
            return (normed_BTC.new_empty(normed_BTC.shape[0], 1, normed_BTC.shape[1], 0),) * (last - first)
        parts = (heads.query, heads.key, heads.value)[first:last]
        return tuple(part(normed_BTC).unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for part in parts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        if not self.attends:
            return self.heads(normed_BQC)
        return self.heads.out(
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        )

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.units(self.second_norm(x_BTC))

    @property
    def head_scale(self) -> float:
        return self.heads.head_dim**-0.5 if self.attends else 1.0


class ReducedToyViT(ReducedModel, ToyViT):
    vitrim_free = ("forward", "tokens")

    @while_attached
    def tokens(self, images: Tensor) -> list[Tensor]:
        with self.open_call(images):
            *found, final = super().tokens(images)
            return [*found, finish(self.vitrim_policy, final)]


class ToyFamily(Adapter):
    """The toy ViT."""

    name = "toy"
    covers = "the toy ViT of the tests"
    speed_settings = frozenset({"training", "recompute"})
    branches: ClassVar = {"heads": "first_norm", "units": "second_norm"}

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, ToyViT)

    def geometry(self, model: Any) -> Geometry:
        size = model.sizes["img_size"]
        return Geometry(len(model.layers), model.side**2, 1, True, "prefix", (model.sizes["in_chans"], size, size))

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(model.layers)

    def grid(self, model: Any, image_size: Sequence[int]) -> tuple[int, int]:
        return model.side, model.side

    def final_norm(self, model: Any) -> nn.Module:
        return model.final_norm

    def reduced_class(self, module: nn.Module) -> type[nn.Module]:
        return {Layer: ReducedLayer, ToyViT: ReducedToyViT}[type(module)]

    def macs(self, model: Any, plan: Plan, reducer: Reducer | None) -> Macs:
        width = model.sizes["width"]
        total = Macs(plan.num_patches * model.stem.weight.numel() + macs_per_row(model.classes, width))
        for index, (layer, tokens) in enumerate(zip(model.layers, plan.entering, strict=True)):
            heads, mlp = layer.heads, macs_per_row(layer.units, width)
            shape = BlockShape(width, 0, 0, 0, 0, mlp)
            if not isinstance(heads, RemovedBranch):
                qkv = sum(macs_per_row(part, width) for part in (heads.query, heads.key, heads.value))
                dims = heads.num_heads * heads.head_dim
                shape = BlockShape(width, dims, heads.head_dim, qkv, macs_per_row(heads.out, dims), mlp)
            cuts = plan.cut(index, "before"), plan.cut(index, "inside")
            prefix_only = plan.prefix_only and index == plan.depth - 1
            total += block_macs(shape, tokens, plan.num_prefix, *cuts, prefix_only, reducer)
        return total

    def info(self, model: Any) -> ModelInfo:
        classes, sizes = self.classifier(model).classes, model.sizes
        return ModelInfo("toy_vit", classes, sizes["depth"], sizes["width"], num_prefix=1, has_cls=True)

    def output_width(self, model: Any) -> int:
        return self.classifier(model).classes or model.sizes["width"]

    def features(
        self, model: Any, images: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        *found, final = model.tokens(images)
        return final, {block: (found[block][:, :1], found[block][:, 1:]) for block in blocks}

    def head(self, model: Any, final_BTC: Tensor) -> Tensor:
        return model.classes(final_BTC[:, 0])

    def input_format(self, model: Any) -> InputFormat:
        channels, size = model.sizes["in_chans"], model.sizes["img_size"]
        return InputFormat((channels, size, size), (0.5,) * channels, (0.25,) * channels)

    def classifier(self, model: Any) -> Classifier:
        return Classifier(("classes",), getattr(model.classes, "out_features", 0))

    def reset_classifier(self, model: Any, classes: int) -> None:
        model.classes = nn.Linear(model.sizes["width"], classes) if classes else nn.Identity()

    def recompute(self, model: Any, on: bool = True) -> None:
        model.recompute = on

    def architectures(self) -> Collection[str]:
        return ("toy_vit",)

    def build(self, name: str, args: Mapping[str, Any], *, pretrained: bool, images: Mapping[str, Any]) -> nn.Module:
        given = {key: value for key, value in args.items() if value is not None}
        classes = given.pop("num_classes", 10)
        model = ToyViT(classes or 1, **{"img_size": 8, "in_chans": 1, "width": 24, "depth": 3, "patch": 2} | given)
        if not classes:
            self.reset_classifier(model, 0)
        return model

    def describe(self, model: Any) -> Description:
        return Description("toy_vit", {**model.sizes, "num_classes": self.classifier(model).classes})

    def classifiers_of(self, name: str) -> tuple[str, ...]:
        return ("classes",)


def in_timm_words(model: ToyViT) -> Any:
    """The same network under the names of timm's parts, for the slow reference."""
    same = nn.Identity()
    scales = {"ls1": same, "ls2": same}

    def heads(part: Any) -> Any:
        if isinstance(part, RemovedBranch):
            return part
        parts = (part.query, part.key, part.value)
        return SimpleNamespace(
            qkv=lambda x: torch.cat([one(x) for one in parts], -1), num_heads=part.num_heads, head_dim=part.head_dim,
            q_norm=same, k_norm=same, norm=same, gate=None, proj=part.out,
        )  # fmt: skip

    blocks = [
        SimpleNamespace(attn=heads(one.heads), norm1=one.first_norm, norm2=one.second_norm, mlp=one.units, **scales)
        for one in model.layers
    ]
    return SimpleNamespace(
        patch_embed=lambda images: model.stem(images).flatten(2).mT,
        _pos_embed=lambda x: torch.cat([model.start.expand(len(x), -1, -1), x], 1) + model.places,
        norm_pre=same, num_prefix_tokens=1, blocks=blocks, norm=model.final_norm, fc_norm=same, head=model.classes,
        attn_pool=None, global_pool="token",
    )  # fmt: skip


VIEWS["toy"] = in_timm_words


class ElasticToyHeads(ElasticHeads, Heads, replaces=Heads):
    @property
    def streams(self) -> Parts:
        return ((self.query, 1), (self.key, 1), (self.value, 1))

    @property
    def last(self) -> nn.Linear:
        return self.out

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class ElasticToyUnits(ElasticHidden, Units, replaces=Units):
    @property
    def first(self) -> Parts:
        return ((self.up, 1),)

    @property
    def last(self) -> nn.Linear:
        return self.down

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(self.made(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow_mlp(x)


# A distillation term on an output that no other term reads.


@dataclass(frozen=True)
class PooledPatches(Output):
    """Mean of the patch tokens that leave a block (B, C), the last one by default."""

    block: int = -1
    name = "pooled_patches"

    def blocks(self, info: ModelInfo) -> Collection[int]:
        return (self.block % info.depth,)

    def compute(self, features: Features) -> Tensor:
        return features.after[self.block % features.info.depth][1].mean(1)


@dataclass(frozen=True)
class Pooled(Term):
    """Mean patch tokens, mapped to the teacher's width."""

    def of_student(self) -> Sequence[Output]:
        return (PooledPatches(),)

    def project(self, student: ModelInfo, teacher: ModelInfo) -> nn.Module | None:
        return nn.Linear(student.width, teacher.width)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        assert project is not None
        key = PooledPatches().key
        return distance(project(batch.student[key]), batch.teacher[key], "mse", normalise=False).mean()
