"""The vision tower of SigLIP 2 of Hugging Face transformers: images of any size, as patches, in padded batches.

Each image is reduced by the schedule for its own number of patches. Padding is left out, see `padded`.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ...errors import VitrimError
from ..macs import Macs
from ..reduction.exchange import Reduced, while_attached
from ..reduction.forward_pass import Call, finish
from ..reduction.padded import (
    Group,
    by_length,
    joined,
    lengths_of,
    padded_trace_of,
    together,
    unchanged_padded_trace_of,
    uncompiled,
)
from ..reduction.places import grid_places
from .hf.layout import Whole, enter, mean_of_patches, pair
from .hf.reduced_models import ReducedTower, ReducedWhole
from .hf_siglip import SIGLIP, ReducedPool

Shape = tuple[int, int]


class _ReducedTower(ReducedTower):
    @while_attached
    def forward(
        self,
        pixel_values: Any,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        shapes = _shapes(pixel_values, pixel_attention_mask, spatial_shapes)
        lengths = [rows * columns for rows, columns in shapes]
        self.refuse_maps(kwargs, *lengths)
        kwargs["return_dict"] = True
        if len(set(shapes)) == 1:  # Without padding there is nothing to mask.
            padded = pixel_attention_mask is not None and lengths[0] < pixel_values.shape[1]
            if self.cuts(lengths[0]) or not padded:
                out = self._pass(pixel_values[:, : lengths[0]], spatial_shapes, shapes[0], kwargs)
            else:
                out = self._dense(pixel_values, pixel_attention_mask, spatial_shapes, kwargs)
        elif self.cuts(*lengths, pixel_values.shape[1]):
            out = self._grouped(pixel_values, spatial_shapes, shapes, kwargs)
        else:
            out = self._dense(pixel_values, pixel_attention_mask, spatial_shapes, kwargs)
        whole = self.config.return_dict if return_dict is None else return_dict
        return out if whole else out.to_tuple()

    def _dense(self, patches: Tensor, mask: Tensor | None, spatial_shapes: Any, kwargs: dict[str, Any]) -> Any:
        with Call(self.vitrim_policy, self.training, patches.shape[1]):
            out = super(Reduced, self).forward(patches, mask, spatial_shapes, **kwargs)
            finish(self.vitrim_policy, out.last_hidden_state)
            return out

    def _pass(self, patches: Tensor, spatial_shapes: Any, shape: Shape | None, kwargs: dict[str, Any]) -> Any:
        """Images of one number of patches, without padding, and of one shape where it is given."""
        side = pair(self.config.patch_size)
        size = None if shape is None else (shape[0] * side[0], shape[1] * side[1])
        with Call(self.vitrim_policy, self.training, patches.shape[1], size):
            out = super(Reduced, self).forward(patches, None, spatial_shapes, **kwargs)
            finish(self.vitrim_policy, out.last_hidden_state)
            return out

    def _grouped(self, patches: Tensor, spatial_shapes: Tensor, shapes: Sequence[Shape], kwargs: dict[str, Any]) -> Any:
        groups: list[Group] = []
        parts: list[Any] = []
        for length, rows in by_length([one * two for one, two in shapes]).items():
            each = torch.stack([grid_places(*shapes[row], patches.device) for row in rows])
            groups.append(Group(rows, length, patches, each))
            parts.append(self._pass(groups[-1].part(patches), spatial_shapes[list(rows)], None, kwargs))

        final = together(groups, [part.last_hidden_state for part in parts], patches.shape[1])
        if (trace := padded_trace_of(final)) is not None:
            self.vitrim_policy.show(trace)
        pooled = None if parts[0].pooler_output is None else joined(groups, [part.pooler_output for part in parts])
        states = zip(*(part.hidden_states for part in parts), strict=True) if parts[0].hidden_states else ()
        states = tuple(together(groups, each, patches.shape[1]) for each in states) or None
        return type(parts[0])(last_hidden_state=final, pooler_output=pooled, hidden_states=states)


class _ReducedWhole(ReducedWhole):
    @while_attached
    def forward(
        self,
        pixel_values: Any = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Any = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        shapes = _shapes(pixel_values, pixel_attention_mask, spatial_shapes)
        if not self.cuts(*(rows * columns for rows, columns in shapes), pixel_values.shape[1]):
            return super(Reduced, self).forward(pixel_values, pixel_attention_mask, spatial_shapes, labels, **kwargs)
        given = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        return self._weighed(pixel_values, self.vision_model, labels, **given, **kwargs)


class _ReducedPool(ReducedPool):
    @while_attached
    def forward(self, hidden_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trace = unchanged_padded_trace_of(hidden_state)
        if trace is None:
            return super().forward(hidden_state, *args, **kwargs)
        return joined(trace.groups, [super(_ReducedPool, self).forward(group.tokens) for group in trace.groups])


@uncompiled
def _shapes(patches: Any, mask: Tensor | None, spatial_shapes: Any) -> list[Shape]:
    """Rows and columns of the patches of every image.

    Raises:
        VitrimError: they do not belong to the patches, or the mask leaves none of an image.
    """
    if getattr(patches, "ndim", 0) != 3 or spatial_shapes is None:
        raise VitrimError(
            "this model takes patches (B, N, channels of a patch), pixel_attention_mask and spatial_shapes, as its "
            "image processor makes them"
        )
    if torch.compiler.is_exporting():
        raise VitrimError(
            "a reduced SigLIP 2 looks at the sizes of the images that come, so it cannot be exported; export a model "
            "for one size (SiglipVisionModel, or a vit_*_siglip_* of timm)"
        )
    shapes = [(int(rows), int(columns)) for rows, columns in spatial_shapes.tolist()]
    lengths = [patches.shape[1]] * len(patches) if mask is None else lengths_of(mask)
    for at, ((rows, columns), length) in enumerate(zip(shapes, lengths, strict=True)):
        if rows * columns != length:
            raise VitrimError(
                f"image {at} of the batch has {rows} x {columns} patches by spatial_shapes, but {length} by its mask"
            )
    return shapes


def _inputs(tower: Any, images: Tensor) -> tuple[Tensor, None, Tensor]:
    """Patches, no mask, and their rows and columns, of images (B, channels, H, W)."""
    side = pair(tower.config.patch_size)
    rows, columns = images.shape[-2] // side[0], images.shape[-1] // side[1]
    cut = images[:, :, : rows * side[0], : columns * side[1]]
    patches = cut.unflatten(3, (columns, side[1])).unflatten(2, (rows, side[0])).permute(0, 2, 4, 3, 5, 1)
    # On the CPU, where looking at them waits for no accelerator.
    return patches.flatten(3).flatten(1, 2), None, torch.tensor([[rows, columns]]).expand(images.shape[0], -1)


def _own_size(config: Any) -> tuple[int, int]:
    side, (height, width) = isqrt(config.num_patches), pair(config.patch_size)
    return side * height, side * width


def _sized(patch: Any, size: Any) -> dict[str, int]:
    (height, width), side = pair(size), pair(patch)
    if height // side[0] != width // side[1]:
        raise VitrimError(f"the positions of SigLIP 2 make a square, not {height} x {width} px")
    return {"num_patches": (height // side[0]) ** 2}


enter(
    replace(
        SIGLIP,
        package="siglip2",
        prefix="Siglip2",
        tower="Siglip2VisionModel",
        wholes={"Siglip2ForImageClassification": Whole("vision_model", mean_of_patches, "tokens")},
        any_size=True,
        others={"Siglip2MultiheadAttentionPoolingHead": _ReducedPool},
        tower_class=_ReducedTower,
        whole_class=_ReducedWhole,
        inputs=_inputs,
        own_size=_own_size,
        sized=_sized,
        place_macs=lambda tower, patches: Macs(patches * tower.embeddings.position_embedding.weight.numel()),
        types=("siglip2_vision_model",),
    )
)
