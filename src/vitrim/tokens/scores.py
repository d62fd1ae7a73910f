"""How much each patch token matters: one function per score, higher = keep, never negative.

A score is computed from an `Evidence` and has shape (B, N). Its `needs` says what the block must compute for it, so
that nothing else is computed. To add one, write the function under `@score(...)`, in any file. Scores have no options.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (torch leaves an argument of Tensor.norm untyped.)

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

from ..errors import ScoreError
from ..tables import Table, first_line
from .precision import scaled_product, wide

Needs = Literal["nothing", "key", "cls_row", "attention", "hidden"]
_MAP_BYTES = 2**28
"""Attention maps in float32 that are held at once on a GPU."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a block supplies about its tokens at a cut. Shapes: B images, T = P + N tokens, H heads, D head dimensions.

    Args:
        num_prefix: P, the prefix tokens, which come first.
        block: index of the block.
        training: mode of the model.
        scale: factor of the attention logits.
        hidden_BTC: residual stream at the place of the cut.
        cls_query_BH1D: query of CLS, after q/k norm as all queries and keys; None unless `needs` is "cls_row".
        query_BHTD: all queries; None unless `needs` is "attention".
        key_BHTD: all keys; None if `needs` is "nothing" or "hidden".
        bias_BHTT: added to the attention logits (log of token sizes, relative positions), or None. B, H and the
            queries may be 1 for all; with `needs` "cls_row" there may be no other query than that of CLS.
        previous_BN: scores carried from earlier cuts, or None.
        gradient_C: mean squared gradient of each channel at this cut in earlier steps; None before the first one.
    """

    num_prefix: int
    block: int
    training: bool
    scale: float
    hidden_BTC: Tensor
    cls_query_BH1D: Tensor | None = None
    query_BHTD: Tensor | None = None
    key_BHTD: Tensor | None = None
    bias_BHTT: Tensor | None = None
    previous_BN: Tensor | None = None
    gradient_C: Tensor | None = None

    @property
    def num_patches(self) -> int:
        """N, the patch tokens that enter the cut."""
        return self.hidden_BTC.shape[1] - self.num_prefix

    @property
    def key(self) -> Tensor:
        """Keys of all tokens, (B, H, T, D)."""
        if self.key_BHTD is None:
            raise ScoreError("this score reads keys, which the block did not supply; declare needs='key'")
        return self.key_BHTD

    def cls_attention(self) -> Tensor:
        """Attention of CLS to all tokens, (B, H, T), from one more row of queries than fused attention."""
        if self.cls_query_BH1D is None:
            raise ScoreError("this score reads the CLS query, which the block did not supply; declare needs='cls_row'")
        bias = None if self.bias_BHTT is None else self.bias_BHTT[:, :, :1]
        return self._softmax(self.cls_query_BH1D, self.key, bias).squeeze(2)

    def mean_over_heads(self, per_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over heads of a function of (B, T, T) attention, which gives (B, N)."""
        num_heads, at_once, total = self.key.shape[1], self._heads_at_once(), None
        for first in range(0, num_heads, at_once):
            attention_BHTT = self._attention_of(slice(first, first + at_once))
            found = per_head(attention_BHTT.flatten(0, 1)).unflatten(0, attention_BHTT.shape[:2]).sum(1)
            total = found if total is None else total + found
        assert total is not None
        return total / num_heads

    def _attention_of(self, heads: slice) -> Tensor:
        """Attention of every token to every token in some heads, (B, h, T, T)."""
        if self.query_BHTD is None:
            raise ScoreError("this score reads all queries, which the block did not supply; declare needs='attention'")
        bias = self.bias_BHTT if self.bias_BHTT is None or self.bias_BHTT.shape[1] == 1 else self.bias_BHTT[:, heads]
        return self._softmax(self.query_BHTD[:, heads], self.key[:, heads], bias)

    def _heads_at_once(self) -> int:
        """One on a CPU, whose caches are small; on a GPU, where every kernel costs time to start, as many as fit."""
        num_images, num_heads, num_tokens = self.key.shape[:3]
        if not self.key.is_cuda or torch.compiler.is_compiling():
            return 1
        return min(num_heads, max(1, _MAP_BYTES // (4 * num_images * num_tokens**2)))

    def _softmax(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        logits = scaled_product(query, key, self.scale)
        return (logits if bias is None else logits + bias).softmax(-1)


@dataclass(frozen=True)
class Score:
    """A named score.

    Args:
        name: as in `TopK(name)`.
        needs: what the block must supply, one of "nothing", "key", "cls_row", "attention" and "hidden".
        is_probability: whether the values are attention probabilities, which `fuse="sum"` can add up.
        compute: the function.
        summary: one line for `vitrim list`.
        training_only: whether it uses gradients, which exist only in training steps.
    """

    name: str
    needs: Needs
    is_probability: bool
    compute: Callable[[Evidence], Tensor]
    summary: str
    training_only: bool = False


SCORES: Table[str, Score] = Table("score")


def score(
    needs: Needs, is_probability: bool = False, training_only: bool = False
) -> Callable[[Callable[[Evidence], Tensor]], Score]:
    """Add a function to the table of scores under its own name; see `Score` for the options.

    >>> @score(needs="hidden")
    ... def brightest(e: Evidence) -> Tensor:
    ...     "Largest entry of the hidden state."
    ...     return e.hidden_BTC[:, e.num_prefix :].amax(-1).clamp(min=0)
    """

    def enter(function: Callable[[Evidence], Tensor]) -> Score:
        made = Score(function.__name__, needs, is_probability, function, first_line(function), training_only)
        return SCORES.enter(made.name, made, source=function)

    return enter


@score(needs="cls_row", is_probability=True)
def cls_attention(e: Evidence) -> Tensor:
    """Attention of CLS to each patch, mean over heads (EViT, arXiv 2202.07800)."""
    return e.cls_attention().mean(1)[:, e.num_prefix :]


@score(needs="attention", is_probability=True)
def mean_attention(e: Evidence) -> Tensor:
    """Attention that the patch receives from all other patches, mean over heads and queries."""

    def received(attention_BTT: Tensor) -> Tensor:
        patches = attention_BTT[:, e.num_prefix :, e.num_prefix :]
        own = patches.diagonal(dim1=1, dim2=2)
        return (patches.sum(1) - own) / max(e.num_patches - 1, 1)

    return e.mean_over_heads(received)


@score(needs="attention")
def attention_entropy(e: Evidence) -> Tensor:
    """How far the entropy of the patch's attention row is below that of uniform attention, in nats, mean over heads."""

    def negentropy(attention_BTT: Tensor) -> Tensor:
        rows = attention_BTT[:, e.num_prefix :]
        entropy = -(rows * rows.clamp(min=torch.finfo(rows.dtype).tiny).log()).sum(-1)
        return (log(rows.shape[-1]) - entropy).clamp(min=0)

    return e.mean_over_heads(negentropy)


@score(needs="attention")
def attention_variance(e: Evidence) -> Tensor:
    """Variance over keys of the patch's attention row, mean over heads."""
    return e.mean_over_heads(lambda attention_BTT: attention_BTT[:, e.num_prefix :].var(-1, correction=0))


@score(needs="attention")
def attention_sharpness(e: Evidence) -> Tensor:
    """Largest entry of the patch's attention row, mean over heads."""
    return e.mean_over_heads(lambda attention_BTT: attention_BTT[:, e.num_prefix :].amax(-1))


@score(needs="hidden")
def norm(e: Evidence) -> Tensor:
    """L2 norm of the patch's hidden state (as in PTP-FAKD)."""
    return wide(e.hidden_BTC[:, e.num_prefix :]).norm(dim=-1)


@score(needs="hidden", training_only=True)
def gradient(e: Evidence) -> Tensor:
    """Expected first-order change of the loss without the patch, from gradients of earlier steps; only for phase train.

    The square root of `sum_c F_c x_c^2`, where F is the mean squared gradient per channel, the diagonal of the Fisher
    information (arXiv 1801.05787); see `tokens/gradients.py`.
    """
    if not e.training or not torch.is_grad_enabled():
        raise ScoreError(
            "the score 'gradient' works only in training steps, which record gradients; choose another score here "
            "(with activation checkpointing, pass use_reentrant=False)"
        )
    patches = e.hidden_BTC[:, e.num_prefix :]
    if e.gradient_C is not None:
        patches = patches * e.gradient_C.to(patches.device).sqrt()
    return wide(patches).norm(dim=-1)


@score(needs="key")
def key_norm(e: Evidence) -> Tensor:
    """L2 norm of the patch's key, mean over heads."""
    return wide(e.key[:, :, e.num_prefix :]).norm(dim=-1).mean(1)


@score(needs="nothing")
def random(e: Evidence) -> Tensor:
    """Uniform noise: new for each image in training, in evaluation one fixed draw per block for all images."""
    like = e.hidden_BTC
    if e.training:
        return torch.rand(like.shape[0], e.num_patches, device=like.device)
    # If the draw depended on the position in the batch, results would depend on the batch size.
    # Squares modulo a prime are the same on every device and in ONNX.
    prime = 2**31 - 1
    index = torch.arange(e.num_patches, device=like.device) + 7919 * (e.block + 1)
    spread = index * 48271 % prime
    draw = (spread * spread % prime).to(torch.promote_types(like.dtype, torch.float32)) / prime
    return draw.expand(like.shape[0], -1)
