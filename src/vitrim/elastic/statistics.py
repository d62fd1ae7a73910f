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
from ..models.widths.attention_heads import AttentionHeads
from ..models.widths.compensation import Moments
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.sublayers import Elastic, Tap, elastic
from ..tokens.precision import exact, exact_device, wide
from .pair_sums import PairSums
from .probing import all_reduce, batches, frozen, objective_of, output_of
from .token_weights import add_weighted, token_weights


@dataclass
class HeadSums:
    """Sums over tokens for one attention layer; the first dimension holds the streams (H heads of h dimensions).

    These are queries, keys and values (S = 3), or the values alone (S = 1) where no other stream is rotated.
    pairs: of the rotary pairs of queries and keys, where they can be cut.
    """

    tokens: Tensor
    plain_SHh: Tensor
    weight_SH: Tensor
    first_SHh: Tensor
    second_SHhh: Tensor
    taylor_SHh: Tensor
    mixed: Moments
    mixed_held_out: Moments
    pairs: PairSums | None = None

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


def tensors_in(sums: Any) -> Iterator[Tensor]:
    """Every sum, for the addition over processes."""
    for option in fields(sums):
        value = getattr(sums, option.name)
        if value is not None:
            yield from [value] if isinstance(value, Tensor) else tensors_in(value)


def collect(
    model: nn.Module, data: Images, num_images: int = 1024, labels: bool = False, covariance: bool = True
) -> dict[str, Sums]:
    """Sums for every sub-layer, by name, over `num_images` images in eval mode; added up over all processes.

    Costs a forward pass and a backward pass without weight gradients; `covariance` adds the second moments.

    Raises:
        DataError: no images, or labels that are not classes.
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
                streams = (layer.cut_streams, layer.value_heads, layer.units_at(width))
                sums[name] = heads = HeadSums.zeros(streams, layer.kept_inputs(width), device)
                if covariance and isinstance(layer, ElasticValues) and layer.cuts_pairs:
                    heads.pairs = PairSums.zeros(layer.num_heads, layer.pairs_at(width), device)
            else:
                sums[name] = UnitSums.zeros(width, device)
            layer.vitrim_tap = _tap(layer, sums[name], covariance)
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


def _tap(layer: Elastic, sums: Sums, covariance: bool) -> Tap:
    # Everything is added in the backward pass, since activation checkpointing runs the forward pass twice.
    def tap(name: str, x: Tensor, *behind: Tensor) -> None:
        f, behind = x.detach(), tuple(each.detach() for each in behind)
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
            if name == "mixed" and behind and isinstance(sums, HeadSums) and sums.pairs is not None:
                assert isinstance(layer, ElasticValues)
                query, key, value = behind
                sums.pairs.add(layer, query, key, value, token_weights(g))

        x.register_hook(add)

    return tap
