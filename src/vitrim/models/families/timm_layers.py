"""timm's attention and MLP layers at a variable width, and the rotations and permutations that they are blind to."""

import math
from typing import Any

import torch
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModelError
from ..macs import Macs
from ..slicing import check_norm, compensate, cut_linear, cut_norm, leading, narrow_norm
from ..sublayers import Elastic


class ElasticAttention(Elastic, Attention, replaces=Attention):
    """timm's `Attention` on the leading dims of every head. Always with the scale of the full head dimension."""

    kind = "attention"

    @property
    def last(self) -> nn.Linear:
        return self.proj

    @property
    def full_width(self) -> int:
        return self.head_dim

    @property
    def rotates_query_key(self) -> bool:
        """Whether queries and keys may be rotated: not under a norm, which only permutations commute with."""
        return isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)

    def refuse(self, name: str) -> None:
        if self.gate is not None or not isinstance(self.norm, nn.Identity):
            between = "gate" if self.gate is not None else "norm"
            raise UnsupportedModelError(
                f"{name} has a {between} between attention and output projection, which forbids rotating the values"
            )
        for norm in (self.q_norm, self.k_norm):
            check_norm(norm, f"{name}.q_norm")
        if not self.rotates_query_key and getattr(self.q_norm, "weight", None) is None:
            raise UnsupportedModelError(f"{name}.q_norm has no weight, so the softmax scale has no place to go")

    def unit_macs(self, tokens: int) -> Macs:
        return Macs(self.num_heads * tokens * 4 * self.qkv.in_features, 2 * self.num_heads * tokens**2)

    def unit_params(self) -> int:
        biases = 0 if self.qkv.bias is None else 3
        norms = sum(p.numel() // self.head_dim for n in (self.q_norm, self.k_norm) for p in n.parameters())
        return self.num_heads * (4 * self.qkv.in_features + biases) + norms

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        width, heads = self.vitrim_width, self.num_heads
        if width == 0:
            return self.proj_drop(self.constant(x, self.proj.bias))
        bias = self.qkv.bias
        qkv = F.linear(
            x, leading(self.qkv.weight, width, 3 * heads), None if bias is None else leading(bias, width, 3 * heads)
        )
        self.tap("qkv", qkv)
        query, key, value = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            narrow_norm(self.q_norm, query),
            narrow_norm(self.k_norm, key),
            value,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        self.tap("mixed", mixed)
        return self.proj_drop(F.linear(mixed, leading(self.proj.weight, width, heads, dim=1), self.proj.bias))

    @torch.no_grad()
    def rotate(self, value_Hhh: Tensor, query_key_Hhh: Tensor | None = None) -> None:
        """Rotate every head's values, and its queries and keys together, by orthogonal matrices (columns: new axes)."""
        heads, dim = self.num_heads, self.head_dim
        weight = self.qkv.weight.double().view(3, heads, dim, -1)
        bias = None if self.qkv.bias is None else self.qkv.bias.double().view(3, heads, dim)
        for stream, matrix in enumerate((query_key_Hhh, query_key_Hhh, value_Hhh)):
            if matrix is not None:
                weight[stream] = matrix.mT @ weight[stream]
                if bias is not None:
                    bias[stream] = torch.einsum("hij,hi->hj", matrix, bias[stream])
        self.qkv.weight.copy_(weight.flatten(0, 2))
        if bias is not None:
            self.qkv.bias.copy_(bias.flatten())
        columns = self.proj.weight.double().view(-1, heads, dim)
        self.proj.weight.copy_(torch.einsum("chi,hij->chj", columns, value_Hhh).flatten(1))

    @torch.no_grad()
    def order_query_key(self, order_h: Tensor) -> None:
        """Put the query and key dims of all heads, and the weights of their norms, in one and the same order."""
        for parameter in self.qkv.parameters():
            parameter.view(3, self.num_heads, self.head_dim, -1)[:2] = parameter.view(
                3, self.num_heads, self.head_dim, -1
            )[:2][:, :, order_h]
        for norm in (self.q_norm, self.k_norm):
            for parameter in norm.parameters():
                parameter.copy_(parameter[order_h])

    def shrink(self, width: int, mean: Tensor | None = None) -> None:
        heads, dim = self.num_heads, self.head_dim
        lost = (torch.arange(dim) >= width).repeat(heads)
        compensate(self.proj.bias, self.proj, mean, lost)
        cut_linear(self.qkv, width, 3 * heads)
        cut_linear(self.proj, width, heads, dim=1)
        cut_norm(self.q_norm, width)
        cut_norm(self.k_norm, width)
        # A stock layer divides by the root of its own head dimension: make up for it where a factor survives.
        fold = math.sqrt(width / dim)
        with torch.no_grad():
            if self.rotates_query_key:
                for parameter in self.qkv.parameters():
                    parameter[: heads * width] *= fold
            else:
                for parameter in self.q_norm.parameters():
                    parameter *= fold
        self.head_dim, self.attn_dim = width, heads * width
        self.scale = width**-0.5
        self.vitrim_width = width


class ElasticHidden(Elastic):
    """What the MLPs share: hidden units in one or two rows of weights, a norm at most, and a last projection."""

    kind = "mlp"
    fc2: nn.Linear
    norm: nn.Module

    @property
    def first(self) -> tuple[tuple[Any, int], ...]:
        """The layers that make the hidden units, each with how many rows of a unit it holds."""
        raise NotImplementedError

    @property
    def last(self) -> nn.Linear:
        return self.fc2

    @property
    def full_width(self) -> int:
        return self.fc2.in_features

    def refuse(self, name: str) -> None:
        if not isinstance(self.fc2, nn.Linear):
            raise UnsupportedModelError(f"{name} is built of {type(self.fc2).__name__}; only linear layers can be cut")
        check_norm(self.norm, f"{name}.norm")

    def unit_macs(self, tokens: int) -> Macs:
        rows = sum(linear.in_features * parts for linear, parts in self.first)
        return Macs(tokens * (rows + self.fc2.out_features))

    def unit_params(self) -> int:
        rows = sum(parts * (linear.in_features + (linear.bias is not None)) for linear, parts in self.first)
        return rows + self.fc2.out_features + sum(1 for _ in self.norm.parameters())

    def made(self, x: Tensor, index: int = 0) -> Tensor:
        """The rows that layer `index` of `first` makes, cut to the present width."""
        linear, parts = self.first[index]
        bias = None if linear.bias is None else leading(linear.bias, self.vitrim_width, parts)
        return F.linear(x, leading(linear.weight, self.vitrim_width, parts), bias)

    def activate(self, x: Tensor) -> Tensor:
        """Hidden units after activation and gate, at the present width."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.vitrim_width == 0:
            return self.drop2(self.constant(x, self.fc2.bias))
        hidden = narrow_norm(self.norm, self.drop1(self.activate(x)))
        self.tap("hidden", hidden)
        return self.drop2(F.linear(hidden, leading(self.fc2.weight, self.vitrim_width, dim=1), self.fc2.bias))

    @torch.no_grad()
    def order_units(self, order: Tensor) -> None:
        """Put the hidden units in this order; gate and value rows stay together."""
        for linear, parts in self.first:
            for parameter in linear.parameters():
                parameter.copy_(parameter.unflatten(0, (parts, -1))[:, order].flatten(0, 1))
        for parameter in self.norm.parameters():
            parameter.copy_(parameter[order])
        self.fc2.weight.copy_(self.fc2.weight[:, order])

    def shrink(self, width: int, mean: Tensor | None = None) -> None:
        compensate(self.fc2.bias, self.fc2, mean, torch.arange(self.full_width) >= width)
        for linear, parts in self.first:
            cut_linear(linear, width, parts)
        cut_norm(self.norm, width)
        cut_linear(self.fc2, width, dim=1)
        self.vitrim_width = width


class ElasticMlp(ElasticHidden, Mlp, replaces=Mlp):
    """timm's `Mlp` on its leading hidden units."""

    @property
    def first(self) -> tuple[tuple[Any, int], ...]:
        return ((self.fc1, 1),)

    def activate(self, x: Tensor) -> Tensor:
        return self.act(self.made(x))


class ElasticGluMlp(ElasticHidden, GluMlp, replaces=GluMlp):
    """timm's `GluMlp` (packed SwiGLU): value and gate rows of a unit lie in the two halves of one layer."""

    @property
    def first(self) -> tuple[tuple[Any, int], ...]:
        return ((self.fc1, 2),)

    def activate(self, x: Tensor) -> Tensor:
        one, two = self.made(x).chunk(2, dim=-1)
        return one * self.act(two) if self.gate_last else self.act(one) * two


class ElasticSwiGLU(ElasticHidden, SwiGLU, replaces=SwiGLU):
    """timm's `SwiGLU`, whose gate and value rows lie in two layers."""

    @property
    def first(self) -> tuple[tuple[Any, int], ...]:
        return ((self.fc1_g, 1), (self.fc1_x, 1))

    def activate(self, x: Tensor) -> Tensor:
        return self.act(self.made(x, 0)) * self.made(x, 1)
