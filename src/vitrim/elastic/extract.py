"""From a budget to a network: find the largest entry of the chain that fits and slice it out of the super-network."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Real

import torch
from torch import Tensor, nn
from torch.utils import benchmark

from ..errors import VitrimError
from ..measure.cost import cost
from ..models import find_adapter, narrow
from .chain import Chain


def choose(
    model: nn.Module,
    chain: Chain,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    clock: Callable[[nn.Module], float] | None = None,
) -> int:
    """The largest network of the chain within one budget, by bisection.

    Args:
        model: the full network; only needed to measure latency.
        chain: its sub-networks.
        macs: most multiply-accumulates per image, attention products included.
        params: most parameters.
        latency: longest time of one forward pass, in milliseconds.
        clock: measures latency of a network in milliseconds; default: the median at batch size 1 where the model is.

    Any budget in (0, 1] is a fraction of what the full network costs.

    Raises:
        VitrimError: not exactly one budget, one that is not positive, or one that not even the smallest network meets.
    """
    budgets = {"macs": macs, "params": params, "latency": latency}
    given = {what: most for what, most in budgets.items() if most is not None}
    if len(given) != 1:
        raise VitrimError("give exactly one budget: macs=, params= or latency=, absolute or a fraction of the full")
    ((what, most),) = given.items()
    if not isinstance(most, Real) or not most > 0:
        raise VitrimError(f"{what} is a fraction in (0, 1] or a positive number, not {most!r}")
    if what != "latency":
        return chain.largest(what, most * getattr(chain, what) if most <= 1 else most)
    measure = cache(lambda index: (clock or milliseconds)(cut(model, chain, index)))
    limit = most * measure(0) if most <= 1 else most
    low, high = 0, len(chain) - 1
    if measure(high) > limit:
        raise VitrimError(
            f"no sub-network takes {limit:.3g} ms or less; the smallest takes {measure(high):.3g} ms, "
            f"the full one {measure(0):.3g} ms"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(middle) <= limit else (middle + 1, high)
    return high


def cut(model: nn.Module, chain: Chain, index: int, means: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Network `index` of the chain as a model of its own, of stock blocks and in eval mode; the super-network stays.

    Args:
        model: the super-network.
        chain: its sub-networks.
        index: which of them; negative counts from the smallest.
        means: mean of every input to each sub-layer's last projection; moves what the lost units add on average into
            its bias. None: no compensation.

    Raises:
        VitrimError: no such network, or the result does not cost what the chain says.
    """
    small = copy.deepcopy(model)
    narrow(small, chain.widths(index), means)
    found = cost(small)
    if (found.macs, found.params) != (chain.macs_at(index), chain.params_at(index)):
        raise VitrimError(
            f"network {index} costs {found.macs:,} MACs and {found.params:,} parameters, the chain says "
            f"{chain.macs_at(index):,} and {chain.params_at(index):,}; it was made for another model or input size"
        )
    return small.eval()


@torch.inference_mode()
def milliseconds(model: nn.Module, batch_size: int = 1) -> float:
    """Median time of one forward pass in eval mode on the device where the model is."""
    parameter = next(model.parameters())
    size = find_adapter(model).geometry(model).input_size
    images = torch.randn(batch_size, *size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    names = {"model": model.eval(), "images": images}
    timer = benchmark.Timer("model(images)", globals=names, num_threads=torch.get_num_threads())
    try:
        return timer.blocked_autorange(min_run_time=0.3).median * 1e3
    finally:
        model.train(training)
