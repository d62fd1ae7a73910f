"""The chain of a super-network as data: nested sub-networks, each one sub-layer narrower than the one before."""

import hashlib
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnknownNameError, VitrimError
from ..measure.cost import cost
from ..models.own_code import check_no_own_methods
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.sublayers import Kind, elastic, sublayers
from .probing import check_counts
from .unit_cost import UnitCost, unit_cost_from, unit_cost_of

SCHEMA = 5
OLDEST = 3
"""Schemas that are read: 3 knows no fixed MACs, and 4 no rules of pairs, since there were none."""
GROUPS: dict[Kind, int] = {"attention": 8, "mlp": 32}


@dataclass(frozen=True)
class Entry:
    """One step of the chain: `module` gets `width`; MACs and parameters are those of the whole network after it.

    importance: of the units that are removed here: the rise of the loss that was expected.
    """

    module: str
    width: int
    macs: int
    params: int
    importance: float


@dataclass(frozen=True)
class Chain:
    """Network 0 is the full one, network k the full one after the first k entries; `len` counts them all.

    units: cost of a unit of each sub-layer. macs, macs_linear_only, params: cost of the full network.
    weights: hash of the weights that this chain belongs to, empty during training.
    """

    units: Mapping[str, UnitCost]
    macs: int
    macs_linear_only: int
    params: int
    entries: tuple[Entry, ...] = ()
    weights: str = ""
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        widths = {name: unit.width for name, unit in self.units.items()}
        macs, params = self.macs, self.params
        for index, entry in enumerate(self.entries):
            if type(entry.width) is not int or not 0 <= entry.width < widths.get(entry.module, 0):
                raise CheckpointError(f"entry {index} of the chain ({entry.module}) makes nothing narrower")
            saved = self.units[entry.module].saved(widths[entry.module], entry.width)
            macs, params = macs - saved[0], params - saved[1]
            if (entry.macs, entry.params) != (macs, params):
                raise CheckpointError(f"entry {index} of the chain ({entry.module}) does not cost what it says")
            widths[entry.module] = entry.width

    def __repr__(self) -> str:
        kinds = Counter(name.rpartition(".")[2] for name in self.units)
        sizes = f"{self.macs_at(-1):,} to {self.macs:,} MACs, {self.params_at(-1):,} to {self.params:,} parameters"
        return f"Chain({len(self)} networks of {sizes}; {', '.join(f'{n} {kind}' for kind, n in kinds.items())})"

    def __len__(self) -> int:
        return len(self.entries) + 1

    def position(self, index: int) -> int:
        """The index counted from the full network; negative indices count from the smallest.

        Raises:
            VitrimError: there is no such network.
        """
        if not isinstance(index, Integral) or not -len(self) <= index < len(self):
            raise VitrimError(f"there is no network {index!r}; the chain has {len(self)}, from 0 to {len(self) - 1}")
        return int(index) % len(self)

    def widths(self, index: int) -> dict[str, int]:
        """The width of every sub-layer in network `index` (negative: from the smallest)."""
        widths = {name: unit.width for name, unit in self.units.items()}
        for entry in self.entries[: self.position(index)]:
            widths[entry.module] = entry.width
        return widths

    def macs_at(self, index: int) -> int:
        """MACs of network `index`, attention products included."""
        place = self.position(index)
        return self.entries[place - 1].macs if place else self.macs

    def params_at(self, index: int) -> int:
        """Parameters of network `index`."""
        place = self.position(index)
        return self.entries[place - 1].params if place else self.params

    def macs_linear_only_at(self, index: int) -> int:
        """MACs of network `index` without products of activations, as some papers count."""
        lost = (unit.saved_linear_only(unit.width, now) for unit, now in self._both(index))
        return self.macs_linear_only - sum(lost)

    def largest(self, what: str, most: float) -> int:
        """The largest network with at most `most` of "macs" or "params".

        Raises:
            VitrimError: not even the smallest fits; names its cost.
        """
        values = [-getattr(self, f"{what}_at")(index) for index in range(len(self))]
        index = bisect_left(values, -most)
        if index == len(self):
            raise VitrimError(
                f"no sub-network has {what} <= {most:,.0f}; the smallest has {-values[-1]:,} "
                f"({values[-1] / values[0]:.3f} of the full network)"
            )
        return index

    def is_of_model(self, model_chain: "Chain") -> bool:
        """Whether both chains are of the same model at the same input size; groups and rules of pairs may differ."""
        return self._full() == model_chain._full()

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Chain":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: no chain, another schema, or entries that make nothing narrower.
        """
        try:
            raw = json.loads(text)
            if raw["schema"] > SCHEMA:
                raise CheckpointError(f"the chain has schema {raw['schema']}, this vitrim reads up to {SCHEMA}; update")
            if raw["schema"] < OLDEST:
                raise CheckpointError("this chain was written by an older version of vitrim; stratify again")
            raw["schema"] = SCHEMA
            units = {name: unit_cost_from(unit) for name, unit in raw["units"].items()}
            return cls(**raw | {"units": units, "entries": tuple(Entry(**entry) for entry in raw["entries"])})
        except CheckpointError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"this is not a chain of sub-networks: {error!r}") from None

    def _full(self) -> "Chain":
        units = {name: replace(unit.without_rule(), step=1) for name, unit in self.units.items()}
        return replace(self, units=units, entries=(), weights="")

    def _both(self, index: int) -> list[tuple[UnitCost, int]]:
        widths = self.widths(index)
        return [(unit, widths[name]) for name, unit in self.units.items()]


def start_chain(model: nn.Module, *, groups: Mapping[Kind, int] = GROUPS, width_multiple: int = 8) -> Chain:
    """The chain of the full network only.

    Args:
        model: without a reduction, at the input size for which costs are counted.
        groups: into how many groups the width of each kind of sub-layer is cut.
        width_multiple: every width except the full one is a multiple of it, which keeps matrix products fast.
    """
    if not isinstance(groups, Mapping):
        raise VitrimError(f"groups is a number for each kind of sub-layer, such as {dict(GROUPS)}, not {groups!r}")
    for kind in groups:
        if kind not in GROUPS:
            raise UnknownNameError("kind of sub-layer", kind, GROUPS)
    groups = {**GROUPS, **groups}
    check_counts(width_multiple=width_multiple, **{f"number of {kind} groups": each for kind, each in groups.items()})
    full = cost(model)
    parts, units = sublayers(model), {}
    with elastic(model) as layers:
        for part in parts:
            layer, norm = layers[part.name], model.get_submodule(part.norm)
            tokens, width = full.token_counts[0], layer.full_width
            step = -(-width // (groups[layer.kind] * width_multiple)) * width_multiple
            units[part.name] = unit_cost_of(layer, tokens, step, sum(each.numel() for each in norm.parameters()))
    check_no_own_methods(model)
    return Chain(units, full.macs, full.macs_linear_only, full.params)


def give_rules(model: nn.Module, chain: Chain) -> None:
    """Let the attention layers of a super-network keep the rotary pairs that its chain says.

    Raises:
        CheckpointError: the chain was made for another model.
    """
    with elastic(model) as layers:
        for name, unit in chain.units.items():
            layer = layers.get(name)
            if isinstance(layer, ElasticValues):
                if unit.rule is not None:
                    unit.rule.check(layer.value_heads, layer.full_width, layer.pairs)
                layer.vitrim_rule = unit.rule
            elif unit.rule is not None:
                raise CheckpointError(f"{name} has no rotary pairs; the chain was made for another model")


def hash_of(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of all weights and buffers that are saved."""
    return hash_tensors(model.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of these tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
