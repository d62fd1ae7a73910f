"""The same network in timm and in Hugging Face transformers: built anew in the other library, with its weights."""

from contextlib import suppress
from typing import Any, Literal

from torch import nn

from ....errors import UnsupportedModelError, VitrimError
from ...finding import find_adapter
from ...reduction.attached import attached
from ...widths.block_widths import BlockWidths, widths_of
from .conversion_check import check_same
from .images import library
from .layout import layout_of
from .to_timm import to_timm
from .to_transformers import to_transformers

Library = Literal["timm", "transformers"]


def convert(model: nn.Module, to: Library) -> nn.Module:
    """A new model of the other library that gives the same: ViT, DINOv2 (registers or not), DINOv3, CLIP, SigLIP.

    All weights of the model are in the new one, and both were compared on a batch of noise in float32. What acts in
    training alone (dropout, stochastic depth, jitter of positions) is not carried over.

    Args:
        model: of timm or transformers, without a reduction; it stays as it is. In timm, ViT and CLIP may have a head
            (the classifier, or the projection); the others must have none (`model.reset_classifier(0)`).
        to: "timm" or "transformers".

    Raises:
        UnsupportedModelError: the other library builds no such network, as none whose blocks were cut unevenly.
        VitrimError: a reduction is attached, or the model gives values that are not finite.
    """
    if to not in ("timm", "transformers"):
        raise VitrimError(f"a model is converted to 'timm' or 'transformers', not to {to!r}")
    if attached(model) is not None:
        raise VitrimError("a reduction is attached to this model; call handle.remove(), and attach to the new one")
    find_adapter(model)
    library()
    layout = layout_of(model)
    if (layout is None) == (to == "timm"):
        raise UnsupportedModelError(f"a {type(model).__name__} cannot be converted to {to}")
    _refuse_uneven(model)
    new = to_transformers(model) if layout is None else to_timm(layout, model)
    check_same(model, new)
    return new.to(next(model.parameters())).train(model.training)


def _refuse_uneven(model: nn.Module) -> None:
    adapter, widths = find_adapter(model), set[BlockWidths]()
    with suppress(UnsupportedModelError):  # Blocks of a kind that is never cut.
        widths = set(widths_of(model))
    if not widths:
        return
    block, (first, *more) = adapter.blocks(model)[0], widths
    attn: Any = getattr(block, next(iter(adapter.branches_of(model))))
    heads = getattr(attn, "num_heads", getattr(attn, "num_attention_heads", 0))
    cut = first.value_dim is not None or first.query_dim is not None
    if more or cut or first.head_dim * heads != adapter.info(model).width:
        raise UnsupportedModelError(
            f"the widths of this {type(model).__name__} were cut, and the other library builds no such blocks; convert "
            "the model before it is cut"
        )
