"""What a sub-layer of a super-network costs at every width."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.rotary_pairs import PairRule, rule_from
from ..models.widths.sublayers import Elastic


@dataclass(frozen=True)
class UnitCost:
    """What one unit of width of a sub-layer costs, and how many units are cut at a time.

    macs, macs_linear_only, params: of a hidden unit, or of one dim of the heads; of their values where a rule says how
        many of these, and how many rotary pairs, stay at a width.
    fixed_macs, fixed_macs_linear_only: of what belongs to no unit and goes with the last one: queries and keys, where
        values alone are cut.
    rule: see `PairRule`. pair_macs, pair_macs_linear_only, pair_params: of one rotary pair.
    """

    width: int
    step: int
    macs: int
    macs_linear_only: int
    params: int
    left_params: int
    """Parameters that removal adds (a constant where there was no bias), minus those that belong to no unit."""
    fixed_macs: int = 0
    fixed_macs_linear_only: int = 0
    rule: PairRule | None = None
    pair_macs: int = 0
    pair_macs_linear_only: int = 0
    pair_params: int = 0

    def saved(self, width: int, narrower: int) -> tuple[int, int]:
        """MACs and parameters that are saved when `width` becomes `narrower`."""
        (lost, pairs), gone = self._lost(width, narrower), width > narrower == 0
        macs = lost * self.macs + pairs * self.pair_macs + gone * self.fixed_macs
        return macs, lost * self.params + pairs * self.pair_params - gone * self.left_params

    def saved_linear_only(self, width: int, narrower: int) -> int:
        """As the MACs of `saved`, without products of activations."""
        lost, pairs = self._lost(width, narrower)
        fixed = (width > narrower == 0) * self.fixed_macs_linear_only
        return lost * self.macs_linear_only + pairs * self.pair_macs_linear_only + fixed

    def without_rule(self) -> "UnitCost":
        """The same layer where no rule says how many pairs stay, so that they go with the last unit."""
        number = 0 if self.rule is None else self.rule.pairs[-1]
        return replace(
            self, rule=None, left_params=self.left_params - number * self.pair_params,
            fixed_macs=self.fixed_macs + number * self.pair_macs,
            fixed_macs_linear_only=self.fixed_macs_linear_only + number * self.pair_macs_linear_only,
            pair_macs=0, pair_macs_linear_only=0, pair_params=0,
        )  # fmt: skip

    def _lost(self, width: int, narrower: int) -> tuple[int, int]:
        """Units, and rotary pairs."""
        if self.rule is None:
            return width - narrower, 0
        values, pairs = self.rule.values, self.rule.pairs
        return values[width] - values[narrower], pairs[width] - pairs[narrower]


def unit_cost_of(layer: Elastic, tokens: int, step: int, norm: int) -> UnitCost:
    """What a sub-layer costs for one image.

    Args:
        layer: at its full width.
        tokens: of the image.
        step: units that are cut at a time.
        norm: parameters of the norm before it, which goes with it.
    """
    macs, fixed, left = layer.unit_macs(tokens), layer.fixed_macs(tokens), layer.left_params() - norm
    whole = UnitCost(
        layer.full_width, step, macs.total, macs.linear, layer.unit_params(), left, fixed.total, fixed.linear
    )
    if not isinstance(layer, ElasticValues) or layer.vitrim_rule is None:
        return whole
    pair, params, number = layer.pair_macs(tokens), layer.pair_params(), layer.pairs
    return replace(
        whole, rule=layer.vitrim_rule, left_params=left + number * params,
        fixed_macs=fixed.total - number * pair.total, fixed_macs_linear_only=fixed.linear - number * pair.linear,
        pair_macs=pair.total, pair_macs_linear_only=pair.linear, pair_params=params,
    )  # fmt: skip


def unit_cost_from(raw: Mapping[str, Any]) -> UnitCost:
    """What JSON holds.

    Raises:
        CheckpointError: the rule is none.
    """
    unit = UnitCost(**{**raw, "rule": rule_from(raw.get("rule"))})
    if unit.rule is not None and {len(unit.rule.values), len(unit.rule.pairs)} != {unit.width + 1}:
        raise CheckpointError("the rotary pairs of a layer do not fit it; stratify again")
    return unit
