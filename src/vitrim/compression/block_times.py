"""How long one block takes at several numbers of tokens and widths: measured once as a table, from which others follow.

The time of a candidate is that of the model without its blocks, and for each block that of its attention and of its MLP
at the tokens and the width that they have, and for each cut what choosing tokens costs. The table only proposes
candidates; whether they are fast enough is measured in interleaved rounds.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..measure.speed import DTYPES
from ..models import BlockWidths, attach, even_widths, find_adapter, rotary_blocks, set_widths, widths_of
from ..models.copying import copied
from ..models.evaluating import evaluating
from ..tokens import KeepRate, Plan, Reducer

TOKENS = (1.0, 0.8, 0.6, 0.4, 0.25, 0.1)
WIDTHS = (1.0, 0.75, 0.5, 0.25)
"""Fractions of the tokens and of the width at which a block is timed."""
ROUNDS, WARMUP = 5, 1
NANO = 1e6
"""Nanoseconds in a millisecond: prices are large numbers, since a budget up to 1 is a fraction."""


@dataclass
class BlockTimes:
    """Milliseconds of one batch.

    tokens: at which a block was timed, ascending. head_dims, hiddens: widths, ascending from 0, of heads the mean of
    what queries and values have, see `BlockWidths.dims`. attention, mlp: times (widths, tokens) of a half of a block.
    dense: of the whole model. empty: of the model without its blocks. cuts: of choosing among one token, by kind of
    reducer.
    """

    tokens: Sequence[int]
    head_dims: Sequence[float]
    hiddens: Sequence[int]
    attention: Sequence[Sequence[float]]
    mlp: Sequence[Sequence[float]]
    dense: float
    empty: float
    cuts: dict[str, float] = field(default_factory=dict)

    def predict(self, plan: Plan, widths: Sequence[BlockWidths], reducer: Reducer | None) -> float:
        """Milliseconds of one batch of a network of these widths under a plan."""
        full = [max(self.head_dims), max(self.hiddens)]
        count = plan.num_patches + plan.num_prefix
        whole = len(widths) * (self._half(self.attention, self.head_dims, full[0], count)
                               + self._half(self.mlp, self.hiddens, full[1], count))  # fmt: skip
        return self.empty + self._blocks(plan, widths, reducer) * (self.dense - self.empty) / whole

    def _blocks(self, plan: Plan, widths: Sequence[BlockWidths], reducer: Reducer | None) -> float:
        total, each = 0.0, self.cuts.get(kind_of(reducer), 0.0) if reducer is not None else 0.0
        for index, (entering, leaving, width) in enumerate(zip(plan.entering, plan.token_counts, widths, strict=True)):
            before, inside = plan.cut(index, "before"), plan.cut(index, "inside")
            total += each * sum(cut.num_in for cut in (before, inside) if cut is not None)
            now = entering if before is None else before.num_out + plan.num_prefix
            last = plan.prefix_only and index == plan.depth - 1
            skips = reducer is not None and inside is not None and reducer.drops_queries and not inside.returns
            queries = plan.num_prefix if last else leaving if skips else now
            # Half of attention's time goes with the queries: their projection, the one after, the rows of the products.
            attention = self._half(self.attention, self.head_dims, width.dims, now)
            total += attention * (0.5 + 0.5 * queries / now)
            total += self._half(self.mlp, self.hiddens, width.hidden, leaving)
        return total

    def _half(self, times: Sequence[Sequence[float]], widths: Sequence[float], width: float, tokens: int) -> float:
        """Linear between what was measured; in proportion to the tokens below the fewest."""
        if width == 0:
            return 0.0
        by_width = [float(np.interp(max(tokens, self.tokens[0]), self.tokens, row)) for row in times]
        share = min(1.0, tokens / self.tokens[0])
        return float(np.interp(width, widths, by_width)) * share


def kind_of(reducer: Reducer) -> str:
    """What the time of choosing tokens depends on."""
    parts = [type(reducer).__name__, reducer.needs, f"{reducer.extra_tokens} more tokens"]
    return ", ".join([*parts, "merges"] if reducer.merges else parts)


class Workbench:
    """Times models and single blocks on one device, in turns.

    Args:
        model: the given model, without a reduction.
        batch_size, device, dtype: for which times are measured.
        seed: of the order within rounds.

    Raises:
        UnsupportedModelError: the halves of its blocks cannot be timed apart.
    """

    def __init__(self, model: nn.Module, batch_size: int, device: torch.device, dtype: str, seed: int = 0) -> None:
        self.model = copied(model).to(device, DTYPES[dtype]).eval()
        self.adapter = find_adapter(model)
        self.geometry = self.adapter.geometry(model)
        if self.adapter.keeps_attention(model) or self.geometry.relative:
            why = "reads the places of all tokens" if self.geometry.relative else "always stays"
            raise UnsupportedModelError(
                f"blocks of this {type(model).__name__} cannot be timed by halves, since their attention {why}; give "
                "macs= or params= in place of a latency"
            )
        self.batch_size, self.device, self.dtype, self.dice = batch_size, device, DTYPES[dtype], random.Random(seed)
        images = torch.randn(batch_size, *self.geometry.input_size, device=device, dtype=self.dtype)
        self.inputs = self.adapter.inputs(model, images)

    @torch.inference_mode()
    def measure(self, tick: Callable[[int, int], None] = lambda done, total: None) -> BlockTimes:
        """The table, without what cuts cost.

        Raises:
            UnsupportedModelError: widths of this model cannot change, or its blocks take more than tokens.
        """
        full = widths_of(self.model)[0]
        # Where values alone are cut, most of the time of a narrow layer is that of its queries and keys.
        least = () if all(rotary_blocks(self.model).values()) else (1,)
        head_dims = [0, *sorted({*least, *_fractions(full.values, 1)})]
        mean_dims = [0, *(even_widths(self.model, dim, 0)[0].dims for dim in head_dims[1:])]
        hiddens = [0, *_fractions(full.hidden, 1)]
        width, call = self._call_of_a_block()
        count = self.geometry.num_patches + self.geometry.num_prefix
        tokens = _fractions(count, self.geometry.num_prefix + 1, TOKENS)
        pairs = [*((dim, 0) for dim in head_dims), *((0, hidden) for hidden in hiddens[1:])]
        halves = {pair: self._narrowed(*pair) for pair in pairs}
        found: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        for done, number in enumerate(tokens):
            x = torch.randn(self.batch_size, number, width, device=self.device, dtype=self.dtype)
            times = self.times({pair: lambda block=block, x=x: call(block, x) for pair, block in halves.items()})
            for pair, spent in times.items():
                found[pair].append(spent)
            tick(done + 1, len(tokens) + 1)
        nothing = np.array(found[0, 0])

        def rows(chosen: Sequence[tuple[int, int]]) -> list[list[float]]:
            return [np.maximum(np.array(found[pair]) - nothing, 0.0).tolist() for pair in chosen]

        empty = copied(self.model)
        set_widths(empty, even_widths(empty, 0, 0))
        whole = self.times({"dense": lambda: self.model(*self.inputs), "empty": lambda: empty(*self.inputs)})
        return BlockTimes(
            tokens, mean_dims, hiddens, rows([(dim, 0) for dim in head_dims]), rows([(0, h) for h in hiddens]),
            whole["dense"], whole["empty"],
        )  # fmt: skip

    @torch.inference_mode()
    def measure_cut(self, table: BlockTimes, reducer: Reducer) -> None:
        """Add to the table what choosing tokens by this kind of reducer costs."""
        if (kind := kind_of(reducer)) in table.cuts:
            return
        # In every block, since what a few cuts cost is less than the noise of a whole forward pass.
        reduced = copied(self.model)
        handle = attach(reduced, reducer, KeepRate(0.95, at=tuple(range(self.geometry.depth))))
        plan = handle.plan()
        times = self.times({"dense": lambda: self.model(*self.inputs), "reduced": lambda: reduced(*self.inputs)})
        expected = table.predict(plan, widths_of(self.model), reducer)
        surplus = times["reduced"] * table.dense / times["dense"] - expected
        table.cuts[kind] = max(0.0, surplus) / max(1, sum(cut.num_in for cut in plan.cuts))

    def times(self, calls: Mapping[Any, Callable[[], Any]], rounds: int = ROUNDS) -> dict[Any, float]:
        """Lower quartile of the milliseconds of each call over interleaved rounds."""
        clock = torch.utils.benchmark.timer
        found: dict[Any, list[float]] = {name: [] for name in calls}
        order = list(calls)
        with evaluating(self.model):
            for number in range(WARMUP + rounds):
                self.dice.shuffle(order)
                for name in order:
                    start = clock()
                    calls[name]()
                    if number >= WARMUP:
                        found[name].append(1e3 * (clock() - start))
        # The least disturbed rounds: other programs only ever add time.
        return {name: float(np.quantile(spent, 0.25)) for name, spent in found.items()}

    def _narrowed(self, head_dim: int, hidden: int) -> nn.Module:
        model = copied(self.model)
        set_widths(model, even_widths(model, head_dim, hidden))
        return self.adapter.blocks(model)[0]

    def _call_of_a_block(self) -> tuple[int, Callable[[nn.Module, Tensor], Any]]:
        """Channels of the tokens, and how a first block is called: with rotary positions of as many as there are."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        block = self.adapter.blocks(self.model)[0]
        hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        try:
            self.model(*self.inputs)
        finally:
            hook.remove()
        (tokens, *args), kwargs = seen[0]
        name = getattr(self.adapter.reduced_class(block), "rotary_argument", "")
        table = kwargs.pop(name, None)
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                f"blocks of this {type(self.model).__name__} take more than tokens, so that they cannot be timed "
                "alone; give a budget of macs= instead"
            )

        def call(block: nn.Module, x: Tensor) -> Any:
            rotary = {} if table is None else {name: _first_rows(table, x.shape[1] - self.geometry.num_prefix)}
            return block(x, *args, **kwargs, **rotary)

        return int(tokens.shape[-1]), call


def _first_rows(table: Any, patches: int) -> Any:
    """A rotary table (..., N, E), or several, for fewer patches."""
    return tuple(_first_rows(part, patches) for part in table) if isinstance(table, tuple) else table[..., :patches, :]


def _fractions(full: int, least: int, parts: Sequence[float] = WIDTHS) -> list[int]:
    """These fractions of a number, ascending."""
    return sorted({max(least, round(part * full)) for part in parts})
