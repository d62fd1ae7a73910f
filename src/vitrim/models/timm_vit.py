"""Adapter for timm's `VisionTransformer` and `VisionTransformerDistilled` built on the standard `Block`."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UnsupportedModelError
from ..tokens import Plan, Reducer
from .adapter import Adapter, BlockShape, Geometry, Macs, block_macs
from .attach import Handle, exporting
from .reduced import ReducedBlock


class ReducedTimmBlock(ReducedBlock, Block):
    """`Block` with a cut: the block's own norm, projections, layer scale and drop path, on fused attention."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self.attn
        part = slice(first * attn.attn_dim, last * attn.attn_dim)
        if type(attn.qkv) is nn.Linear:
            bias = attn.qkv.bias
            out = F.linear(normed_BTC, attn.qkv.weight[part], None if bias is None else bias[part])
        else:  # An adapter or a quantised layer put in its place: ask it for everything.
            out = attn.qkv(normed_BTC)[..., part]
        streams = out.unflatten(-1, (last - first, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        norms = (attn.q_norm, attn.k_norm, nn.Identity())[first:last]
        return tuple(norm(stream) for norm, stream in zip(norms, streams, strict=True))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        attn = self.attn
        dropout = attn.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(normed_BQC).sigmoid()
        return self.drop_path1(self.ls1(attn.proj_drop(attn.proj(out))))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BTC))))

    @property
    def head_scale(self) -> float:
        return self.attn.head_dim**-0.5


class _ReducedModel(nn.Module):
    """What changes outside the blocks: pooling weighs tokens by size, dense maps are spread back over the grid."""

    vitrim_handle: Handle

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        out = super().forward(*args, **kwargs)
        if exporting():
            self.vitrim_handle.forget()
        return out

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.global_pool if pool_type is None else pool_type
        trace = self.vitrim_handle.last_trace(x.shape[1])
        grown = trace is not None and any(a.moved_BR is not None for _, a in trace.assignments)
        if trace is None or not grown or kind not in ("avg", "avgmax", "map"):
            return super().pool(x, pool_type)
        prefix = self.num_prefix_tokens
        size = trace.state().size.to(x.dtype)
        if self.pool_include_prefix:
            size = F.pad(size, (prefix, 0), value=1.0)
        else:
            x = x[:, prefix:]
        if self.attn_pool is not None:
            mask = size.log()[:, None, None, :] if self.vitrim_handle.reducer.tracks_size else None
            return self.attn_pool(x, attn_mask=mask)
        mean = (x * size.unsqueeze(2)).sum(1) / size.sum(1, keepdim=True)
        return mean if kind == "avg" else 0.5 * (x.amax(1) + mean)

    def forward_intermediates(self, x: Tensor, *args: object, output_fmt: str = "NCHW", **kwargs: object) -> object:
        """As timm's; with output_fmt="NCHW" each map is spread over the whole grid, zero where a token was dropped."""
        if output_fmt != "NCHW":
            return super().forward_intermediates(x, *args, output_fmt=output_fmt, **kwargs)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        out = super().forward_intermediates(x, *args, output_fmt="NLC", **kwargs)
        counts = self.vitrim_handle.plan(grid[0] * grid[1]).token_counts

        def spread(tokens: Tensor) -> Tensor:
            block = counts.index(tokens.shape[1] + self.num_prefix_tokens)
            full = self.vitrim_handle.states[block].spread(tokens)
            return full.transpose(1, 2).unflatten(2, grid).contiguous()

        def each(item: object) -> object:
            if isinstance(item, tuple):
                return spread(item[0]), item[1]
            return spread(item) if isinstance(item, Tensor) else item

        if isinstance(out, dict):
            return {**out, "image_intermediates": [each(item) for item in out["image_intermediates"]]}
        if isinstance(out, tuple):
            return out[0], [each(item) for item in out[1]]
        return [each(item) for item in out]


