"""What one forward pass has done to its tokens so far; it travels with the tokens from block to block."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import VitrimError
from ...text import outline
from ...tokens import Assignment, Plan, Reducer, TokenState
from .contents import Contents, storage_of, writes

_TRACE = "vitrim_trace"


@dataclass(frozen=True, eq=False)
class Trace:
    """What has been done to the tokens of one forward pass so far. Immutable: each block makes the next one.

    training: mode of the model.
    block: the last block that the tokens have left, -1 before the first.
    size_BN: input tokens behind each patch token, None while every token is one input token.
    positions: whether blocks use the places of tokens (rotary or relative positions), so that these are followed.
    place_BN: index of the input token at whose place each patch token is, None while each is at its own.
    score_BN: the scores that the next cut may use again, None if there are none.
    parked: where tokens return later or are restored, the whole sequence before each cut; None for a merge, which needs
        no copy.
    restorable: whether `parked` is kept after the blocks, for `restored`.
    normed: whether the tokens have passed the last norm of the model.
    image_size: (height, width) of the images; None where it is not known.
    gradients: mean squared gradients by block, see `GradientMemory`; None unless the score reads them.
    contents: what the tokens held when they were handed to the user; None before, and where that cannot be read.
    """

    plan: Plan
    reducer: Reducer | None
    num_images: int
    device: torch.device
    training: bool = False
    block: int = -1
    assignments: tuple[tuple[int, Assignment], ...] = ()
    size_BN: Tensor | None = None
    positions: bool = False
    place_BN: Tensor | None = None
    score_BN: Tensor | None = None
    parked: tuple[Tensor | None, ...] = ()
    restorable: bool = False
    normed: bool = False
    image_size: tuple[int, int] | None = None
    gradients: Mapping[int, Tensor] | None = None
    contents: Contents | None = None

    def __repr__(self) -> str:
        return outline(self)

    def size_after(self, assignment: Assignment) -> Tensor | None:
        """Input tokens behind each patch token after one more cut; None while every token is one input token."""
        size = self.size_BN
        if size is None and assignment.moved_BR is not None:
            size = torch.ones(self.num_images, assignment.num_in, device=assignment.kept_BK.device)
        return None if size is None else assignment.size(size)

    def then(self, block: int, assignment: Assignment, before_BTC: Tensor | None, size_BM: Tensor | None) -> "Trace":
        """The trace after one more cut of the tokens `before_BTC`; `size_BM` is what `size_after` gives."""
        place = self.place_BN
        if self.positions:
            if place is None:
                place = torch.arange(assignment.num_in, device=assignment.kept_BK.device).expand(self.num_images, -1)
            place = assignment.place(place, self.size_BN)
        score = None
        if assignment.score_BN is not None and self.reducer is not None and self.reducer.carries_scores:
            score = assignment.carry(assignment.score_BN)
        # The weights of a fused token hold the graph of the whole pass, which must not outlive it.
        assignments = (*self.assignments, (block, assignment.detach()))
        parked = self.parked
        if self.plan.reinstate is not None or self.restorable:
            parked = (*parked, None if assignment.merges else before_BTC)
        return self._with(assignments=assignments, size_BN=size_BM, place_BN=place, score_BN=score, parked=parked)

    def reinstate(self, x_BTC: Tensor) -> tuple[Tensor, "Trace"]:
        """All tokens in their original order, (B, P + N, C), and the trace from there on."""
        for (_, assignment), before_BTC in zip(reversed(self.assignments), reversed(self.parked), strict=True):
            x_BTC = assignment.undo(x_BTC, before_BTC, self.plan.num_prefix)
        parked = self.parked if self.restorable else ()
        return x_BTC, self._with(size_BN=None, place_BN=None, score_BN=None, parked=parked)

    def restored(self, x_BTC: Tensor, norm: nn.Module | None = None, num_prefix: int | None = None) -> Tensor:
        """All input patches in their original order, (B, P + N, C), of tokens that have left `block`.

        Survivors have their present values, merged patches those of their common token; dropped and fused ones those
        that they had when they were removed, after `norm`.

        Args:
            x_BTC: the tokens.
            norm: what they have passed since they left the block.
            num_prefix: prefix tokens among them; by default as many as the model has.

        Raises:
            VitrimError: other tokens, or dropped ones whose values were not kept.
        """
        first = self.plan.num_prefix if num_prefix is None else num_prefix
        if self.plan.prefix_only and self.block == self.plan.depth - 1:
            raise VitrimError("cls_only computes no patch tokens that could be restored; attach again without it")
        cuts = self.cuts(self.block)
        here = cuts[-1].num_out if cuts else self.plan.num_patches
        if x_BTC.shape[:2] != (self.num_images, first + here):
            raise VitrimError(
                f"{x_BTC.shape[0]} x {x_BTC.shape[1]} tokens, but the pass has left {self.num_images} x {first + here}"
            )
        parked = self.parked or (None,) * len(cuts)
        for assignment, before_BTC in reversed(list(zip(cuts, parked, strict=False))):
            if before_BTC is None and not assignment.merges:
                raise VitrimError(
                    "tokens were dropped, and the values that they had were not kept; attach with restorable=True"
                )
            if before_BTC is not None:
                before_BTC = before_BTC[:, self.plan.num_prefix - first :]
                before_BTC = (before_BTC if norm is None else norm(before_BTC)).to(x_BTC.dtype)
            x_BTC = assignment.undo(x_BTC, before_BTC, first)
        return x_BTC

    def same_pass(self, other: "Trace") -> bool:
        """Whether this is the trace of the same tokens: what was done to them is the very same tensors."""
        return self.size_BN is other.size_BN and self.assignments is other.assignments

    def left(self, block: int) -> "Trace":
        """The trace of tokens that have left `block`."""
        return self._with(block=block)

    def _with(self, **changes: Any) -> "Trace":
        """As `replace`, which takes ten times as long, in every block."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        after = object.__new__(Trace)
        vars(after).update(vars(self), **changes)
        return after

    def to(self, device: torch.device) -> "Trace":
        """The trace of the same tokens on another device, as where a model is spread over several."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return replace(
            self,
            device=device,
            assignments=tuple((block, _to(assignment, device)) for block, assignment in self.assignments),
            size_BN=moved(self.size_BN),
            place_BN=moved(self.place_BN),
            score_BN=moved(self.score_BN),
            parked=tuple(map(moved, self.parked)),
            gradients=None if self.gradients is None else {b: g.to(device) for b, g in self.gradients.items()},
        )

    def summary(self) -> "Trace":
        """The same without what only later blocks need, so that nothing large is kept."""
        if self.place_BN is None and self.score_BN is None and not self.parked and self.gradients is None:
            return self
        return self._with(place_BN=None, score_BN=None, parked=(), gradients=None)

    def cuts(self, block: int | None = None) -> list[Assignment]:
        """The cuts whose tokens have not returned after `block` (None: at the end)."""
        back = self.plan.reinstate
        if back is not None and (block is None or block >= back):
            return []
        return [assignment for at, assignment in self.assignments if block is None or at <= block]

    def state(self, block: int | None = None) -> TokenState:
        """Where the input tokens are after `block` (None: at the end)."""
        return TokenState.start(self.num_images, self.plan.num_patches, self.device).after(self.cuts(block))

    @property
    def biased(self) -> bool:
        """Whether attention has to weigh tokens by their size."""
        return self.size_BN is not None and self.reducer is not None and self.reducer.prop_attn

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """log(size) of all tokens, prefix included, as attention mask (B, 1, 1, T); None where attention is plain."""
        if not self.biased or self.size_BN is None:
            return None
        log_size = self.size_BN.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
        return nn.functional.pad(log_size, (self.plan.num_prefix, 0))[:, None, None, :]

    def __deepcopy__(self, memo: dict[int, object]) -> "Trace":
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Features that are saved must not bring a class of vitrim into the file, which `weights_only` would refuse.
        return OrderedDict, ()


def mark(x: Tensor, trace: Trace) -> None:
    """Send a trace along with these tokens.

    It is kept as an attribute of the tensor and of its memory. Reentrant checkpointing, backward hooks and FSDP hand on
    another tensor of the same memory, which has the same tokens.
    """
    setattr(x, _TRACE, trace)
    storage = storage_of(x)
    if storage is not None:
        setattr(storage, _TRACE, (trace, x.shape, x.stride(), x.storage_offset(), writes(x)))


def trace_of(x: Tensor) -> Trace | None:
    """The trace of these tokens; None if they have none, as after `clone()`, a cast or an index."""
    trace = own_trace(x)
    storage = None if trace is not None else storage_of(x)
    found = getattr(storage, _TRACE, None)
    if found is not None and found[1:4] == (x.shape, x.stride(), x.storage_offset()):
        return found[0]
    return trace


def unchanged_trace_of(x: Tensor, *, proven: bool = False) -> Trace | None:
    """As `trace_of`, but None too if anything was written into the tokens, or other memory put in their place.

    Tokens that were handed to the user are known by what they hold, others by PyTorch's count of what was written.
    Tensors of inference mode have no such count: they pass, or give None where it must be `proven`.
    """
    trace, storage = trace_of(x), storage_of(x)
    if trace is None or storage is None:
        return trace
    same = None if trace.contents is None else trace.contents.still_in(x)
    if same is not None:
        return trace if same else None
    if proven and x.is_inference():
        return None
    found = getattr(storage, _TRACE, None)
    if found is None or found[1:] != (x.shape, x.stride(), x.storage_offset(), writes(x)):
        return None
    return trace if trace.same_pass(found[0]) else None


def own_trace(x: Tensor) -> Trace | None:
    """The trace that this very tensor object was marked with."""
    trace = getattr(x, _TRACE, None)
    return trace if isinstance(trace, Trace) else None


def _to(assignment: Assignment, device: torch.device) -> Assignment:
    values = {field.name: getattr(assignment, field.name) for field in fields(assignment)}
    return replace(
        assignment, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    )
