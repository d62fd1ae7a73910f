"""One pass over images: how every head dimension and hidden unit affects the model's output, in float64 sums.

S is one number per batch (`objective_of`), F an activation, G = dS/dF. Nothing is kept per image or token: the sums of
two processes add up to the sums of one, and memory does not grow with the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Images
from ..errors import VitrimError
from ..models.attention_heads import AttentionHeads
from ..models.compensation import Moments
from ..models.sublayers import Tap, elastic
from ..tokens.precision import exact, exact_device, wide
from .probing import all_reduce, batches, frozen, objective_of, output_of


@dataclass
class HeadSums:
    """Sums over tokens for one attention layer; the first dimension holds the streams (H heads of h dimensions).

    These are queries, keys and values (S = 3), or the values alone (S = 1) where no other stream is cut.
    """

    tokens: Tensor
    plain_SHh: Tensor
    weight_SH: Tensor
    first_SHh: Tensor
    second_SHhh: Tensor
    taylor_SHh: Tensor
    mixed: Moments
    mixed_held_out: Moments

    @classmethod
    def zeros(cls, streams_SHh: tuple[int, int, int], inputs: int, device: torch.device) -> "HeadSums":
        """Empty sums for so many streams, heads and dims, and for the inputs of the output projection."""
        streams, heads, dim = streams_SHh
        shapes = ((), streams_SHh, (streams, heads), streams_SHh, (*streams_SHh, dim), streams_SHh)
        a, b, c, d, e, f = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(a, b, c, d, e, f, Moments.zeros(inputs, device), Moments.zeros(inputs, device))

    def add(self, f_TA: Tensor, g_TA: Tensor, covariance: bool) -> None:
        """Add the activations and gradients of T tokens, each row (S, H, h) flattened."""
        f_TA, g_TA = f_TA.to(self.tokens.device), g_TA.to(self.tokens.device)
        shape, double = self.plain_SHh.shape, torch.float64
        taylor = (wide(f_TA) * wide(g_TA)).abs_().view(-1, *shape)
        self.taylor_SHh += taylor.sum(0, dtype=double)
        self.tokens += f_TA.shape[0]
        if not covariance:
            return
        weight = exact(taylor.mean(3)).permute(1, 2, 0)
        f = f_TA.view(-1, *shape).permute(1, 2, 0, 3).to(double, memory_format=torch.contiguous_format)
        weighted = f * weight.unsqueeze(3)
        self.plain_SHh += f.sum(2)
        self.weight_SH += weight.sum(2)
        self.first_SHh += weighted.sum(2)
        self.second_SHhh += weighted.mT @ f

    @property
    def moments(self) -> tuple[Moments, Moments]:
        """Of the inputs of the output projection, head by head: of most images and of those held out."""
        return self.mixed, self.mixed_held_out

    @property
    def has_query_key(self) -> bool:
        """Whether there are sums for queries and keys, besides those for values."""
        return len(self.plain_SHh) > 1

    def covariance(self, *streams: int) -> Tensor:
        """sum w c c^T (H, h, h) over these streams (values: -1), each centred on its own plain mean."""
        centre = self.plain_SHh / self.tokens
        cross = self.first_SHh.unsqueeze(-1) * centre.unsqueeze(-2)
        outer = centre.unsqueeze(-1) * centre.unsqueeze(-2) * self.weight_SH[..., None, None]
        return (self.second_SHhh - cross - cross.mT + outer)[list(streams)].sum(0)

    def energy(self, value_Hhh: Tensor, query_key_Hhh: Tensor | None) -> Tensor:
        """Importance of dimension j of all heads once the streams are rotated to these axes (h).

        Each stream's saliency, the mean |G F|, is spread over its new axes by their part of the weighted variance. The
        root of the variance is taken because saliency is linear in the activations.
        """
        shares = torch.zeros_like(self.plain_SHh[0])
        for streams, axes in (((-1,), value_Hhh), ((0, 1), query_key_Hhh)):
            if axes is None:
                continue
            variance = torch.einsum("hij,hik,hkj->hj", axes, self.covariance(*streams), axes).clamp_min(0).sqrt()
            saliency = self.weight_SH[list(streams)].sum(0) / self.tokens
            shares += variance / variance.sum(1, keepdim=True).clamp_min(1e-300) * saliency[:, None]
        return shares.sum(0)

    @property
    def taylor(self) -> Tensor:
        """Mean |G F| of dimension j of the streams over tokens, summed over streams and heads (h)."""
        return (self.taylor_SHh / self.tokens).sum((0, 1))


@dataclass
class UnitSums:
    """Sums over tokens for the hidden units of one MLP."""

    tokens: Tensor
    taylor_sum: Tensor
    fisher_sum: Tensor
    hidden: Moments
    hidden_held_out: Moments

    @classmethod
    def zeros(cls, units: int, device: torch.device) -> "UnitSums":
        """Empty sums."""
        shapes = ((), (units,), (units,))
        tokens, taylor, fisher = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(tokens, taylor, fisher, Moments.zeros(units, device), Moments.zeros(units, device))

    def add(self, a_TU: Tensor, g_TU: Tensor) -> None:
        """Add the activations and gradients of T tokens."""
        a_TU, g_TU = a_TU.to(self.tokens.device), g_TU.to(self.tokens.device)
        self.tokens += a_TU.shape[0]
        product = wide(a_TU) * wide(g_TU)
        self.taylor_sum += product.abs().sum(0, dtype=torch.float64)
        self.fisher_sum += product.square_().sum(0, dtype=torch.float64) / 2

    @property
    def taylor(self) -> Tensor:
        """Mean |G F| of every unit."""
        return self.taylor_sum / self.tokens

    @property
    def moments(self) -> tuple[Moments, Moments]:
        """Of the inputs of the last projection: of most images and of those held out."""
        return self.hidden, self.hidden_held_out

    @property
    def fisher(self) -> Tensor:
        """Mean 0.5 G^2 F^2 of every unit."""
        return self.fisher_sum / self.tokens


Sums = HeadSums | UnitSums


def add_weighted(moments: Moments, held_out: Moments, f_BNA: Tensor, g_BNA: Tensor) -> None:
    """Add activations of images, each token with its weight, see `token_weights`; every fourth image is held out."""
    device = moments.weight.device
    f_BNA, weight_BN = wide(f_BNA.to(device)), token_weights(g_BNA.to(device))
    apart = held_out_images(len(f_BNA), device)
    for sums, images in ((moments, ~apart), (held_out, apart)):
        sums.add(f_BNA[images].flatten(0, 1), weight_BN[images].flatten())


def held_out_images(number: int, device: torch.device) -> Tensor:
    """Which images of a batch are held out (B,): every fourth."""
    return torch.arange(number, device=device) % 4 == 3


def token_weights(g_BNA: Tensor) -> Tensor:
    """How much an error in each token counts (B, N): 1, plus its squared gradient over the mean of its image.

    To first order an error counts by its squared gradient; with equal weights alone, patch tokens would dominate, which
    hardly matter to a head that reads CLS. But few tokens have a large gradient, too few for a regression of many units
    on few images, and the others steer later attention: hence the 1. Gradients are compared within one image, so that
    confident images count like the others and batches of any size give the same sums.
    """
    size = wide(g_BNA).square().sum(-1)
    return 1 + size / size.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def tensors_in(sums: Any) -> Iterator[Tensor]:
    """Every sum, for the addition over processes."""
    for option in fields(sums):
        value = getattr(sums, option.name)
        yield from [value] if isinstance(value, Tensor) else tensors_in(value)


def collect(
    model: nn.Module, data: Images, num_images: int = 1024, labels: bool = False, covariance: bool = True
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
            if isinstance(layer, AttentionHeads):
                streams = (layer.cut_streams, layer.value_heads, width)
                sums[name] = HeadSums.zeros(streams, layer.kept_inputs(width), device)
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
    parts = [all_reduce(part) for each in sums.values() for part in tensors_in(each)]
    if not all(part.isfinite().all() for part in parts):
        raise VitrimError("activations or gradients are not finite; check the weights of the model and the images")
    if not any(each.taylor.any() for each in sums.values()):
        raise VitrimError("the outputs do not depend on any sub-layer (no gradient); check the weights and the images")
    return sums


def _tap(sums: Sums, covariance: bool) -> Tap:
    # Everything is added in the backward pass, since activation checkpointing runs the forward pass twice.
    def tap(name: str, x: Tensor) -> None:
        f = x.detach()
        if not x.requires_grad:
            x.requires_grad_()

        def add(g: Tensor) -> None:
            if name == "streams":
                assert isinstance(sums, HeadSums)
                sums.add(f.flatten(0, 1), g.flatten(0, 1), covariance)
            if name == "hidden":
                assert isinstance(sums, UnitSums)
                sums.add(f.flatten(0, 1), g.flatten(0, 1))
            if covariance and name != "streams":
                add_weighted(*sums.moments, f, g)

        x.register_hook(add)

    return tap
