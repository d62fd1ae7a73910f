"""Towers of Hugging Face transformers, and models that hold one, with a reduction attached."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ....errors import VitrimError
from ...reduction.exchange import while_attached
from ...reduction.forward_pass import Call, finish
from ...reduction.reduced_model import ReducedModel
from .export import unmasked_in_export
from .heads import logits_of
from .layout import Layout
from .sizes import check_size, grid


class ReducedTransformer(ReducedModel):
    """What a tower and a model that holds one have in common."""

    vitrim_layout: ClassVar[Layout]
    vitrim_arguments: ClassVar[tuple[str, ...]]
    config: Any
    loss_function: Any

    def expected_patches(self, images: Any) -> int | None:
        if getattr(images, "ndim", 0) != 4:
            return None
        rows, columns = grid(self.vitrim_layout, self, images.shape[-2:])
        return self.vitrim_layout.entering(self.vitrim_layout.tower_of(self).config, rows * columns)

    def vitrim_open(self, images: Any, kwargs: dict[str, Any]) -> Any:
        """Open a call, unless it asks for what a reduced model cannot give."""
        check_size(self.vitrim_layout, self, images, bool(kwargs.get("interpolate_pos_encoding")))
        call = self.open_call(images)
        self.refuse_maps(kwargs, call.expected or self.vitrim_policy.geometry.num_patches)
        return call

    def refuse_maps(self, kwargs: Mapping[str, Any], *num_patches: int) -> None:
        """Raise `VitrimError` where attention maps are asked for and images of so many patches are cut."""
        asked = kwargs.get("output_attentions")
        wanted = asked or (asked is None and getattr(self.config, "output_attentions", False))
        if wanted and self.cuts(*num_patches):
            raise VitrimError(
                "output_attentions=True has no meaning where tokens are cut: the maps of the blocks differ in size "
                "and a block that cuts computes no whole map; leave it out, or call handle.remove() first"
            )

    def cuts(self, *num_patches: int) -> bool:
        """Whether anything is left out of images of so many patches."""
        mode = Call.mode(self.vitrim_policy, self.training)
        plans = [self.vitrim_policy.plan(number, mode) for number in set(num_patches)]
        return any(plan.cuts or plan.prefix_only for plan in plans)


class ReducedTower(ReducedTransformer):
    """A bare model with a reduction attached, or the tower inside one."""

    @while_attached
    @unmasked_in_export
    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        with self.vitrim_open(pixel_values, kwargs):
            out = super().forward(pixel_values, *args, **kwargs)
            finish(self.vitrim_policy, out[0])
            return out


class ReducedWhole(ReducedTransformer):
    """A model that holds a tower: where its head averages patch tokens, each counts as the patches behind it."""

    @while_attached
    @unmasked_in_export
    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self.vitrim_arguments, args, strict=False)), **kwargs}
        whole = self.vitrim_layout.whole(self)
        with self.vitrim_open(pixel_values, kwargs):
            if whole is None or whole.reads == "prefix" or not self.vitrim_policy.fuses:
                return super().forward(pixel_values, **kwargs)
            return self._weighed(pixel_values, getattr(self, whole.tower), **kwargs)

    def _weighed(
        self, images: Any, tower: Any, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        out = tower(images, **kwargs)
        logits = logits_of(self.vitrim_layout, self, out.last_hidden_state)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        result = ImageClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        whole = self.config.return_dict if return_dict is None else return_dict
        return result if whole else result.to_tuple()
