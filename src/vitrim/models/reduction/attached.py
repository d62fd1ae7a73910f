"""Which reductions are attached to a model, and to the models inside it."""

from typing import TYPE_CHECKING

from torch import nn

from ...errors import VitrimError
from ..wrapped import check_is_model

if TYPE_CHECKING:
    from .handle import Handle


def attached(model: nn.Module) -> "Handle | None":
    """The handle of the reduction that is attached to this model, or to the one model inside it; None if there is none.

    Wrappers may be given as they are: DDP, FSDP, a compiled model, an EMA (`ModelEmaV3`, `AveragedModel`), a network
    of your own that holds a ViT.

    Raises:
        VitrimError: several models inside have one; give the one that is meant.
    """
    check_is_model(model)
    own = vars(model).get("vitrim_handle")
    if own is not None:
        return own
    handles = handles_inside(model)
    if len(handles) > 1:
        raise VitrimError(f"{len(handles)} models inside this {type(model).__name__} are reduced; give one of them")
    return handles[0] if handles else None


def handles_inside(model: nn.Module) -> "list[Handle]":
    """The handles of this model and of all models inside it, in the order of its modules."""
    check_is_model(model)
    found = (vars(module).get("vitrim_handle") for module in model.modules())
    return [handle for handle in found if handle is not None]
