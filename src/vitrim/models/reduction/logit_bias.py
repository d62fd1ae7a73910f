"""What attention adds to its logits where tokens were removed: their sizes, and their relative positions."""

import torch
from torch import Tensor

from .trace import Trace


def logit_bias(
    relative_HTT: Tensor | None, trace: Trace, dtype: torch.dtype, queries: "Trace | int | None" = None
) -> Tensor | None:
    """What is added to the attention logits of the tokens of `trace`: log(size) of the keys, and their relative bias.

    queries: the tokens that attend: those of a later trace, the first so many, or all (None).
    """
    sizes = trace.bias(dtype)
    if relative_HTT is None:
        return sizes
    columns = _places(trace)
    rows = columns if queries is None or isinstance(queries, int) else _places(queries)
    if columns is None and rows is None:
        bias = relative_HTT.unsqueeze(0)
    else:
        every = torch.arange(relative_HTT.shape[1], device=relative_HTT.device).unsqueeze(0)
        rows, columns = (every if places is None else places for places in (rows, columns))
        rows = rows[:, :queries] if isinstance(queries, int) else rows
        bias = relative_HTT[:, rows.unsqueeze(2), columns.unsqueeze(1)].transpose(0, 1)
    bias = (bias[:, :, :queries] if isinstance(queries, int) else bias).to(dtype)
    return bias if sizes is None else bias + sizes


def _places(trace: Trace) -> Tensor | None:
    """Index (B, T) of every token, prefix included, among those at the start; None while all are there, in order."""
    place, first = trace.place_BN, trace.plan.num_prefix
    if place is None:
        return None
    prefix = torch.arange(first, device=place.device).expand(place.shape[0], -1)
    return torch.cat([prefix, place + first], dim=1)
