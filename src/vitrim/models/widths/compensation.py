"""Let the units that stay do the work of those that are cut: a ridge regression, folded into the last projection.

A sub-layer ends in a projection W a + b of its inputs a (hidden units, or the mixed values of all heads). If only the
leading inputs a_K are kept, the best weights for them are W_K + W_D S_DK S_KK^-1, where S is the covariance of a over
images plus a ridge: what the lost inputs a_D add is predicted from the kept ones. Since widths are nested, one Cholesky
factor S = L L^T serves every width: the new weights are W_K + W_D L_DK L_KK^-1, one triangular solve.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import VitrimError
from ...text import outline
from ...tokens.precision import exact

TINY = torch.finfo(torch.float64).tiny
LEAST = 1e-30
"""Added to variances, which may all be 0; its root is not 0 in float32, in which factors are kept."""


@dataclass(frozen=True)
class Compensation:
    """What the last projection of one sub-layer needs to know of its inputs, which are in the order of the units.

    mean: of every input (n,).
    factor: lower-triangular Cholesky factor (n, n) of their covariance plus the ridge, or of their second moment where
        the projection has no bias that could hold a mean. None: only the mean moves, into the bias.
    pairs: where rotary pairs of queries and keys are cut: for every head the Cholesky factor (H, p, p) of the second
        moments of what its pairs add to the output, pairs in their order. None: those that stay are left as they are.
    """

    mean: Tensor
    factor: Tensor | None = None
    pairs: Tensor | None = None

    def __repr__(self) -> str:
        return outline(self)

    def folded(self, weight: Tensor, bias: Tensor | None, kept: int) -> tuple[Tensor, Tensor | None]:
        """Weights (C, kept) and bias (C,) for the leading `kept` inputs, in float64.

        Args:
            weight: of the full projection (C, n), columns in the order of the units.
            bias: of the full projection (C,), or None.
            kept: number of inputs that stay, from 0 to n.

        Raises:
            VitrimError: this compensation belongs to another width.
        """
        weight, n = exact(weight), weight.shape[1]
        mean, factor = self._on(weight.device)
        if mean.numel() != n or (factor is not None and factor.shape != (n, n)):
            raise VitrimError(f"a compensation of {mean.numel()} units for a layer of width {n}")
        if kept == n:
            return weight, None if bias is None else exact(bias)
        leading = weight[:, :kept]
        if factor is not None and kept:
            lost = weight[:, kept:] @ factor[kept:, :kept]
            leading = leading + torch.linalg.solve_triangular(factor[:kept, :kept], lost, upper=False, left=False)
        if bias is None:
            return leading, None
        return leading, exact(bias) + weight @ mean - leading @ mean[:kept]

    def pair_scales(self, kept: int) -> Tensor:
        """Factors (H, kept) on the queries of the pairs that stay, which make up for the others, in float64."""
        assert self.pairs is not None
        factors = exact(self.pairs)
        target = pair_changes(factors)[:, None, :kept]
        return torch.linalg.solve_triangular(factors[:, :kept, :kept], target, upper=False, left=False)[:, 0]

    def unexplained(self, weight: Tensor) -> Tensor:
        """Mean squared error of the projection (n + 1,), summed over outputs, if the leading 0, 1, ..., n inputs stay.

        The error at width k is the squared length of columns k and later of W L, since the rest is predicted exactly.
        """
        weight = exact(weight)
        _, factor = self._on(weight.device)
        if factor is None:
            raise VitrimError("this compensation holds means alone, which tell no errors; stratify again")
        return tail_sums((weight @ factor).square().sum(0))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        factor = None if self.factor is None else exact(self.factor.to(device))
        return exact(self.mean.to(device)), factor


@dataclass
class Moments:
    """Weighted sums over tokens of the inputs (n) of a last projection, in float64; processes and batches add up.

    weight: sum of the weights. first: weighted sum (n,). second: weighted sum of outer products (n, n).
    """

    weight: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, inputs: int, device: torch.device) -> "Moments":
        """Empty sums."""
        shapes = ((), (inputs,), (inputs, inputs))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, inputs_TA: Tensor, weight_T: Tensor) -> None:
        """Add T tokens."""
        weighted = inputs_TA * weight_T[:, None]
        self.weight += weight_T.sum(dtype=torch.float64)
        self.first += weighted.sum(0, dtype=torch.float64)
        self.second += exact(weighted.mT @ inputs_TA)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.weight + other.weight, self.first + other.first, self.second + other.second)

    def ordered(self, order: Tensor) -> "Moments":
        """The same with the inputs in another order."""
        order = order.to(self.first.device)
        return Moments(self.weight, self.first[order], self.second[order][:, order])

    def rotated(self, axes_Hhh: Tensor) -> "Moments":
        """The same with every head's values rotated to new axes (columns), inputs head by head."""
        heads, dim = axes_Hhh.shape[:2]
        first = torch.einsum("hi,hij->hj", self.first.view(heads, dim), axes_Hhh).flatten()
        second = torch.einsum("hiA,hij->hjA", self.second.view(heads, dim, -1), axes_Hhh).flatten(0, 1)
        second = torch.einsum("Ahi,hij->Ahj", second.view(-1, heads, dim), axes_Hhh).flatten(1)
        return Moments(self.weight, first, second)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of every input (n,)."""
        return self.first / self.weight.clamp_min(TINY)

    def spread(self, centred: bool) -> Tensor:
        """Covariance (n, n), or second moment if not centred."""
        second = self.second / self.weight.clamp_min(TINY)
        second = (second + second.mT) / 2
        return second - torch.outer(self.mean, self.mean) if centred else second

    def factor(self, ridge: float, centred: bool) -> Tensor:
        """Cholesky factor of the spread plus `ridge` times its mean variance on the diagonal; see `Compensation`."""
        return cholesky(self.spread(centred), ridge)

    def error(self, weight: Tensor, compensation: Compensation, kept: int, bias: bool) -> Tensor:
        """Mean squared error on these tokens of the projection with `kept` inputs, compared with the full one."""
        zero = weight.new_zeros(len(weight)) if bias else None
        leading, shift = compensation.folded(weight, zero, kept)
        lost = exact(weight).clone()
        lost[:, :kept] -= leading
        error = ((lost @ self.second) * lost).sum() / self.weight.clamp_min(TINY)
        if shift is None:
            return error
        return error - 2 * shift @ (lost @ self.mean) + shift.square().sum()


def pair_changes(factors_Hpp: Tensor) -> Tensor:
    """What all pairs of a head add together, by the columns of its factor (H, p): the target of their regression."""
    return factors_Hpp.sum(1)


def tail_sums(x: Tensor) -> Tensor:
    """What is lost (n + 1,) when the leading 0, 1, ..., n entries of `x` stay."""
    return torch.cat([x.flip(0).cumsum(0).flip(0), x.new_zeros(1)])


def cholesky(spread: Tensor, ridge: float) -> Tensor:
    """Cholesky factor (n, n) of a spread plus `ridge` times its mean variance on the diagonal.

    Where that is below the rounding of the sums, which are made of products in float32, it grows tenfold until there is
    one. Rounding is all there is where the inputs never change.
    """
    eye = torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
    largest = spread.abs().amax() if len(spread) else spread.new_zeros(())
    variance = spread.diagonal().mean() if len(spread) else largest
    added = torch.maximum(ridge * variance, torch.finfo(spread.dtype).eps * largest) + LEAST
    while True:
        factor, fault = torch.linalg.cholesky_ex(spread + added * eye)
        if not fault or not largest.isfinite():
            return factor
        added = 10 * added
