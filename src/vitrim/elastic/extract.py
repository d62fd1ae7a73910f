"""From a budget to a network: find the largest network of the chain that fits, and slice it out."""

from collections.abc import Mapping

from torch import nn

from ..budgets import check_budget
from ..errors import VitrimError
from ..measure.cost import cost
from ..models import narrow
from ..models.copying import copied
from ..models.widths.compensation import Compensation
from .chain import Chain
from .latency import Clock, fastest_enough


def choose(
    model: nn.Module,
    chain: Chain,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    clock: Clock | None = None,
) -> int:
    """The largest network of the chain within one budget, by bisection.

    Args:
        model: the full network; only needed to measure latency.
        chain: its sub-networks.
        macs: most multiply-accumulates per image, attention products included.
        params: most parameters.
        latency: longest time of one forward pass, in milliseconds; write "0.5ms" for half of one.
        clock: measures latency; default: at batch size 1 on the device of the model, see `latency.milliseconds`.

    Any number in (0, 1] is a fraction of what the full network costs.

    Raises:
        VitrimError: not exactly one budget, one that is not positive, or one that not even the smallest network meets.
    """
    given = {what: most for what, most in {"macs": macs, "params": params}.items() if most is not None}
    if len(given) + (latency is not None) != 1:
        raise VitrimError("give exactly one budget: macs=, params= or latency=, absolute or a fraction of the full")
    if latency is not None:
        return fastest_enough(latency, model, lambda index: cut(model, chain, index), len(chain), clock)
    ((what, most),) = given.items()
    check_budget(what, most)
    return chain.largest(what, most * getattr(chain, what) if most <= 1 else most)


def cut(
    model: nn.Module, chain: Chain, index: int, compensations: Mapping[str, Compensation] | None = None
) -> nn.Module:
    """Network `index` of the chain as an independent model in eval mode; the super-network is not changed.

    Args:
        model: the super-network.
        chain: its sub-networks.
        index: which of them; negative counts from the smallest.
        compensations: per sub-layer what makes up for its removed units; None: nothing.

    Raises:
        VitrimError: no such network, or the result does not cost what the chain says.
    """
    small = copied(model)
    narrow(small, chain.widths(index), compensations)
    found = cost(small)
    if (found.macs, found.params) != (chain.macs_at(index), chain.params_at(index)):
        raise VitrimError(
            f"network {index} costs {found.macs:,} MACs and {found.params:,} parameters, the chain says "
            f"{chain.macs_at(index):,} and {chain.params_at(index):,}; it was made for another model or input size"
        )
    return small.eval()
