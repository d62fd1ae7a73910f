"""Vision towers of timm that return a grid: encoders, and classifiers that hold one as `encoder`.

Blocks run on the tokens that are left. Where a projector or the caller reads the grid (B, H, W, C), all patches are put
back at their places first: those that are left as they are, merged ones as copies of their common token, dropped and
fused ones as they were when they left. Where a head averages patches, it averages the tokens that are left, each as
often as there are patches behind it.
"""

from collections.abc import Collection, Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ....errors import VitrimError
from ...reduction.exchange import while_attached
from ...reduction.forward_pass import CHANGED, Call, finish, trace_at_head
from ...reduction.reduced_model import ReducedModel
from ...reduction.restored import RestoredTrace, mark_grid, trace_behind_grid
from ...reduction.trace import Trace, trace_of
from .reduced import mean_by_size


class TowerCall(Call):
    """One call of a classifier whose head averages the tokens of its encoder."""


class ReducedTower(ReducedModel):
    """What encoders and classifiers have in common."""

    vitrim_free = ()

    @property
    def vitrim_tower(self) -> Any:
        """The encoder."""
        return getattr(self, "encoder", self)

    def expected_patches(self, images: Any) -> int | None:
        if getattr(images, "ndim", 0) != 4:
            return None
        rows, columns = grid_of(self.vitrim_tower, images.shape[-2:])
        return rows * columns


