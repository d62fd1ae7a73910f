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
from ...reduction.restored import mark_grid, trace_behind_grid
from ...reduction.trace import Trace
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
        inside = isinstance(Call.of(self.vitrim_policy), TowerCall)
        if not inside and self.global_pool != "avg":
            if projector_of(self) is None:
                return super(ReducedModel, self).forward(x)  # That is `forward_features`, which opens a call.
            with self.open_call(x):
                return super(ReducedModel, self).forward(x)
        with self.open_call(x) as call:
            tokens = self.vitrim_left(x)[0]
            trace = self.vitrim_certain(call)
            if not trace.cuts():
                tokens = tokens.unflatten(1, grid_of(self, x.shape[-2:]))
                return tokens if inside else tokens.mean(dim=(1, 2))
            if inside:
                return finish(self.vitrim_policy, tokens)
            return mean_of(tokens, trace)

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
        maps, last = output_fmt == "NCHW", len(self.blocks) - 1
        taken, deepest = feature_take_indices(len(self.blocks), indices)
        final = deepest if stop_early else last
        with self.open_call(x, restorable=maps or not intermediates_only) as call:
            tokens, between = self.vitrim_left(x, taken, final, output_fmt)
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
        self, x: Tensor, blocks: Collection[int] = (), final: int | None = None, output_fmt: str = "NLC"
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens (B, M, C) that leave the block `final`, by default the last, normed, and those that leave `blocks`.

        With `final` no later block runs. They are found by timm's own `forward_intermediates`, whose tokens are in no
        grid yet.
        """
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
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
        grid = whole.unflatten(1, grid_of(self, images.shape[-2:]))
        return mark_grid(grid, trace, tokens_BTC, handed=handed)


class ReducedClassifier(ReducedTower):
    """A classifier with a reduction attached to its encoder."""

    encoder: Any

    @while_attached
    def forward(self, x: Tensor) -> Tensor:
        if not averages(self):
            with self.open_call(x):
                return super(ReducedModel, self).forward(x)
        plain = self.open_call(x)
        with TowerCall(plain.policy, plain.expected, plain.image_size):
            return super(ReducedModel, self).forward(x)

    @while_attached
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Of the grid that `forward_features` returned, or of tokens (B, M, C) that are left."""
        if averages(self):
            policy = self.vitrim_policy
            if x.ndim == 4:
                trace = trace_behind_grid(policy, x, self.training)
                if trace is not None and trace.tokens is not None:
                    x = mean_of(trace.tokens, trace).unsqueeze(1)  # The mean of one is itself.
            elif (found := trace_at_head(policy, x)) is not None:
                x = mean_of(x, found).unsqueeze(1)
        return super().forward_head(x, pre_logits)


def mean_of(tokens_BTC: Tensor, trace: Trace) -> Tensor:
    """The mean of tokens by the patches that each stands for, (B, C)."""
    return tokens_BTC.mean(dim=1) if trace.size_BN is None else mean_by_size(tokens_BTC, trace.size_BN)


def grid_of(tower: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the patches of images of (height, width)."""
    rows, columns = tower.patch_embed.dynamic_feat_size((size[0], size[1]))
    return int(rows), int(columns)


def averages(classifier: Any) -> bool:
    """Whether the head averages the tokens of the encoder, and not what a projector made of them."""
    return classifier.global_pool == "avg" and projector_of(classifier.encoder) is None


def final_norm_of(tower: Any) -> nn.Module | None:
    """The norm of all tokens after the last block of an encoder; None where there is none."""
    return getattr(tower, "norm", None)


def projector_of(tower: Any) -> Any:
    """The layers that make tokens of a language model from the grid of an encoder; None without them."""
    return next((part for name in ("merger", "aligner") if (part := getattr(tower, name, None)) is not None), None)


def side_of(projector: Any) -> int:
    """How many patches in each direction a projector takes together."""
    return projector.merge_size if hasattr(projector, "merge_size") else projector.downsample_ratio
