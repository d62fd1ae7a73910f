"""Which reductions are attached to a model, and to the models inside it."""

from typing import TYPE_CHECKING

from torch import nn

from ...errors import VitrimError
from ..wrapped import check_is_model
from .exchange import Reduced

if TYPE_CHECKING:
    from .handle import Handle


def attached(model: nn.Module) -> "Handle | None":
    """The handle of the reduction that is attached to this model, or to the one model inside it; None if there is none.

    Wrappers may be given as they are: DDP, FSDP, a compiled model, an EMA (`ModelEmaV3`, `AveragedModel`), a network
    of your own that holds a ViT.

    Raises:
        VitrimError: several models inside have one, so give the one that is meant; or this is a part of a reduced
            model, such as the tower inside it.
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
    """The handles of this model and of all models inside it, in the order of its modules.

    Raises:
        VitrimError: this is a part of a reduced model.
    """
    check_is_model(model)
    modules = list(model.modules())
    handles: list[Handle] = [own for each in modules if (own := vars(each).get("vitrim_handle")) is not None]
    known = [handle.policy for handle in handles]
    for module in modules:
        # A part of a reduced model has its blocks, and no handle: it would pass for a model without a reduction.
        if isinstance(module, Reduced) and all(module.vitrim_policy is not policy for policy in known):
            raise VitrimError(
                f"a reduction is attached to the {module.vitrim_policy.owner} around this "
                f"{getattr(model, 'vitrim_foreign', type(model)).__name__}; use that, or call its handle.remove() first"
            )
    return handles
