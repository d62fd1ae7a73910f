"""The forward pass of a block with a cut, shared by all families.

A family supplies five steps (`norm_tokens`, `project`, `attend`, `feed_forward`, `head_scale`); everything that
decides which work can be left out is here:
- a block without a cut runs its own, original forward pass;
- where lost tokens leave no trace, their queries, attention rows and output projection are never computed;
- where the head reads prefix tokens alone, the last block computes only those.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import VitrimError
from ..tokens import Assignment, Evidence, take
from ..tokens.scores import Needs
from .attach import Handle
from .macs import needed, skips_queries
from .trace import Trace

_SLICE_BYTES = 8 * 2**20
"""Hidden activations per thread, about the size of a core's share of the caches."""


class ReducedBlock(nn.Module):
    """Mixin placed before a family's own block class; overrides `forward` alone."""

    vitrim_handle: Handle
    vitrim_index: int

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        """The norm before attention."""
        raise NotImplementedError

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Streams `first` to `last` (exclusive) of (query, key, value) for these tokens, each (B, H, T, D), normed."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        """Fused attention, output projection, layer scale and drop path: what is added to the residual stream."""
        raise NotImplementedError

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        """The MLP half of the block, residual included."""
        raise NotImplementedError

    @property
    def head_scale(self) -> float:
        """The factor of the attention logits."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The block on tokens (B, T, C); returns (B, T', C) with T' as the plan says."""
        handle, index = self.vitrim_handle, self.vitrim_index
        trace = handle.trace_of(x, index)
        plan = trace.plan
        if index == plan.reinstate:
            x, trace = trace.reinstate(x)
        before, inside = plan.cut(index, "before"), plan.cut(index, "inside")
        prefix_only = plan.prefix_only and index == plan.depth - 1
        bias, reducer = trace.bias(x.dtype), trace.reducer
        if before is None and inside is None and bias is None and not prefix_only:
            if trace.assignments:
                _refuse_mask(args, kwargs)
            whole = super().forward
            if plan.cuts and not args and not kwargs:
                return handle.leave(a_few_images_at_a_time(whole, x), trace)
            return handle.leave(whole(x, *args, **kwargs), trace)
        _refuse_mask(args, kwargs)
        if before is not None and reducer is not None:
            evidence = self._foresee(x, trace, bias, needed(reducer, before))
            x, trace = self._carry_out(reducer.assign(evidence, before.keep), x, trace)
            bias = trace.bias(x.dtype)
        normed = self.norm_tokens(x)
        if prefix_only:
            x, query_rows = x[:, : plan.num_prefix], normed[:, : plan.num_prefix]
            key, value = self.project(normed, 1, 3)
            (query,) = self.project(query_rows, 0, 1)
            x = x + self.attend(query, key, value, bias, query_rows)
        elif inside is not None and reducer is not None and skips_queries(reducer, inside):
            key, value = self.project(normed, 1, 3)
            evidence = self._evidence(x, trace, key=key, bias=bias)
            if needed(reducer, inside) == "cls_row":
                evidence = replace(evidence, cls_query_BH1D=self.project(normed[:, :1], 0, 1)[0])
            assignment = reducer.assign(evidence, inside.keep)
            rows = assignment.rows(plan.num_prefix)
            x, query_rows = take(x, rows), take(normed, rows)
            (query,) = self.project(query_rows, 0, 1)
            x = x + self.attend(query, key, value, bias, query_rows)
            trace = trace.then(index, assignment)
        else:
            query, key, value = self.project(normed, 0, 3)
            x = x + self.attend(query, key, value, bias, normed)
            if inside is not None and reducer is not None:
                evidence = self._evidence(x, trace, query, key, bias)
                x, trace = self._carry_out(reducer.assign(evidence, inside.keep), x, trace)
        return handle.leave(a_few_images_at_a_time(self.feed_forward, x), trace)

    def _carry_out(self, assignment: Assignment, x: Tensor, trace: Trace) -> tuple[Tensor, Trace]:
        out = assignment.apply(x, trace.size_BN, trace.plan.num_prefix)
        self.vitrim_handle.watch(out, self.vitrim_index, assignment.kept_BK.shape[1])
        return out, trace.then(self.vitrim_index, assignment, x)

    def _evidence(
        self,
        x: Tensor,
        trace: Trace,
        query: Tensor | None = None,
        key: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Evidence:
        return Evidence(
            num_prefix=trace.plan.num_prefix,
            block=self.vitrim_index,
            training=self.training,
            scale=self.head_scale,
            hidden_BTC=x,
            cls_query_BH1D=None if query is None else query[:, :, :1],
            query_BHTD=query,
            key_BHTD=key,
            bias_B11T=bias,
            previous_BN=trace.score_BN,
            gradient_C=None if trace.gradients is None else trace.gradients.get(self.vitrim_index),
        )

    def _foresee(self, x: Tensor, trace: Trace, bias: Tensor | None, needs: Needs) -> Evidence:
        """Evidence before the block: the queries and keys that this block would give to the incoming tokens."""
        if needs in ("nothing", "hidden"):
            return self._evidence(x, trace)
        normed = self.norm_tokens(x)
        if needs == "attention":
            return self._evidence(x, trace, *self.project(normed, 0, 2), bias)
        (key,) = self.project(normed, 1, 2)
        evidence = self._evidence(x, trace, key=key, bias=bias)
        if needs == "cls_row":
            evidence = replace(evidence, cls_query_BH1D=self.project(normed[:, :1], 0, 1)[0])
        return evidence


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to calls of this module."""
    # torch's own shortcut in `Module.__call__` asks the same.
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def a_few_images_at_a_time(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`compute(x)` over slices of the batch (B, T, C) on a CPU, where large activations cost more than arithmetic.

    The hidden layer of an MLP at batch 32 outgrows caches and what the allocator reuses; a few images at a time
    it stays in both. Images do not depend on each other, so the result is the same.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute(x)
    hidden_bytes = 4 * x.shape[1] * x.shape[2] * x.element_size()
    images = max(1, _SLICE_BYTES * torch.get_num_threads() // hidden_bytes)
    if images >= x.shape[0]:
        return compute(x)
    return torch.cat([compute(part) for part in x.split(images)])


def _refuse_mask(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    if any(value is not None and value is not False for value in (*args, *kwargs.values())):
        raise VitrimError("an attention mask cannot be combined with token reduction; call handle.remove() first")
