"""Backbones of Hugging Face transformers: under reduction their feature maps have a value at every patch.

A backbone makes its maps from what each of its blocks gives. There, all patches are put back at their places: those
that are left as they are, merged ones as copies of their common token, dropped and fused ones as they were when they
left. Norms, reshaping and feature pyramids of the backbone follow, unchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....errors import VitrimError
from ...reduction.exchange import Reduced, while_attached
from ...reduction.forward_pass import CHANGED, Call
from ...reduction.policy import Policy
from ...reduction.reduced_model import ReducedModel
from .export import unmasked_in_export
from .layout import Layout, enter
from .reduced_models import ReducedTransformer


class BackboneCall(Call):
    """One call of a backbone. left: what its embeddings and each of its blocks gave."""

    left: Sequence[Tensor] = ()


class ReducedBackbone(ReducedTransformer):
    """A backbone with a reduction attached."""

    def open_call(self, images: Any, *, restorable: bool = False) -> BackboneCall:
        plain = super().open_call(images)
        return BackboneCall(plain.policy, self.training, plain.expected, plain.image_size, restorable=True)

    @while_attached
    @unmasked_in_export
    def forward(self, pixel_values: Any = None, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """As the foreign class; `hidden_states`, where they are asked for, are what each layer has left."""
        kwargs = {**dict(zip(self.vitrim_arguments, args, strict=False)), **kwargs}
        with self.vitrim_open(pixel_values, kwargs) as call:
            out = super(ReducedModel, self).forward(pixel_values, return_dict=True, **kwargs)  # Which opens no other.
        if (states := out.get("hidden_states")) is not None:
            pairs = zip(states, call.left, strict=True)
            out["hidden_states"] = tuple(None if whole is None else left for whole, left in pairs)
        structured = self.config.return_dict if return_dict is None else return_dict
        return out if structured else out.to_tuple()


class ReducedEncoder(Reduced):
    """The part of a backbone that runs its blocks."""

    @while_attached
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return with_all_patches(self.vitrim_policy, super().forward(*args, **kwargs))


def with_all_patches(policy: Policy, out: Any) -> Any:
    """What the blocks gave, with all patches in its `hidden_states` where a backbone runs them; else as it is."""
    call = Call.of(policy)
    if not isinstance(call, BackboneCall):
        return out
    trace = call.certain
    if trace is None or trace.block != policy.geometry.depth - 1:
        raise VitrimError(CHANGED)
    call.left = out.hidden_states
    embedded, *between = out.hidden_states
    out["hidden_states"] = (embedded, *(trace.left(block).restored(x) for block, x in enumerate(between)))
    return out


def enter_backbone(layout: Layout, name: str, blocks: str, **changes: Any) -> None:
    """Make the backbone of a family known, which has the parts of its tower.

    Args:
        layout: of the family.
        name: class of the backbone.
        blocks: class of the part of it that runs the blocks and returns what each gave.
        changes: where it is built in another way than the tower.
    """
    own: dict[str, Any] = {"others": {blocks: ReducedEncoder}, "tower_class": ReducedBackbone, **changes}
    enter(replace(layout, tower=name, wholes={}, dense={}, maps=True, **own))
