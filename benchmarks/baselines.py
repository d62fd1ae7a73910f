"""EViT and ToMe the plain way: attention matrices written out in full, every query and projection computed.

They say what fused attention and left-out work gain. They take the weights of a timm model without q/k norm, and agree
with `TopK(fuse="sum")` and `ToMe()` of vitrim: in all logits for EViT; for ToMe in the first merge, after which the
published form puts odd tokens behind even ones, where vitrim keeps the original order and so forms other pairs.

`first_tokens` chooses nothing and keeps the first tokens: the time that remains when choosing them is free.
"""

from collections.abc import Sequence
from copy import deepcopy
from math import ceil

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class _PlainBlock(nn.Module):
    """A timm block whose attention probabilities are a tensor; subclasses reduce between attention and MLP."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def attention(self, x_BTC: Tensor, size_BT1: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output of attention (B, T, C), probabilities (B, H, T, T), keys (B, H, T, D)."""
        num_images, num_tokens, width = x_BTC.shape
        attn = self.attn
        qkv = attn.qkv(x_BTC).reshape(num_images, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        if size_BT1 is not None:
            logits = logits + size_BT1.log()[:, None, None, :, 0]
        probability = logits.softmax(dim=-1)
        out = (probability @ value).transpose(1, 2).reshape(num_images, num_tokens, width)
        return self.ls1(attn.proj(out)), probability, key

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        """The MLP with its residual."""
        return x_BTC + self.ls2(self.mlp(self.norm2(x_BTC)))


class EViTBlock(_PlainBlock):
    """Keep the tokens that CLS attends to; fuse the others into one, weighted by that attention."""

    def __init__(self, block: nn.Module, keep_rate: float | None) -> None:
        super().__init__(block)
        self.keep_rate = keep_rate

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, C) in, (B, 2 + ceil(rate * (T - 1)), C) out; unchanged in number without a rate."""
        out, probability, _ = self.attention(self.norm1(x))
        x = x + out
        if self.keep_rate is not None:
            patches = x[:, 1:]
            score_BN = probability[:, :, 0, 1:].mean(dim=1)
            keep = ceil(self.keep_rate * patches.shape[1] - 1e-9)
            order_BN = score_BN.argsort(dim=1, descending=True, stable=True)
            kept_BK, rest_BR = order_BN[:, :keep].sort(dim=1).values, order_BN[:, keep:]
            kept = patches.gather(1, kept_BK.unsqueeze(2).expand(-1, -1, patches.shape[2]))
            rest = patches.gather(1, rest_BR.unsqueeze(2).expand(-1, -1, patches.shape[2]))
            fused = (rest * score_BN.gather(1, rest_BR).unsqueeze(2)).sum(dim=1, keepdim=True)
            x = torch.cat([x[:, :1], kept, fused], dim=1)
        return self.feed_forward(x)


class ToMeBlock(_PlainBlock):
    """Merge the `r` most similar pairs of an even and an odd patch token, with proportional attention."""

    def __init__(self, block: nn.Module, r: int, sizes: dict[str, Tensor | None]) -> None:
        super().__init__(block)
        self.r, self.sizes = r, sizes

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, C) in, (B, T - r, C) out."""
        size_BT1 = self.sizes["size"]
        out, _, key = self.attention(self.norm1(x), size_BT1)
        x = x + out
        if size_BT1 is None:
            size_BT1 = torch.ones_like(x[..., :1])
        x, self.sizes["size"] = self._merge(x, size_BT1, key.mean(dim=1))
        return self.feed_forward(x)

    def _merge(self, x_BTC: Tensor, size_BT1: Tensor, metric_BTD: Tensor) -> tuple[Tensor, Tensor]:
        metric = F.normalize(metric_BTD[:, 1:], dim=-1)
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best, partner = similarity.max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        num_moved = min(self.r, similarity.shape[2])
        moved, stay = order[:, :num_moved], order[:, num_moved:].sort(dim=-1).values
        target = partner.gather(1, moved)

        def merged(tokens: Tensor) -> Tensor:
            even, odd, width = tokens[:, 1::2], tokens[:, 2::2], tokens.shape[2]
            source = even.gather(1, moved.unsqueeze(2).expand(-1, -1, width))
            odd = odd.scatter_add(1, target.unsqueeze(2).expand(-1, -1, width), source)
            return torch.cat([tokens[:, :1], even.gather(1, stay.unsqueeze(2).expand(-1, -1, width)), odd], dim=1)

        size = merged(size_BT1)
        return merged(x_BTC * size_BT1) / size, size


class FirstTokensBlock(nn.Module):
    """A timm block with fused attention, after which only the first tokens stay."""

    def __init__(self, block: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.block, self.num_tokens = block, num_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, C) in, (B, num_tokens, C) out."""
        block = self.block
        x = (x + block.ls1(block.attn(block.norm1(x))))[:, : self.num_tokens]
        return x + block.ls2(block.mlp(block.norm2(x)))


class PlainViT(nn.Module):
    """A timm classifier on CLS whose blocks have been replaced."""

    def __init__(self, model: VisionTransformer, sizes: dict[str, Tensor | None] | None = None) -> None:
        super().__init__()
        self.model, self.sizes, self.pretrained_cfg = model, sizes, {"input_size": _input_size(model)}

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, height, width)."""
        if self.sizes is not None:
            self.sizes["size"] = None
        return self.model(x)


def evit_materialised(model: VisionTransformer, keep_rate: float, at: tuple[int, ...] | None = None) -> nn.Module:
    """A copy of the model as EViT with a fused token; cuts inside a quarter, half and three quarters of the blocks."""
    model, depth = deepcopy(model), len(model.blocks)
    at = (depth // 4, depth // 2, 3 * depth // 4) if at is None else at
    blocks = [EViTBlock(block, keep_rate if index in at else None) for index, block in enumerate(model.blocks)]
    model.blocks = nn.Sequential(*blocks)
    return PlainViT(model)


def tome_materialised(model: VisionTransformer, r: int) -> nn.Module:
    """A copy of the model as ToMe that merges `r` tokens in every block."""
    model, sizes = deepcopy(model), {"size": None}
    model.blocks = nn.Sequential(*(ToMeBlock(block, r, sizes) for block in model.blocks))
    return PlainViT(model, sizes)


def first_tokens(model: VisionTransformer, token_counts: Sequence[int]) -> nn.Module:
    """A copy of the model of whose tokens the first so many leave each block."""
    model = deepcopy(model)
    model.blocks = nn.Sequential(*map(FirstTokensBlock, model.blocks, token_counts))
    return PlainViT(model)


def _input_size(model: VisionTransformer) -> tuple[int, int, int]:
    return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
