"""One pass over images: how every head dimension and hidden unit affects the model's output, in float64 sums.

S is one number per batch (`objective_of`), F an activation, G = dS/dF. Nothing is kept per image or token: the sums of
two processes add up to the sums of one, and memory does not grow with the number of images.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import VitrimError
from ..models.elastic_layers import ElasticHeads
from ..models.sublayers import elastic
from ..tokens.precision import exact, exact_device, wide
from .probing import Batch, all_reduce, batches, frozen, objective_of, output_of

TINY = torch.finfo(torch.float64).tiny


@dataclass
class HeadSums:
    """Sums over tokens for one attention layer; the first dimension holds q, k, v (H heads of h dimensions)."""

    tokens: Tensor
    plain_3Hh: Tensor
    weight_3H: Tensor
    first_3Hh: Tensor
    second_3Hhh: Tensor
    taylor_3Hh: Tensor
    gradient_weight: Tensor
    mixed_Hh: Tensor

    @classmethod
    def zeros(cls, heads: int, dim: int, device: torch.device) -> "HeadSums":
        """Empty sums."""
        streams = (3, heads, dim)
        shapes = ((), streams, (3, heads), streams, (*streams, dim), streams, (), (heads, dim))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, f_TA: Tensor, g_TA: Tensor, covariance: bool) -> None:
        """Add the activations and gradients of T tokens, each row (3, H, h) flattened."""
        f_TA, g_TA = f_TA.to(self.tokens.device), g_TA.to(self.tokens.device)
        shape, double = self.plain_3Hh.shape, torch.float64
        taylor = (wide(f_TA) * wide(g_TA)).abs_().view(-1, *shape)
        self.taylor_3Hh += taylor.sum(0, dtype=double)
        self.tokens += f_TA.shape[0]
        if not covariance:
            return
        weight = exact(taylor.mean(3)).permute(1, 2, 0)
        f = f_TA.view(-1, *shape).permute(1, 2, 0, 3).to(double, memory_format=torch.contiguous_format)
        weighted = f * weight.unsqueeze(3)
        self.plain_3Hh += f.sum(2)
        self.weight_3H += weight.sum(2)
        self.first_3Hh += weighted.sum(2)
        self.second_3Hhh += weighted.mT @ f

    def add_mixed(self, f_TA: Tensor, g_TA: Tensor) -> None:
        """Add the inputs of the output projection for T tokens, and their gradients."""
        f_TA, g_TA = f_TA.to(self.tokens.device), g_TA.to(self.tokens.device)
        weight, sum_A = gradient_weighted_sum(f_TA, g_TA)
        self.gradient_weight += weight
        self.mixed_Hh += sum_A.view_as(self.mixed_Hh)

    def covariance(self, *streams: int) -> Tensor:
        """sum w c c^T (H, h, h) over these streams, each centred on its own plain mean."""
        centre = self.plain_3Hh / self.tokens
        cross = self.first_3Hh.unsqueeze(-1) * centre.unsqueeze(-2)
        outer = centre.unsqueeze(-1) * centre.unsqueeze(-2) * self.weight_3H[..., None, None]
        return (self.second_3Hhh - cross - cross.mT + outer)[list(streams)].sum(0)

    def energy(self, value_Hhh: Tensor, query_key_Hhh: Tensor) -> Tensor:
        """Importance of dimension j of all heads once the streams are rotated to these axes (h).

        Each stream's saliency, the mean |G F|, is spread over its new axes by their part of the weighted variance. The
        root of the variance is taken because saliency is linear in the activations.
        """
        shares = torch.zeros_like(self.plain_3Hh[0])
        for streams, axes in (((2,), value_Hhh), ((0, 1), query_key_Hhh)):
            variance = torch.einsum("hij,hik,hkj->hj", axes, self.covariance(*streams), axes).clamp_min(0).sqrt()
            saliency = self.weight_3H[list(streams)].sum(0) / self.tokens
            shares += variance / variance.sum(1, keepdim=True).clamp_min(1e-300) * saliency[:, None]
        return shares.sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean of every dimension that enters the output projection (H*h), see `gradient_weighted_sum`."""
        return self.mixed_Hh.flatten() / self.gradient_weight.clamp_min(TINY)

    @property
    def taylor(self) -> Tensor:
        """Mean |G F| of dimension j of q, k and v over tokens, summed over heads (h)."""
        return (self.taylor_3Hh / self.tokens).sum((0, 1))


