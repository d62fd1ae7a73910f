"""The forward pass of a block with a cut, shared by all families.

A family supplies five steps (`norm_tokens`, `project`, `attend`, `feed_forward`, `head_scale`), where positions are
rotary two more (`rows_of_table`, `rotate`), where they are relative one (`position_bias`); everything that decides
which work can be left out is here:
- a block without a cut runs its own, original forward pass;
- where tokens are dropped, their queries, attention rows and output projection are never computed;
- where the head reads only prefix tokens, the last block computes only those;
- rotary tables and relative biases, which are made for all tokens, follow the tokens that are left.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ScoreError, VitrimError
from ..tokens import Assignment, Evidence, take
from ..tokens.scores import Needs
from .exchange import OWN_FORWARD, Reduced, intercepted, observed, while_attached
from .forward_pass import arrive, leave, recomputing
from .logit_bias import logit_bias
from .macs import needed, skips_queries
from .trace import Trace

_SLICE_BYTES = 8 * 2**20
"""Hidden activations per thread, about the size of a core's share of the caches."""


class ReducedBlock(Reduced):
    """Mixin placed before a family's own block class; overrides only `forward`."""

    vitrim_index: int
    vitrim_attention: str
    """Name of the attention layer within the block; "" where the family names no branches."""
    rotary_argument: ClassVar[str] = ""
    """Name of the first argument after the tokens where that is the rotary table; "" where the block gets none."""
    bias_argument: ClassVar[str] = ""
    """The same where it is a relative position bias that all blocks share; such blocks may also have one of their own.
    """
    mask_argument: ClassVar[str] = ""
    """Name of the only argument that is an attention mask; "" where any argument besides the table may be one."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        """The norm before attention."""
        raise NotImplementedError

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Streams `first` to `last` (exclusive) of (query, key, value) for these tokens, each (B, H, T, D), normed."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        """Fused attention, output projection, layer scale and drop path: what is added to the residual stream."""
        raise NotImplementedError

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        """As `attend` for all tokens, by one call of the attention layer, if `runs_whole` says so; None otherwise.

        Hooks on the layer, or a `forward` set on it, see that call, and what they return is used. A family without
        this step refuses them.
        """
        if by := self._attention_is_intercepted():
            raise VitrimError(
                f"the {self.vitrim_attention} of block {self.vitrim_index} has {by}, which cannot run: this block "
                "computes its attention in parts; put hooks on the block or on the layers inside its attention"
            )
        return None

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        """The MLP half of the block, residual included."""
        raise NotImplementedError

    @property
    def head_scale(self) -> float:
        """The factor of the attention logits."""
        raise NotImplementedError

    def rows_of_table(self, table: Any, place_BM: Tensor) -> Any:
        """The rows of the rotary table for patch tokens at these places, image by image."""
        raise NotImplementedError

    def rotate(self, stream_BHTD: Tensor, table: Any) -> Tensor:
        """Queries or keys, prefix tokens first, with the patch tokens rotated by their rows of the table."""
        raise NotImplementedError

    def position_bias(self, shared: Any) -> Tensor | None:
        """Relative position bias (H, P + N, P + N) for all tokens that the model started with; None without one.

        `shared` is what the model gave the block as `bias_argument`.
        """
        return None

    def scored(self, stream_BHTD: Tensor) -> Tensor:
        """The heads of queries or keys by which tokens are chosen."""
        return stream_BHTD

    @property
    def attends(self) -> bool:
        """False where the attention of this block was removed, so that it gives no keys or scores."""
        return True

    def runs_whole(self, bias: Tensor | None) -> bool:
        """Whether the attention layer must be called as a whole, since others act on its calls.

        Raises:
            VitrimError: a `forward` set on it would have to add sizes of tokens to its logits; it may ignore them.
        """
        by = self._attention_is_intercepted()
        if by == OWN_FORWARD and bias is not None:
            raise VitrimError(
                f"the {self.vitrim_attention} of block {self.vitrim_index} has {by}, which may ignore the mask that "
                "holds the sizes of merged tokens; del it, or use a reducer that needs no sizes, such as TopK() or "
                "ToMe(prop_attn=false)"
            )
        return by != ""

    def _attention_is_intercepted(self) -> str:
        return intercepted(self.get_submodule(self.vitrim_attention)) if self.vitrim_attention else ""

    @while_attached
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The block on tokens (B, T, C); returns (B, T', C) with T' as the plan says."""
        policy, index, name = self.vitrim_policy, self.vitrim_index, self.rotary_argument or self.bias_argument
        if name and args:
            args, kwargs = args[1:], {**kwargs, name: args[0]}
        table = kwargs.get(name) if self.rotary_argument else None
        others = (*args, *(value for key, value in kwargs.items() if key != name))
        masks = (kwargs.get(self.mask_argument),) if self.mask_argument else others
        trace = arrive(policy, index, x, self.training)
        plan = trace.plan
        if index == plan.reinstate:
            x, trace = trace.reinstate(x)
        before, inside = plan.cut(index, "before"), plan.cut(index, "inside")
        prefix_only = plan.prefix_only and index == plan.depth - 1
        reducer, moved = trace.reducer, bool(self.bias_argument) and trace.place_BN is not None
        if before is None and inside is None and not (prefix_only or moved) and trace.bias(x.dtype) is None:
            if trace.assignments:
                _refuse_mask(masks)
            whole = super().forward
            if plan.cuts and table is None and not _masked(masks):
                return leave(policy, index, self._in_parts(lambda part: whole(part, *args, **kwargs), x), trace)
            if table is not None:
                kwargs = {**kwargs, name: self._rows(table, trace)}
            return leave(policy, index, whole(x, *args, **kwargs), trace)
        _refuse_mask(masks)
        relative = self.position_bias(kwargs.get(name)) if self.bias_argument and self.attends else None
        if before is not None and reducer is not None:
            needs = self._needs(needed(reducer, before))
            normed = x if needs in ("nothing", "hidden") else self.norm_tokens(x)
            evidence = self._evidence_by_parts(x, normed, trace, relative, needs, self._rows(table, trace))
            x, trace = self._carry_out(reducer.assign(evidence, before.keep), x, trace)
        normed, rows = self.norm_tokens(x), self._rows(table, trace)
        whole = self.attend_whole(normed, trace.bias(x.dtype), rows)
        if whole is not None:
            x, trace = self._cut_whole(x, normed, whole, trace, relative, rows)
        elif prefix_only:
            x, query_rows = x[:, : plan.num_prefix], normed[:, : plan.num_prefix]
            key, value = self._streams(normed, 1, 3, rows)
            (query,) = self._streams(query_rows, 0, 1)
            bias = logit_bias(relative, trace, x.dtype, trace.plan.num_prefix)
            x = x + self.attend(query, key, value, bias, query_rows)
        elif inside is not None and reducer is not None and skips_queries(reducer, inside):
            needs = self._needs(needed(reducer, inside))
            key, value = self._streams(normed, 1, 3, rows)
            evidence = self._evidence_of_keys(x, normed, key, trace, relative, needs)
            assignment = reducer.assign(evidence, inside.keep)
            entered, trace = trace, trace.then(index, assignment)
            kept = assignment.rows(plan.num_prefix)
            x, query_rows = take(x, kept), take(normed, kept)
            (query,) = self._streams(query_rows, 0, 1, self._rows(table, trace))
            x = x + self.attend(query, key, value, logit_bias(relative, entered, x.dtype, trace), query_rows)
        else:
            query, key, value = self._streams(normed, 0, 3, rows)
            bias = logit_bias(relative, trace, x.dtype)
            x = x + self.attend(query, key, value, bias, normed)
            if inside is not None and reducer is not None:
                self._needs(needed(reducer, inside))
                evidence = self._evidence(x, trace, query, key, bias)
                x, trace = self._carry_out(reducer.assign(evidence, inside.keep), x, trace)
        return leave(policy, index, self._in_parts(self.feed_forward, x), trace)

    def _cut_whole(
        self, x: Tensor, normed: Tensor, whole: Tensor, trace: Trace, relative: Tensor | None, rows: Any
    ) -> tuple[Tensor, Trace]:
        """What `forward` does where attention was computed for all tokens: the same cut, which saves no attention."""
        plan, index, reducer = trace.plan, self.vitrim_index, trace.reducer
        inside = plan.cut(index, "inside")
        if plan.prefix_only and index == plan.depth - 1:
            return x[:, : plan.num_prefix] + whole[:, : plan.num_prefix], trace
        if inside is None or reducer is None:
            return x + whole, trace
        needs = self._needs(needed(reducer, inside))
        if skips_queries(reducer, inside):  # Which decides on the tokens before attention.
            evidence = self._evidence_by_parts(x, normed, trace, relative, needs, rows)
            assignment = reducer.assign(evidence, inside.keep)
            kept = assignment.rows(plan.num_prefix)
            return take(x, kept) + take(whole, kept), trace.then(index, assignment)
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
        out, first = assignment.apply(x, trace.size_BN, trace.plan.num_prefix), trace.plan.num_prefix
        gradients = self.vitrim_policy.gradients
        if gradients is not None and not recomputing():  # Note the gradient that will reach the tokens kept here.
            gradients.watch(self.vitrim_index, out, first, first + assignment.kept_BK.shape[1])
        return out, trace.then(self.vitrim_index, assignment, x)

    def _evidence(
        self,
        x: Tensor,
        trace: Trace,
        query: Tensor | None = None,
        key: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Evidence:
        query, key = (None if one is None else self.scored(one) for one in (query, key))
        return Evidence(
            num_prefix=trace.plan.num_prefix,
            block=self.vitrim_index,
            training=self.training,
            scale=self.head_scale,
            hidden_BTC=x,
            cls_query_BH1D=None if query is None else query[:, :, :1],
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
        evidence = self._evidence(x, trace, key=key, bias=logit_bias(relative, trace, x.dtype, 1))
        return replace(evidence, cls_query_BH1D=self.scored(self._streams(normed[:, :1], 0, 1)[0]))

    def _in_parts(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`compute(x)`, over a few images of (B, T, C) at a time on a CPU, where it is faster and nobody can see it.

        The hidden layer of an MLP at batch 32 is larger than the caches and than what the allocator uses again; that of
        a few images is not. Images do not depend on each other, so the result is the same.
        """
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
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
