"""How a chain grows: which units a network loses next.

As in PIAD (SKD), the outer units of a sub-layer with the lowest importance per MAC are removed first. Neighbouring
groups are merged so that importance per MAC falls outwards. Growth ends at the saving that is asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor

from ..errors import VitrimError
from ..tokens.precision import exact
from .chain import Chain, Entry


def grow(
    chain: Chain, shares: Mapping[str, Tensor], sensitivity: Mapping[str, float], saving: float, floor: float = 1e-6
) -> Chain:
    """The chain, longer until its smallest network saves the fraction `saving` of the full network's MACs.

    Args:
        chain: the chain so far; all its entries are kept.
        shares: per sub-layer what each of its remaining units contributes, in the order of the units; scaled to sum 1.
        sensitivity: relative rise of the loss when a sub-layer is removed from the smallest network. Sub-layers where
            it is not positive go first.
        saving: in [0, 1); if all widths at 0 save less, the chain ends there.
        floor: smaller sensitivities are raised to this.

    Raises:
        VitrimError: a sub-layer with another number of shares, or numbers that are not finite.
    """
    widths = chain.widths(-1)
    queue: list[tuple[bool, float, list[tuple[str, int, float]]]] = []
    for name, unit in chain.units.items():
        if widths[name] == 0:
            continue
        rise, share = sensitivity[name], exact(shares[name]).cpu()
        if len(share) != widths[name]:
            raise VitrimError(f"{len(share)} shares for the {widths[name]} units of {name}")
        if not (isfinite(rise) and share.isfinite().all()):
            raise VitrimError(f"the importance of {name} is not finite; check the weights of the model and the images")
        value = max(rise, floor) * share / share.sum().clamp_min(torch.finfo(torch.float64).tiny)
        edges = list(pairwise([*range(0, widths[name], unit.step), widths[name]]))
        cuts = [(name, low, value[low:high].sum().item()) for low, high in edges]
        macs = [(high - low) * unit.macs for low, high in edges]
        for density, members in _falling_outwards([cut[2] for cut in cuts], macs):
            queue.append((rise > floor, density, [cuts[index] for index in reversed(members)]))
    # Sorting is stable, and the groups of one sub-layer have different densities: outer ones always come first.
    queue.sort(key=lambda item: item[:2])
    return _cut(chain, (cut for *_, members in queue for cut in members), saving)


def grow_evenly(chain: Chain, saving: float) -> Chain:
    """The chain, longer until its smallest network saves the fraction `saving`; importance plays no role.

    All sub-layers lose outer units at the same rate, so that every width is about the same fraction of the full one.
    """
    widths = chain.widths(-1)
    cuts = [(name, low, 0.0) for name, unit in chain.units.items() for low in range(0, widths[name], unit.step)]
    cuts.sort(key=lambda cut: cut[1] / chain.units[cut[0]].width, reverse=True)
    return _cut(chain, cuts, saving)


def _cut(chain: Chain, cuts: Iterable[tuple[str, int, float]], saving: float) -> Chain:
    """The chain with these cuts (sub-layer, new width, importance) added until the saving is reached."""
    widths, entries = chain.widths(-1), list(chain.entries)
    macs, params, goal = chain.macs_at(-1), chain.params_at(-1), chain.macs * (1 - saving)
    for name, width, importance in cuts:
        if macs <= goal:
            break
        saved = chain.units[name].saved(widths[name], width)
        macs, params = macs - saved[0], params - saved[1]
        entries.append(Entry(name, width, macs, params, importance))
        widths[name] = width
    return replace(chain, entries=tuple(entries))


def _falling_outwards(importance: list[float], macs: list[int]) -> list[tuple[float, list[int]]]:
    """Merge neighbours (inner first) until importance per MAC falls from each merged group to the next outer one."""
    merged: list[tuple[float, int, list[int]]] = []
    for index, new in enumerate(zip(importance, macs, strict=True)):
        value, size, members = *new, [index]
        while merged and value / size >= merged[-1][0] / merged[-1][1]:
            inner = merged.pop()
            value, size, members = value + inner[0], size + inner[1], inner[2] + members
        merged.append((value, size, members))
    return [(value / size, members) for value, size, members in merged]