class ReducedVisionTransformer(_ReducedModel, VisionTransformer):
    """`VisionTransformer` with a reduction attached."""


class ReducedVisionTransformerDistilled(_ReducedModel, VisionTransformerDistilled):
    """`VisionTransformerDistilled` with a reduction attached."""


class TimmViT(Adapter):
    """ViT, DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers, and hybrids, as timm builds them."""

    name = "timm-vit"
    covers = "timm VisionTransformer on the standard Block: ViT, DeiT, DeiT-III, DINOv2, CLIP, SigLIP, hybrids"

    _reduced: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {
        Block: ReducedTimmBlock,
        VisionTransformer: ReducedVisionTransformer,
        VisionTransformerDistilled: ReducedVisionTransformerDistilled,
    }

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def check(self, model: nn.Module) -> None:
        if type(model) not in (*self._reduced, *self._reduced.values()):
            raise UnsupportedModelError(
                f"{type(model).__qualname__} overrides parts of VisionTransformer that the {self.name} adapter "
                f"cannot keep; it covers {self.covers}"
            )
        for index, block in enumerate(model.blocks):
            for part, known in ((block, (Block, ReducedTimmBlock)), (getattr(block, "attn", None), (Attention,))):
                if type(part) not in known:
                    raise UnsupportedModelError(
                        f"blocks.{index} holds a {type(part).__name__}, which the {self.name} adapter cannot cut; "
                        f"it covers {self.covers}"
                    )
        if model.global_pool == "prr":
            raise UnsupportedModelError(f"the {self.name} adapter cannot weigh tokens in a head that pools by 'prr'")

    def geometry(self, model: nn.Module) -> Geometry:
        embed = model.patch_embed
        reads_prefix = model.attn_pool is None and model.global_pool == "token"
        height, width = embed.img_size if embed.img_size is not None else (224, 224)
        return Geometry(
            depth=len(model.blocks),
            num_patches=embed.num_patches,
            num_prefix=model.num_prefix_tokens,
            has_cls=bool(model.has_class_token),
            head="prefix" if reads_prefix else "tokens",
            input_size=(model.in_chans, height, width),
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.blocks)

    def reduced_class(self, module: nn.Module) -> type[nn.Module]:
        return self._reduced[type(module)]

    def macs(self, model: nn.Module, plan: Plan, reducer: Reducer | None) -> Macs:
        total = self._ends(model, plan)
        tokens = plan.num_patches + plan.num_prefix
        for index, (block, leaving) in enumerate(zip(model.blocks, plan.token_counts, strict=True)):
            attn = block.attn
            shape = BlockShape(
                width=attn.qkv.in_features,
                attn_dim=attn.attn_dim,
                head_dim=attn.head_dim,
                mlp_macs=sum(m.in_features * m.out_features for m in block.mlp.modules() if isinstance(m, nn.Linear)),
                gate=attn.gate is not None,
            )
            prefix_only = plan.prefix_only and index == plan.depth - 1
            cuts = plan.cut(index, "before"), plan.cut(index, "inside")
            total += block_macs(shape, tokens, plan.num_prefix, *cuts, prefix_only, reducer)
            tokens = leaving
        return total

    def _ends(self, model: nn.Module, plan: Plan) -> Macs:
        """Patch embedding and head, whose modules are foreign: counted by PyTorch on tensors without storage."""
        param = next(model.parameters())
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            image = torch.empty(1, *self.geometry(model).input_size, device=param.device, dtype=param.dtype)
            tokens = torch.empty(1, plan.token_counts[-1], model.embed_dim, device=param.device, dtype=param.dtype)
            with FlopCounterMode(display=False) as counter:
                model.patch_embed(image)
                model.forward_head(tokens)
        counts = counter.get_flop_counts().get("Global", {})
        products = sum(flops for op, flops in counts.items() if "bmm" in str(op) or "attention" in str(op))
        return Macs((counter.get_total_flops() - products) // 2, products // 2)
