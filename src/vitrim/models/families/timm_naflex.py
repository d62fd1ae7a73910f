"""Adapter for timm's `NaFlexVit`: images of any size and proportion, also several sizes in one padded batch.

In a padded batch (`patches`, `patch_coord`, `patch_valid`, as timm's NaFlex collator makes it) each image is reduced by
the schedule for its own number of patches. Padding is left out, see `padded`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from timm.layers import Attention
from timm.layers.helpers import to_2tuple
from timm.models import get_model_input_config
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...errors import VitrimError
from ..adapter import Description, Geometry, State
from ..input_format import InputFormat
from ..macs import BlockShape, Macs
from ..outputs import ModelInfo
from ..reduction.exchange import while_attached
from ..reduction.forward_pass import Call, finish
from ..reduction.padded import (
    Group,
    by_length,
    joined,
    lengths_of,
    padded_trace_of,
    together,
    unchanged_padded_trace_of,
    valid_of,
)
from .timm.model import check_whole_patches
from .timm.reduced import ReducedTimmModel, left_by_patch_drop
from .timm.weights import converted
from .timm_eva import ReducedEvaBlock, TimmEva
from .timm_vit import Classes, ReducedTimmBlock, TimmViT


class ReducedNaFlexVit(ReducedTimmModel, NaFlexVit):
    """`NaFlexVit` with a reduction attached."""

    vitrim_free = ("forward", "forward_features")
    vitrim_heads = ("forward_head", "_pool")
    embeds: Any

    def expected_patches(self, images: Any) -> int | None:
        if not isinstance(images, Tensor) or images.ndim != 4:
            return None
        rows, columns = self.grid_of(images.shape[-2:])
        return self._entering(rows * columns)

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        return self.embeds.dynamic_feat_size(tuple(size))

    @while_attached
    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        if patch_coord is None:
            return super().forward_features(patches, patch_coord, patch_valid, attn_mask)
        lengths = [patches.shape[1]] * len(patches) if patch_valid is None else lengths_of(patch_valid)
        if not self._cuts(*lengths, patches.shape[1]):
            with self.open_call(None):
                out: Any = NaFlexVit.forward_features(self, patches, patch_coord, patch_valid, attn_mask)
                finish(self.vitrim_policy, out["patches"])
            return out
        if attn_mask is not None:
            raise VitrimError(
                "an attention mask cannot be combined with token reduction; call handle.remove() first, or give "
                "patch_valid alone"
            )
        groups: list[Group] = []
        parts: list[Tensor] = []
        for length, rows in by_length(lengths).items():
            group = Group(rows, length, patches, patch_coord[list(rows), :length])
            with Call(self.vitrim_policy, self.training, self._entering(length)):
                part: Any = NaFlexVit.forward_features(self, group.part(patches), group.coordinates)
                parts.append(finish(self.vitrim_policy, part["patches"]))
            groups.append(replace(group, tokens=parts[-1]))
        final = together(groups, parts, patches.shape[1])
        if (trace := padded_trace_of(final)) is not None:
            self.vitrim_policy.show(trace)
        return {"patches": final, "patch_valid": valid_of(groups, self.num_prefix_tokens)}

    @while_attached
    def forward_head(self, patches: Tensor, pre_logits: bool = False, patch_valid: Tensor | None = None) -> Tensor:
        trace = unchanged_padded_trace_of(patches)
        if trace is None:
            return super().forward_head(patches, pre_logits, patch_valid)
        groups = trace.groups
        return joined(groups, [super(ReducedNaFlexVit, self).forward_head(g.tokens, pre_logits) for g in groups])

    @while_attached
    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, dict) and kwargs.get("patch_coord") is None:
            return super().forward_intermediates(x, *args, **kwargs)
        batch = x if isinstance(x, dict) else {"patches": x, **kwargs}
        valid, patches = batch.get("patch_valid"), batch["patches"]
        lengths = [] if valid is None else lengths_of(valid)
        if self._cuts(*lengths, patches.shape[1]):
            raise VitrimError(
                "what each block leaves of a padded batch is of another length for every image; call forward_features, "
                "or give forward_intermediates images (B, C, H, W) of one size"
            )
        with self.open_call(None):
            return NaFlexVit.forward_intermediates(self, x, *args, **kwargs)

    def _pool(self, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None) -> Tensor:
        weighed = self.weighed(x, self.global_pool if pool_type is None else pool_type)
        return super()._pool(x, pool_type, patch_valid) if weighed is None else weighed

    def _cuts(self, *lengths: int) -> bool:
        """Whether anything is left out of images of so many patches."""
        mode = Call.mode(self.vitrim_policy, self.training)
        plans = [self.vitrim_policy.plan(self._entering(length), mode) for length in set(lengths)]
        return any(plan.cuts or plan.prefix_only for plan in plans)

    def _entering(self, num_patches: int) -> int:
        return left_by_patch_drop(self, num_patches, self.training)


class TimmNaFlex(TimmEva):
    """ViTs for images of any size and proportion, SigLIP 2 and C-RADIO among them."""

    name = "timm-naflex"
    covers = "timm NaFlexVit: ViT for images of any size, also padded batches; SigLIP 2, C-RADIO"

    _attentions: ClassVar[tuple[type[nn.Module], ...]] = (Attention, *TimmEva._attentions)
    _reduced_blocks: ClassVar[Classes] = {Block: ReducedTimmBlock, EvaBlock: ReducedEvaBlock}
    _reduced_models: ClassVar[Classes] = {NaFlexVit: ReducedNaFlexVit}

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, NaFlexVit)

    def geometry(self, model: Any) -> Geometry:
        channels, height, width = _input_size(model)
        rows, columns = self.grid(model, (height, width))
        return Geometry(
            depth=len(model.blocks),
            num_patches=rows * columns,
            num_prefix=model.num_prefix_tokens,
            has_cls=model.has_class_token,
            head="prefix" if model.attn_pool is None and model.global_pool == "token" else "tokens",
            input_size=(channels, height, width),
            fixed_size=False,
            rotary=model.rope is not None,
        )

    def patches_entering(self, model: Any, *, training: bool) -> int:
        return left_by_patch_drop(model, self.geometry(model).num_patches, training)

    def grid(self, model: Any, image_size: Sequence[int]) -> tuple[int, int]:
        rows, columns = model.embeds.dynamic_feat_size((image_size[0], image_size[1]))
        return int(rows), int(columns)

    def info(self, model: Any) -> ModelInfo:
        return replace(super().info(model), has_cls=model.has_class_token)

    def input_format(self, model: Any) -> InputFormat:
        return replace(super().input_format(model), size=_input_size(model))

    def resize(self, model: Any, size: int | tuple[int, int]) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        grid, embeds = self.grid(model, (height, width)), model.embeds
        check_whole_patches((height, width), grid, embeds.patch_size, embeds.dynamic_img_pad)
        model._traits["img_size"] = (height, width)  # What timm calls the nominal size.
        if (handle := vars(model).get("vitrim_handle")) is not None:
            handle.refresh()

    def describe(self, model: Any) -> Description:
        found = super().describe(model)
        # Positions are resampled for every image, so their own grid is apart from the size of the images.
        grid, (_, height, width) = model.embeds.pos_embed_grid_size, _input_size(model)
        positions = {"pos_embed_grid_size": list(grid)} if grid is not None else {}
        return replace(found, args={**found.args, **positions, "img_size": [height, width]})

    def trained_size(self, model: Any, state: State, trained_at: tuple[int, int] | None) -> None:
        return None

    def fit_weights(
        self,
        model: Any,
        state: State,
        trained_at: tuple[int, int] | None = None,
        *,
        resample_patches: bool = False,
    ) -> State:
        return converted(dict(state), model, checkpoint_filter_fn)

    def _patch_macs(self, model: Any) -> Macs:
        weight = model.embeds.proj.weight
        return Macs(self.geometry(model).num_patches * weight.numel())

    def _shape(self, block: Any, width: int) -> BlockShape:
        return super()._shape(block, width) if isinstance(block, EvaBlock) else TimmViT._shape(self, block, width)


def _input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model is made for; it takes others too."""
    channels, *size = get_model_input_config(model)["input_size"]
    given = getattr(model, "_traits", {}).get("img_size") or getattr(model, "_model_args", {}).get("img_size")
    height, width = to_2tuple(given or model.embeds.default_img_size or size)
    return int(channels), int(height), int(width)
