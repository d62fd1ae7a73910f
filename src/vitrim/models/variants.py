"""One model under several methods: for a while, or side by side on the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import VitrimError
from ..notation import render
from ..tokens import Constant, Reduction
from .copying import copied
from .finding import find_adapter
from .reduction.attach import attach
from .reduction.attached import attached
from .reduction.handle import Handle

OWN, DENSE, DENSE_CLS_ONLY = "own", "dense", "dense+cls_only"
"""Methods that are not reductions: what is attached already; the plain model; that with a last block for CLS only."""


def reads_prefix_only(model: nn.Module) -> bool:
    """Whether the head reads only prefix tokens, so that the last block need not compute patch tokens."""
    return find_adapter(model).geometry(model).head == "prefix"


def own_method(model: nn.Module) -> str:
    """The method that leaves the model as it is: "own" where something is attached, else "dense"."""
    return DENSE if attached(model) is None else OWN


def variant(model: nn.Module, method: str | None) -> nn.Module:
    """A copy of the model that shares its weights, in eval mode, under a method.

    Args:
        model: any model; for a reduction, one that an adapter supports.
        method: "own" (or None) keeps what is attached; "dense" removes it; "dense+cls_only" or a reduction such as
            `TopK() @ KeepRate(0.7)` replaces it. A reduction computes only prefix tokens in the last block where the
            head reads only those.

    Raises:
        VitrimError: the method has a curriculum, which only acts in training.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copied(model, memo).eval()
    put_under(other, method)
    return other


def put_under(model: nn.Module, method: str | None) -> None:
    """Put a model itself under a method, see `variant`."""
    if method in (None, OWN):
        return
    if (before := attached(model)) is not None:
        before.remove()
    if method == DENSE_CLS_ONLY:
        attach(model, None, cls_only=True)
    elif method != DENSE:
        reduction = Reduction.parse(method or "")
        if reduction.curriculum != Constant():
            raise VitrimError(f"{render(reduction.curriculum)} acts only in training; leave it out of {method!r}")
        attach(model, reduction, cls_only=reads_prefix_only(model))


@contextmanager
def attached_instead(
    model: nn.Module, reduction: Reduction | str | None, *, cls_only: bool = False
) -> Iterator[Handle]:
    """Within this context the reduction is attached in place of whatever is; that is attached again afterwards."""
    with detached(model), attach(model, reduction, cls_only=cls_only) as handle:
        yield handle


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """Within this context nothing is attached; what was attached before is attached again afterwards."""
    before = attached(model)
    if before is not None:
        before.remove()
    try:
        yield
    finally:
        if before is not None:
            before.install()
