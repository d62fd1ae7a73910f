"""From the last block of a model of Hugging Face transformers to its logits: the last norm, and the heads."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...reduction.exchange import Reduced
from ...reduction.forward_pass import trace_at_head
from ...reduction.padded import joined, unchanged_padded_trace_of
from ...reduction.trace import mark, trace_of
from .layout import Layout


def logits_of(layout: Layout, model: Any, final_BTC: Tensor) -> Tensor:
    """What the heads of a model give for final tokens; pooled tokens for a bare tower."""
    if (padded := unchanged_padded_trace_of(final_BTC)) is not None:
        return joined(padded.groups, [logits_of(layout, model, group.tokens) for group in padded.groups])
    whole, tower, size = layout.whole(model), layout.tower_of(model), None
    pool, reads = (layout.pool, layout.pool_reads) if whole is None else (whole.pool, whole.reads)
    if isinstance(model, Reduced) and reads == "tokens":
        trace = trace_at_head(model.vitrim_policy, final_BTC)
        size = None if trace is None else trace.size_BN
    pooled = pool(tower, final_BTC, layout.num_prefix(model), size)
    if whole is None:
        return pooled
    if len(whole.heads) == 1:
        return getattr(model, whole.heads[0])(pooled)
    return torch.stack([getattr(model, name)(final_BTC[:, at]) for at, name in enumerate(whole.heads)]).mean(0)


def normed(norm: nn.Module | None, last_BTC: Tensor) -> Tensor:
    """What the last norm, if there is one, makes of the tokens that the last block gave."""
    if norm is None:
        return last_BTC
    trace = trace_of(last_BTC)
    final = norm(last_BTC)
    if trace is not None:
        mark(final, replace(trace, normed=True))
    return final
