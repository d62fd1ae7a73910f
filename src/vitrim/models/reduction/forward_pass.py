"""How the blocks and the head of one forward pass find its trace.

Tokens carry their trace (`trace.mark`). Where a hook or a wrapper between two blocks makes new tensors, the call of the
model that this thread is in knows which tokens come next. Where neither is certain, one clear error is raised; no trace
is ever taken from another pass or thread.
"""

import threading
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from ...errors import VitrimError
from ...tokens import Plan
from .contents import Contents, capturing
from .policy import Policy
from .trace import Trace, mark, own_trace, trace_of, unchanged_trace_of


class _Thread(threading.local):
    def __init__(self) -> None:  # Runs in each thread; a class attribute would make every compiled graph compile again.
        self.inside: Call | None = None


_thread = _Thread()


class Call:
    """One call of a reduced model, open while it runs: `with Call(policy, training, expected): ...`.

    policy: of the model that is called.
    training: mode of the outermost part that is called: the model, whose parts may be in another mode (frozen blocks).
    expected: patch tokens that its images give; None: not known.
    image_size: (height, width) of its images; None: not known.
    restorable: whether the values of dropped tokens are kept, so that they can be restored.
    trace: of the tokens that have left the latest block.
    started: forward passes through the blocks begun so far. With more than one, `trace` says nothing certain.
    """

    def __init__(
        self,
        policy: Policy,
        training: bool,
        expected: int | None = None,
        image_size: tuple[int, int] | None = None,
        restorable: bool = False,
    ) -> None:
        self.policy, self.expected, self.image_size = policy, expected, image_size
        self.training = Call.mode(policy, training)
        self.restorable = restorable or policy.restorable
        self.trace: Trace | None = None
        self.started = 0
        self._outer: Call | None = None

    def __enter__(self) -> Self:
        outer = self._outer = _thread.inside
        if outer is not None and outer.policy is self.policy:
            self.restorable |= outer.restorable
        _thread.inside = self
        return self

    def __exit__(self, *raised: object) -> None:
        outer = self._outer
        _thread.inside = outer
        if outer is not None and outer.policy is self.policy:
            outer.started += self.started
            outer.trace = self.trace

    @property
    def certain(self) -> Trace | None:
        """The trace of the only pass in this call; None if there were none or several."""
        return self.trace if self.started == 1 else None

    @property
    def inner(self) -> bool:
        """Whether this is part of another call of the same model."""
        return _innermost(self._outer, self.policy) is not None

    @staticmethod
    def of(policy: Policy) -> "Call | None":
        """The innermost call of this model that the thread is in."""
        return None if recomputing() else _innermost(_thread.inside, policy)

    @staticmethod
    def mode(policy: Policy, training: bool) -> bool:
        """The mode of the model, as its open call knows it; without one, that of the part that asks."""
        call = _innermost(_thread.inside, policy)
        return training if call is None else call.training


def _innermost(call: Call | None, policy: Policy) -> Call | None:
    """Of a call and those around it, the innermost one of this model."""
    while call is not None and call.policy is not policy:
        call = call._outer
    return call


def arrive(policy: Policy, block: int, x_BTC: Tensor, training: bool) -> Trace:
    """The trace of these tokens on their way into `block`; at the first block a new one.

    `training`: mode of the block, which counts only where no call of the model is open.
    """
    call, again, known = Call.of(policy), recomputing(), trace_of(x_BTC)
    training = Call.mode(policy, training)
    if block == 0:
        if again and known is not None and known.block < 0:
            return known
        alone = call is None and not again
        trace = policy.start(x_BTC, training, None if call is None else call.expected, alone=alone)
        if call is not None:
            trace = replace(trace, image_size=call.image_size, restorable=call.restorable)
            call.started += 1
    elif known is not None:
        trace = known
        if again and own_trace(x_BTC) is None and _carries_gradients(trace):
            raise VitrimError(
                "this reduction carries tokens or scores with gradients from block to block, which reentrant "
                "activation checkpointing loses; pass use_reentrant=False"
            )
        _check_order(trace, block)
    else:
        trace = _continued(policy, call, block, x_BTC, training)
    if trace.device != x_BTC.device:
        trace = trace.to(x_BTC.device)
    if trace is not known and not torch.compiler.is_compiling():
        mark(x_BTC, trace)  # For activation checkpointing, which runs the block on the same tokens again.
    return trace


def leave(policy: Policy, block: int, x_BTC: Tensor, trace: Trace) -> Tensor:
    """Send tokens on from `block`, with their trace."""
    trace = trace.left(block)
    mark(x_BTC, trace)
    if not recomputing():
        if (call := Call.of(policy)) is not None:
            call.trace = trace
        policy.show(trace)
    return x_BTC