@dataclass
class UnitSums:
    """Sums over tokens for the hidden units of one MLP."""

    tokens: Tensor
    gradient_weight: Tensor
    weighted_sum: Tensor
    taylor_sum: Tensor
    fisher_sum: Tensor

    @classmethod
    def zeros(cls, units: int, device: torch.device) -> "UnitSums":
        """Empty sums."""
        shapes = ((), (), (units,), (units,), (units,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, a_TU: Tensor, g_TU: Tensor) -> None:
        """Add the activations and gradients of T tokens."""
        a_TU, g_TU = a_TU.to(self.tokens.device), g_TU.to(self.tokens.device)
        self.tokens += a_TU.shape[0]
        weight, sum_U = gradient_weighted_sum(a_TU, g_TU)
        self.gradient_weight += weight
        self.weighted_sum += sum_U
        product = wide(a_TU) * wide(g_TU)
        self.taylor_sum += product.abs().sum(0, dtype=torch.float64)
        self.fisher_sum += product.square_().sum(0, dtype=torch.float64) / 2

    @property
    def mean(self) -> Tensor:
        """Mean of every unit's input to the last projection, see `gradient_weighted_sum`."""
        return self.weighted_sum / self.gradient_weight.clamp_min(TINY)

    @property
    def taylor(self) -> Tensor:
        """Mean |G F| of every unit."""
        return self.taylor_sum / self.tokens

    @property
    def fisher(self) -> Tensor:
        """Mean 0.5 G^2 F^2 of every unit."""
        return self.fisher_sum / self.tokens


Sums = HeadSums | UnitSums


def gradient_weighted_sum(f_TA: Tensor, g_TA: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the squared gradient |G|^2, and the sum of activations (T, A) weighted by it, (A).

    Their quotient over all batches is the constant c that replaces F best, the minimum of E[|G|^2 |F - c|^2]. A plain
    mean would be dominated by patch tokens, which hardly matter to a head that reads CLS.
    """
    weight_T = wide(g_TA).square().sum(1)
    return weight_T.sum(dtype=torch.float64), exact(weight_T @ wide(f_TA))


def collect(
    model: nn.Module, data: Iterable[Batch], num_images: int = 1024, labels: bool = False, covariance: bool = True
) -> dict[str, Sums]:
    """Sums for every sub-layer, by name, over `num_images` images in eval mode; added up over all processes.

    Costs a forward pass and a backward pass without weight gradients; `covariance` adds the second moments.

    Raises:
        DataError: no images, or labels that are no classes.
        VitrimError: no sub-layer is left, a sum is not finite, or gradients are switched off here.
    """
    if torch.is_inference_mode_enabled():
        raise VitrimError(
            "importance needs gradients, which torch.inference_mode() switches off; call this outside of it"
        )
    objective = objective_of(model, labels)
    with elastic(model) as layers, frozen(model):
        device = exact_device(next(model.parameters()).device)
        sums: dict[str, Sums] = {}
        for name, layer in layers.items():
            width = layer.vitrim_width
            if width == 0:
                continue
            if isinstance(layer, ElasticHeads):
                sums[name] = HeadSums.zeros(layer.num_heads, width, device)
            else:
                sums[name] = UnitSums.zeros(width, device)
            layer.vitrim_tap = _tap(sums[name], covariance)
        if not sums:
            raise VitrimError("every sub-layer of this network was removed, so there is nothing to order or to cut")
        try:
            for images, target in batches(data, model, num_images, labels):
                with torch.enable_grad():
                    objective(output_of(model, images), target).backward()
        finally:
            for layer in layers.values():
                layer.vitrim_tap = None
    parts = [getattr(each, option.name) for each in sums.values() for option in fields(each)]
    if not all(all_reduce(part).isfinite().all() for part in parts):
        raise VitrimError("activations or gradients are not finite; check the weights of the model and the images")
    return sums


def _tap(sums: Sums, covariance: bool) -> Callable[[str, Tensor], None]:
    # Everything is added in the backward pass, since activation checkpointing runs the forward pass twice.
    def tap(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, 1)
        if not x.requires_grad:
            x.requires_grad_()
        if isinstance(sums, UnitSums):
            add: Callable[[Tensor, Tensor], None] = sums.add
        else:
            add = sums.add_mixed if name == "mixed" else partial(sums.add, covariance=covariance)
        x.register_hook(lambda g: add(flat, g.flatten(0, 1)))

    return tap