class ReducedEncoder(ReducedTower):
    """An encoder with a reduction attached, by itself or inside a classifier."""

    blocks: Any
    global_pool: str

    @while_attached
    def forward(self, x: Tensor) -> Tensor:
        """As the foreign class; inside a classifier that averages, the tokens that are left (B, M, C)."""
        inside = self.vitrim_inside
        if not inside and self.global_pool != "avg":
            if projector_of(self) is None:
                return super(ReducedModel, self).forward(x)  # That is `forward_features`, which opens a call.
            with self.open_call(x):
                return super(ReducedModel, self).forward(x)
        with self.open_call(x) as call:
            tokens = self.vitrim_left(x)[0]
            trace = self.vitrim_certain(call)
            if not trace.cuts():
                whole = self.vitrim_shaped(tokens, x)
                return whole if inside else whole.mean(dim=tuple(range(1, whole.ndim - 1)))
            if inside:
                return finish(self.vitrim_policy, tokens)
            return mean_of(tokens, trace)

    @property
    def vitrim_inside(self) -> bool:
        """Whether a classifier calls that averages tokens itself."""
        return isinstance(Call.of(self.vitrim_policy), TowerCall)

    @while_attached
    def forward_features(self, x: Tensor) -> Tensor:
        """The grid (B, H, W, C) of all patches, restored."""
        with self.open_call(x, restorable=True) as call:
            tokens = self.vitrim_left(x)[0]
            return self.vitrim_grid(tokens, self.vitrim_certain(call), x, handed=not call.inner)

    @while_attached
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """As timm's, with all patches restored; with output_fmt="NLC" intermediates are the tokens that are left."""
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        maps, last = output_fmt == "NCHW", len(self.blocks) - 1
        taken, deepest = feature_take_indices(len(self.blocks), indices)
        final = deepest if stop_early else last
        with self.open_call(x, restorable=maps or not intermediates_only) as call:
            tokens, between = self.vitrim_left(x, taken, final)
            trace = self.vitrim_certain(call, final)
        after = final_norm_of(self) if norm else None

        def made(block: int, left: Tensor) -> Tensor:
            left = left if after is None else after(left)
            if not maps:
                return left
            whole = trace.left(block).restored(left, after, num_prefix=0)
            return whole.transpose(1, 2).unflatten(2, grid_of(self, x.shape[-2:])).contiguous()

        found = [made(block, between[block]) for block in sorted(set(taken))]
        if intermediates_only:
            return {"image_intermediates": found} if output_dict else found
        grid = self.vitrim_grid(tokens, trace.left(final), x, handed=True)
        return {"image_features": grid, "image_intermediates": found} if output_dict else (grid, found)

    def vitrim_left(
        self, x: Any, blocks: Collection[int] = (), final: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens (B, M, C) that leave the block `final`, by default the last, normed, and those that leave `blocks`.

        With `final` no later block runs. They are found by timm's own `forward_intermediates`, whose tokens are in no
        grid yet.
        """
        early = final is not None and final < len(self.blocks) - 1
        final = len(self.blocks) - 1 if final is None else final
        wanted = sorted({*blocks, final})
        found = super().forward_intermediates(
            x, indices=wanted, stop_early=early, output_fmt="NLC", intermediates_only=True
        )
        between = dict(zip(wanted, found, strict=True))
        norm = final_norm_of(self)
        return between[final] if norm is None else norm(between[final]), between

    def vitrim_certain(self, call: Call, block: int | None = None) -> Trace:
        """The trace of the only pass in this call, which ended after `block`, by default the last."""
        trace, block = call.certain, len(self.blocks) - 1 if block is None else block
        if trace is None or trace.block != block:
            raise VitrimError(CHANGED)
        return trace

    def vitrim_grid(self, tokens_BTC: Tensor, trace: Trace, images: Tensor, *, handed: bool) -> Tensor:
        """The grid (B, H, W, C) of all patches of these images."""
        whole = trace.restored(tokens_BTC, final_norm_of(self), num_prefix=0)
        return mark_grid(self.vitrim_shaped(whole, images), trace, tokens_BTC, handed=handed)

    def vitrim_shaped(self, whole_BNC: Tensor, images: Tensor) -> Tensor:
        """All patches of these images as the foreign class returns them."""
        return whole_BNC.unflatten(1, grid_of(self, images.shape[-2:]))


class ReducedClassifier(ReducedTower):
    """A classifier with a reduction attached to its encoder."""

    encoder: Any

    @while_attached
    def forward(self, x: Tensor) -> Tensor:
        if not averages(self):
            with self.open_call(x):
                return super(ReducedModel, self).forward(x)
        plain = self.open_call(x)
        with TowerCall(plain.policy, self.training, plain.expected, plain.image_size):
            return super(ReducedModel, self).forward(x)

    @while_attached
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Of the grid that `forward_features` returned, or of tokens (B, M, C) that are left."""
        return super().forward_head(self.vitrim_pooled(x), pre_logits)

    def vitrim_pooled(self, x: Tensor) -> Tensor:
        """What the head averages: the weighed mean as one token (B, 1, C), or all tokens where each counts the same."""
        if not averages(self):
            return x
        if x.ndim == 4 or isinstance(trace_of(x), RestoredTrace):
            trace = trace_behind_grid(self.vitrim_policy, x, self.training)
            return x if trace is None or trace.tokens is None else mean_of(trace.tokens, trace).unsqueeze(1)
        found = trace_at_head(self.vitrim_policy, x)
        return x if found is None else mean_of(x, found).unsqueeze(1)


def mean_of(tokens_BTC: Tensor, trace: Trace) -> Tensor:
    """The mean of tokens by the patches that each stands for, (B, C)."""
    return tokens_BTC.mean(dim=1) if trace.size_BN is None else mean_by_size(tokens_BTC, trace.size_BN)


def grid_of(tower: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the patches of images of (height, width)."""
    embed = tower.patch_embed
    if not hasattr(embed, "dynamic_feat_size"):
        return size[0] // embed.patch_size[0], size[1] // embed.patch_size[1]
    rows, columns = embed.dynamic_feat_size((size[0], size[1]))
    return int(rows), int(columns)


def averages(classifier: Any) -> bool:
    """Whether the head averages the tokens of the encoder, and not what a projector made of them."""
    return classifier.global_pool == "avg" and projector_of(classifier.encoder) is None


def final_norm_of(tower: Any) -> nn.Module | None:
    """The norm of all tokens after the last block of an encoder; None where there is none."""
    return getattr(tower, "norm", None)


def projector_of(tower: Any) -> Any:
    """The part that makes tokens of a language model from the grid of an encoder; None without one."""
    if tower.global_pool == "soft":
        return tower.pooler
    return next((part for name in ("merger", "aligner") if (part := getattr(tower, name, None)) is not None), None)


def side_of(projector: Any) -> int:
    """How many patches in each direction a projector takes together."""
    names = ("merge_size", "downsample_ratio", "pooling_kernel_size")
    return next(getattr(projector, name) for name in names if hasattr(projector, name))