def finish(policy: Policy, x_BTC: Tensor, *, whole: bool = True) -> Tensor:
    """Hand the trace on to the final tokens, which the last norm has replaced; `whole`: after all blocks."""
    call = Call.of(policy)
    if call is None or call.started > 1:
        return x_BTC
    if call.trace is None or (whole and call.trace.block != policy.geometry.depth - 1):
        raise VitrimError(CHANGED)
    before = trace_of(x_BTC)  # Without a last norm, these are the tokens that the last block gave.
    # In a call of the whole model, its head knows the pass from the call.
    contents = None if call.inner else Contents.of(x_BTC)
    mark(x_BTC, replace(call.trace, normed=before is None or before.normed, contents=contents))
    return x_BTC


def trace_at_head(policy: Policy, x_BTC: Tensor) -> Trace | None:
    """The trace by which a head weighs final tokens; None where every token counts the same.

    Raises:
        VitrimError: nothing proves which forward pass the tokens come from.
    """
    return known_trace(policy, x_BTC) if policy.fuses else None


def known_trace(policy: Policy, x_BTC: Tensor) -> Trace | None:
    """The trace of these final tokens; None where they are all there, or hold no values.

    Raises:
        VitrimError: nothing proves which forward pass the tokens come from.
    """
    trace, call, g = trace_of(x_BTC), Call.of(policy), policy.geometry
    ran = None if call is None else call.certain
    if ran is None or trace is None or not trace.same_pass(ran):
        trace = unchanged_trace_of(x_BTC, proven=True)
    if trace is None and ran is not None:
        fits = (ran.num_images, ran.plan.token_counts[-1]) == tuple(x_BTC.shape[:2])
        trace = ran if fits and ran.block == g.depth - 1 else None
    if trace is not None:
        return trace if trace.device == x_BTC.device else trace.to(x_BTC.device)
    if x_BTC.is_meta or (g.fixed_size and x_BTC.shape[1] == g.num_patches + g.num_prefix):
        return None
    if x_BTC.is_inference() and capturing(x_BTC):
        raise VitrimError(
            "in a CUDA graph nothing proves from which forward pass features of inference mode come; capture it under "
            "torch.no_grad, or capture the whole model"
        )
    raise VitrimError(UNKNOWN)


def recomputing() -> bool:
    """Whether this is part of a backward pass, which recomputes what activation checkpointing did not store."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


UNKNOWN = (
    "it is not known from which forward pass these features come, so the head cannot weigh tokens that stand for "
    "several patches; give forward_head the tensor that forward_features returned, as it is (no copy, cast or slice of "
    "it, and nothing written into it), or call the model"
)
CHANGED = (
    "the blocks of this model are not those that the reduction was attached to; call handle.remove(), then attach again"
)


def _carries_gradients(trace: Trace) -> bool:
    weighs = trace.reducer is not None and trace.reducer.extra_tokens > 0 and trace.score_BN is not None
    return weighs or any(before is not None for before in trace.parked)


def _check_order(trace: Trace, block: int) -> None:
    if trace.block == block - 1 or not _cuts(trace.plan):
        return
    counts = trace.plan.token_counts
    if trace.block >= block or counts[trace.block] != counts[block - 1]:
        raise VitrimError(
            f"tokens that left block {trace.block} reach block {block}, between which the reduction cuts tokens; run "
            "the blocks in order. If blocks were replaced: " + CHANGED
        )


def _continued(policy: Policy, call: Call | None, block: int, x_BTC: Tensor, training: bool) -> Trace:
    """The trace of tokens that carry none, if the call of the model that is running proves it."""
    trace = None if call is None else call.certain
    if trace is not None and trace.block == block - 1:
        if (trace.num_images, trace.plan.token_counts[block - 1]) == tuple(x_BTC.shape[:2]):
            return trace
        if _cuts(trace.plan):
            raise VitrimError(
                f"block {block - 1} gave {trace.num_images} x {trace.plan.token_counts[block - 1]} tokens, but "
                f"{x_BTC.shape[0]} x {x_BTC.shape[1]} reach block {block}; tokens that are added or removed between "
                "blocks cannot be combined with token reduction; call handle.remove() first"
            )
    if policy.idle(training):
        num_prefix, depth = policy.geometry.num_prefix, policy.geometry.depth
        plan = Plan(int(x_BTC.shape[1]) - num_prefix, num_prefix, depth, ())
        return Trace(plan, None, x_BTC.shape[0], x_BTC.device, training, block - 1)
    raise VitrimError(
        f"it is not known from which forward pass the tokens at block {block} come; run the model from its first "
        "block, and let nothing make new tensors inside a checkpointed part, or between blocks that you call one by "
        "one. If blocks were replaced: " + CHANGED
    )


def _cuts(plan: Plan) -> bool:
    return bool(plan.cuts) or plan.prefix_only
