"""The forward pass of a block with a cut, shared by all families.

A family supplies the steps (`block_steps.py`); everything that decides which work can be left out is here:
- a block without a cut runs its own, original forward pass;
- where tokens are dropped, their queries, attention rows and output projection are never computed;
- where the head reads only prefix tokens, the last block computes only those;
- rotary tables and relative biases, which are made for all tokens, follow the tokens that are left.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ScoreError, VitrimError
from ...tokens import Assignment, Evidence, take
from ...tokens.recording import recording
from ...tokens.scores import Needs
from ..macs import needed, skips_queries
from .block_steps import BlockSteps
from .exchange import observed, while_attached
from .forward_pass import arrive, leave, recomputing
from .logit_bias import logit_bias
from .trace import Trace

_SLICE_BYTES = 8 * 2**20
"""Hidden activations per thread, about the size of a core's share of the caches."""


class ReducedBlock(BlockSteps):
    """Mixin placed before a family's own block class; overrides only `forward`."""

    @while_attached
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The block on tokens (B, T, C); returns (B, T', C) with T' as the plan says."""
        policy, index, name = self.vitrim_policy, self.vitrim_index, self.rotary_argument or self.bias_argument
        if name and args:
            args, kwargs = args[1:], {**kwargs, name: args[0]}
        others = (*args, *(value for key, value in kwargs.items() if key != name))
        masks = (kwargs.get(self.mask_argument),) if self.mask_argument else others
        trace = arrive(policy, index, x, self.training)
        if index == trace.plan.reinstate:
            x, trace = trace.reinstate(x)
        changes = self._changes(trace)
        if trace.assignments or changes:
            _refuse_mask(masks)
        if not changes:
            return leave(policy, index, self._unchanged(x, trace, _masked(masks), args, kwargs), trace)
        self.check_own("forward", f"block {index}")
        table = kwargs.get(name) if self.rotary_argument else None
        relative = self.position_bias(kwargs.get(name)) if self.bias_argument and self.attends else None
        x, trace = self._cut_before(x, trace, table, relative)
        x, trace = self._attend_and_cut(x, trace, table, relative)
        return leave(policy, index, self._in_parts(self.feed_forward, x), trace)

    def _changes(self, trace: Trace) -> bool:
        """Whether the block's own forward pass would not give what the plan and the tokens that are left ask for."""
        plan, index = trace.plan, self.vitrim_index
        cut = plan.cut(index, "before") or plan.cut(index, "inside")
        moved = bool(self.bias_argument) and trace.place_BN is not None
        return cut is not None or self._prefix_only(trace) or moved or trace.biased

    def _prefix_only(self, trace: Trace) -> bool:
        return trace.plan.prefix_only and self.vitrim_index == trace.plan.depth - 1

    def _unchanged(
        self, x: Tensor, trace: Trace, masked: bool, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor:
        """The block's own forward pass."""
        whole = super().forward
        if (table := kwargs.get(self.rotary_argument)) is not None:
            return whole(x, *args, **{**kwargs, self.rotary_argument: self._rows(table, trace)})
        if trace.plan.cuts and not masked:
            return self._in_parts(lambda part: whole(part, *args, **kwargs), x)
        return whole(x, *args, **kwargs)

    def _cut_before(self, x: Tensor, trace: Trace, table: Any, relative: Tensor | None) -> tuple[Tensor, Trace]:
        """The cut before the block, if there is one."""
        cut, reducer = trace.plan.cut(self.vitrim_index, "before"), trace.reducer
        if cut is None or reducer is None:
            return x, trace
        needs = self._needs(needed(reducer, cut))
        normed = x if needs in ("nothing", "hidden") else self.norm_tokens(x)
        evidence = self._evidence_by_parts(x, normed, trace, relative, needs, self._rows(table, trace))
        return self._carry_out(reducer.assign(evidence, cut.keep), x, trace)

    def _attend_and_cut(self, x: Tensor, trace: Trace, table: Any, relative: Tensor | None) -> tuple[Tensor, Trace]:
        """The attention half of the block, residual included, with the cut inside it, if there is one."""
        cut, reducer = trace.plan.cut(self.vitrim_index, "inside"), trace.reducer
        normed, rows = self.norm_tokens(x), self._rows(table, trace)
        whole = self.attend_whole(normed, trace.bias(x.dtype), rows) if self.attention_is_intercepted() else None
        if whole is not None:
            return self._cut_whole(x, normed, whole, trace, relative, rows)
        if self._prefix_only(trace):
            return self._attend_by_prefix(x, normed, trace, relative, rows), trace
        if cut is not None and reducer is not None and skips_queries(reducer, cut):
            key, value = self._streams(normed, 1, 3, rows)
            evidence = self._evidence_of_keys(x, normed, key, trace, relative, self._needs(needed(reducer, cut)))
            return self._attend_by_kept(
                x, normed, (key, value), reducer.assign(evidence, cut.keep), trace, table, relative
            )
        query, key, value = self._streams(normed, 0, 3, rows)
        bias = logit_bias(relative, trace, x.dtype)
        x = x + self.attend(query, key, value, bias, normed)
        if cut is None or reducer is None:
            return x, trace
        self._needs(needed(reducer, cut))
        evidence = self._evidence(x, trace, query, key, bias)
        return self._carry_out(reducer.assign(evidence, cut.keep), x, trace)

    def _attend_by_prefix(self, x: Tensor, normed: Tensor, trace: Trace, relative: Tensor | None, rows: Any) -> Tensor:
        """The prefix tokens after attention, whose queries alone are computed."""
        first = trace.plan.num_prefix
        key, value = self._streams(normed, 1, 3, rows)
        (query,) = self._streams(normed[:, :first], 0, 1)
        bias = logit_bias(relative, trace, x.dtype, first)
        return x[:, :first] + self.attend(query, key, value, bias, normed[:, :first])

    def _attend_by_kept(
        self, x: Tensor, normed: Tensor, keys_values: tuple[Tensor, Tensor], assignment: Assignment, trace: Trace,
        table: Any, relative: Tensor | None,
    ) -> tuple[Tensor, Trace]:  # fmt: skip
        """The tokens that are kept after attention: the queries of those that are dropped are never computed."""
        entered, trace = trace, trace.then(self.vitrim_index, assignment, x, trace.size_after(assignment))
        kept = assignment.rows(trace.plan.num_prefix)
        x, normed = take(x, kept), take(normed, kept)
        (query,) = self._streams(normed, 0, 1, self._rows(table, trace))
        bias = logit_bias(relative, entered, x.dtype, trace)
        return x + self.attend(query, *keys_values, bias, normed), trace

    def _cut_whole(
        self, x: Tensor, normed: Tensor, whole: Tensor, trace: Trace, relative: Tensor | None, rows: Any
    ) -> tuple[Tensor, Trace]:
        """The same where attention was computed for all tokens by one call: the cut saves no attention."""
        plan, index, reducer = trace.plan, self.vitrim_index, trace.reducer
        inside = plan.cut(index, "inside")
        if self._prefix_only(trace):
            return x[:, : plan.num_prefix] + whole[:, : plan.num_prefix], trace
        if inside is None or reducer is None:
            return x + whole, trace
        needs = self._needs(needed(reducer, inside))
        if skips_queries(reducer, inside):  # Which decides on the tokens before attention.
            evidence = self._evidence_by_parts(x, normed, trace, relative, needs, rows)
            assignment = reducer.assign(evidence, inside.keep)
            kept = assignment.rows(plan.num_prefix)
            return take(x, kept) + take(whole, kept), trace.then(index, assignment, x, trace.size_after(assignment))
        x = x + whole
        evidence = self._evidence_by_parts(x, normed, trace, relative, needs, rows)
        return self._carry_out(reducer.assign(evidence, inside.keep), x, trace)

    def _rows(self, table: Any, trace: Trace) -> Any:
        """The rotary table of the patch tokens that are left."""
        return table if table is None or trace.place_BN is None else self.rows_of_table(table, trace.place_BN)

    def _streams(self, normed_BTC: Tensor, first: int, last: int, table: Any = None) -> tuple[Tensor, ...]:
        """As `project`, with queries and keys rotated; without a table for tokens that no rotation acts on."""
        streams = self.project(normed_BTC, first, last)
        if table is None or not self.attends:
            return streams
        return tuple(self.rotate(s, table) if at < 2 else s for at, s in enumerate(streams, first))

    def _needs(self, needs: Needs) -> Needs:
        if not self.attends and needs not in ("nothing", "hidden"):
            raise ScoreError(
                f"the attention of block {self.vitrim_index} was removed, so it gives no {needs} to choose tokens by; "
                "cut at another block or use TopK(score='norm')"
            )
        return needs

    def _carry_out(self, assignment: Assignment, x: Tensor, trace: Trace) -> tuple[Tensor, Trace]:
        size, first = trace.size_after(assignment), trace.plan.num_prefix
        out = assignment.apply(x, trace.size_BN, first, size)
        gradients = self.vitrim_policy.gradients
        if gradients is not None and not recomputing():  # Note the gradient that will reach the tokens kept here.
            gradients.watch(self.vitrim_index, out, first, first + assignment.kept_BK.shape[1])
        return out, trace.then(self.vitrim_index, assignment, x, size)

    def _evidence(
        self,
        x: Tensor,
        trace: Trace,
        query: Tensor | None = None,
        key: Tensor | None = None,
        bias: Tensor | None = None,
        cls_query: Tensor | None = None,
    ) -> Evidence:
        query, key = (None if one is None else self.scored(one) for one in (query, key))
        if cls_query is None and query is not None:
            cls_query = query[:, :, :1]
        return Evidence(
            num_prefix=trace.plan.num_prefix,
            block=self.vitrim_index,
            training=trace.training,
            scale=self.head_scale,
            hidden_BTC=x,
            cls_query_BH1D=cls_query,
            query_BHTD=query,
            key_BHTD=key,
            bias_BHTT=bias,
            previous_BN=trace.score_BN,
            gradient_C=None if trace.gradients is None else trace.gradients.get(self.vitrim_index),
        )

    def _evidence_by_parts(
        self, x: Tensor, normed: Tensor, trace: Trace, relative: Tensor | None, needs: Needs, rows: Any
    ) -> Evidence:
        """Evidence for a cut apart from attention: the queries and keys that it needs, of the normed tokens."""
        if needs in ("nothing", "hidden"):
            return self._evidence(x, trace)
        if needs == "attention":
            query, key = self._streams(normed, 0, 2, rows)
            return self._evidence(x, trace, query, key, logit_bias(relative, trace, x.dtype))
        (key,) = self._streams(normed, 1, 2, rows)
        return self._evidence_of_keys(x, normed, key, trace, relative, needs)

    def _evidence_of_keys(
        self, x: Tensor, normed: Tensor, key: Tensor, trace: Trace, relative: Tensor | None, needs: Needs
    ) -> Evidence:
        """Evidence of keys, and of the query of CLS if it is needed; no other query is computed."""
        if needs != "cls_row":
            return self._evidence(x, trace, key=key)
        cls_query = self.scored(self._streams(normed[:, :1], 0, 1)[0])
        return self._evidence(x, trace, key=key, bias=logit_bias(relative, trace, x.dtype, 1), cls_query=cls_query)

    def _in_parts(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`compute(x)`, over a few images of (B, T, C) at a time on a CPU, where it is faster and nobody can see it.

        The hidden layer of an MLP at batch 32 is larger than the caches and than what the allocator uses again; that of
        a few images is not. Images do not depend on each other, so the result is the same.
        """
        if x.device.type != "cpu" or torch.is_grad_enabled() or recording():
            return compute(x)
        hidden_bytes = 4 * x.shape[1] * x.shape[2] * x.element_size()
        images = max(1, _SLICE_BYTES * torch.get_num_threads() // hidden_bytes)
        if images >= x.shape[0] or self.training or observed(self):
            return compute(x)
        return torch.cat([compute(part) for part in x.split(images)])


def _masked(masks: tuple[object, ...]) -> bool:
    return any(value is not None and value is not False for value in masks)


def _refuse_mask(masks: tuple[object, ...]) -> None:
    if _masked(masks):
        raise VitrimError("an attention mask cannot be combined with token reduction; call handle.remove() first")
