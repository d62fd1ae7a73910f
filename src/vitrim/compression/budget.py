"""What a budget counts, how much of it the given model needs, and how much of it no candidate saves."""

from collections.abc import Callable

import torch
from torch import nn

from ..elastic.chain import start_chain
from ..measure.cost import cost
from ..models import find_adapter
from .block_times import NANO
from .candidates import reducers
from .clock import LatencyPrice, table_for
from .goal import Goal
from .networks import Networks, Price, macs_price, params_price
from .request import Request


def price_for(
    model: nn.Module, request: Request, device: torch.device, say: Callable[[str], None]
) -> tuple[Price, float]:
    """What the budget counts, and how much of it the given model needs.

    Args:
        model: the given model, where the search runs.
        request: what is asked for.
        device: where times are measured.
        say: called with lines for the user.
    """
    given = cost(model)
    if request.goal.kind != "latency":
        return (params_price, given.params) if request.goal.kind == "params" else (macs_price, given.macs)
    has_cls = find_adapter(model).geometry(model).has_cls
    methods = reducers(has_cls) if "tokens" in request.using else []
    table = table_for(model, methods, batch_size=request.batch_size, device=device, dtype=request.dtype, say=say)
    return LatencyPrice(table), NANO * table.dense


def fixed_part(networks: Networks, price: Price, goal: Goal) -> float:
    """What of the price no candidate lowers: that of the model without its blocks."""
    if isinstance(price, LatencyPrice):
        return NANO * price.table.empty
    chain = start_chain(networks.original) if networks.supernet is None else networks.supernet.chain
    place = 1 if goal.kind == "params" else 0
    return (chain.macs, chain.params)[place] - sum(unit.saved(unit.width, 0)[place] for unit in chain.units.values())
