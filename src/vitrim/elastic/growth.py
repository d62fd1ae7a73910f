"""How a chain grows: which units a network loses next.

The outer units of a sub-layer whose removal raises the loss least per MAC saved are removed first. Neighbouring groups
are merged so that the cost per MAC falls outwards. Growth ends at the saving that is asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from ..errors import VitrimError
from ..tokens.precision import exact
from .chain import Chain, Entry

Cut = tuple[str, int, float]
"""Sub-layer, its new width, and the rise of the loss that is expected from this step."""


def grow(chain: Chain, curves: Mapping[str, Tensor], saving: float) -> Chain:
    """The chain, longer until its smallest network saves the fraction `saving` of the full network's MACs.

    Args:
        chain: the chain so far; all its entries are kept.
        curves: per sub-layer of the smallest network the rise of the loss (width + 1,) when its leading 0, 1, ... units
            stay, see `importance.rise_curves`. A fall of the loss is allowed; such steps come first.
        saving: in [0, 1]; if all widths at 0 save less, the chain ends there.

    Raises:
        VitrimError: a curve of another length, or one that is not finite.
    """
    widths = chain.widths(-1)
    queue: list[tuple[float, list[Cut]]] = []
    for name, unit in chain.units.items():
        if (width := widths[name]) == 0:
            continue
        curve = exact(curves[name]).cpu()
        if len(curve) != width + 1:
            raise VitrimError(f"a curve of {len(curve)} values for the {width} units of {name}, not {width + 1}")
        if not curve.isfinite().all():
            raise VitrimError(f"the importance of {name} is not finite; check the weights of the model and the images")
        edges = list(pairwise([*range(0, width, unit.step), width]))
        cuts = [(name, low, (curve[low] - curve[high]).item()) for low, high in edges]
        macs = [unit.saved(high, low)[0] for low, high in edges]
        for density, members in _falling_outwards([cut[2] for cut in cuts], macs):
            queue.append((density, [cuts[index] for index in reversed(members)]))
    # Sorting is stable, and the groups of one sub-layer have different densities: outer ones always come first.
    queue.sort(key=lambda item: item[0])
    return _cut(chain, (cut for _, members in queue for cut in members), saving)


def grow_evenly(chain: Chain, saving: float) -> Chain:
    """The chain, longer until its smallest network saves the fraction `saving`; importance plays no role.

    All sub-layers lose outer units at the same rate, so that every width is about the same fraction of the full one.
    """
    widths = chain.widths(-1)
    cuts = [(name, low, 0.0) for name, unit in chain.units.items() for low in range(0, widths[name], unit.step)]
    cuts.sort(key=lambda cut: cut[1] / chain.units[cut[0]].width, reverse=True)
    return _cut(chain, cuts, saving)


def blend(start: Chain, one: Chain, other: Chain, part: float, saving: float) -> Chain:
    """A chain between two that make the same cuts in another order.

    Args:
        start: the chain before these cuts.
        one, other: chains that start with it and make all cuts down to width 0.
        part: how much of the other one, from 0 to 1: a cut comes when the blended number of MACs of the networks after
            it, in both chains, is reached.
        saving: at which the blended chain ends.
    """
    when: dict[tuple[str, int], float] = {}
    for chain, weight in ((one, 1 - part), (other, part)):
        for entry in chain.entries[len(start.entries) :]:
            key = (entry.module, entry.width)
            when[key] = when.get(key, 0.0) - weight * entry.macs
    rises = {(entry.module, entry.width): entry.importance for entry in one.entries}
    order = sorted(when, key=lambda key: when[key])
    return _cut(start, ((name, width, rises[name, width]) for name, width in order), saving)


def _cut(chain: Chain, cuts: Iterable[Cut], saving: float) -> Chain:
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
