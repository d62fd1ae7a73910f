"""Where the input patches of a forward pass lie on their image, and which pass tokens come from."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError, VitrimError
from ...tokens import TokenState
from ..adapter import Adapter
from .padded import PaddedTrace, unchanged_padded_trace_of
from .trace import Trace, unchanged_trace_of


def grid_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column of every patch of an image, (rows * columns, 2), row by row."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def trace_behind(tokens: Tensor) -> Trace | PaddedTrace:
    """The trace that these tokens carry; `VitrimError` if they carry none."""
    trace = unchanged_trace_of(tokens) or unchanged_padded_trace_of(tokens)
    if trace is None:
        raise VitrimError(
            "it is not known from which forward pass these tokens come; give the tensor that the model returned, as it "
            "is (no slice, cast or copy of it, and nothing written into it), prefix tokens included"
        )
    return trace


def state_after(adapter: Adapter, model: nn.Module, trace: Trace | PaddedTrace, block: int) -> TokenState:
    """Where the input patches are after `block`, with their coordinates where these are known."""
    state = trace.state(block)
    if isinstance(trace, PaddedTrace):
        return state
    return replace(state, coordinates=_coordinates(adapter, model, trace))


def _coordinates(adapter: Adapter, model: nn.Module, trace: Trace) -> Tensor | None:
    size, geometry = trace.image_size, adapter.geometry(model)
    if size is None and geometry.fixed_size:  # Blocks that were called one by one.
        size = geometry.input_size[1:]
    if size is None:
        return None
    try:
        rows, columns = adapter.grid(model, size)
    except UnsupportedModelError:
        return None
    if rows * columns != trace.plan.num_patches:  # Some were dropped before the first block.
        return None
    return grid_places(rows, columns, trace.device).unsqueeze(0)
