"""Adapter for timm's Gemma 4 ViT, the vision tower of Gemma 4: norms before and after each half of a block.

Queries, keys and values are normed by heads, and queries and keys rotated by tables of cosines and sines that are made
for each image. Its encoder returns patches as (B, N, C), or pools all of them by their places.
"""

from typing import Any, ClassVar, NoReturn

import torch
from timm.models import get_model_input_config
from timm.models.gemma4_vit import (
    Gemma4Attention,
    Gemma4Block,
    Gemma4VitClassifier,
    Gemma4VitEncoder,
    apply_multidimensional_rope,
    checkpoint_filter_fn_classifier,
    checkpoint_filter_fn_encoder,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import VitrimError, WidthError
from ..foreign_macs import macs_per_row
from ..heads import every_head, split_heads
from ..macs import BlockShape, Macs
from ..reduction.exchange import Reduced, intercepted, while_attached
from ..reduction.forward_pass import UNKNOWN
from ..reduction.reduced_block import ReducedBlock
from ..reduction.reduced_model import ReducedModel
from ..reduction.trace import trace_of
from .timm.reduced_towers import ReducedClassifier, ReducedEncoder, averages, grid_of
from .timm.towers import _TimmTower
from .timm_vit import Classes

_DEFAULT_SIZE = (768, 768)
"""Of the images of an encoder that timm's factory did not make, which does not say it."""


class _TwoTables(Reduced):
    """Between `ReducedBlock`, which knows one rotary table, and a block that takes cosines and sines apart."""

    def forward(self, x: Tensor, rope: Any, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, *rope, attn_mask=attn_mask)


class ReducedGemma4Block(ReducedBlock, _TwoTables, Gemma4Block):
    """`Gemma4Block` with a cut."""

    rotary_argument = "rope"
    mask_argument = "attn_mask"
    attn: Any

    @while_attached
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (takes what timm's block takes)
        self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(x, rope=(rope_cos, rope_sin), attn_mask=attn_mask)

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self.attn
        layers = ((attn.q_proj, attn.q_norm), (attn.k_proj, attn.k_norm), (attn.v_proj, attn.v_norm))[first:last]
        streams = (norm(split_heads(layer(normed_BTC), dim=attn.head_dim)) for layer, norm in layers)
        return tuple(every_head(stream, attn.num_heads) for stream in streams)

    def rows_of_table(self, table: Any, place_BM: Tensor) -> Any:
        return tuple(part.gather(1, place_BM.unsqueeze(2).expand(-1, -1, part.shape[2])) for part in table)

    def rotate(self, stream_BHTD: Tensor, table: Any) -> Tensor:
        return apply_multidimensional_rope(stream_BHTD, *table, ndim=2, unsqueeze_dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        attn = self.attn
        if attn.fused_attn:
            dropout = attn.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=1.0)
        else:
            logits = query @ key.transpose(-2, -1)
            out = attn.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1)) @ value
        return self._added(attn.proj_drop(attn.o_proj(out.transpose(1, 2).flatten(2))))

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        return self._added(self.attn(normed_BTC, *table, attn_mask=bias)) if self.runs_whole(bias) else None

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path(self.norm4(self.mlp(self.norm3(x_BTC))))

    @property
    def head_scale(self) -> float:
        return 1.0  # Queries and keys are normed.

    def _added(self, attended: Tensor) -> Tensor:
        return self.drop_path(self.norm2(attended))


class ReducedGemma4VitEncoder(ReducedEncoder, Gemma4VitEncoder):
    """`Gemma4VitEncoder` with a reduction attached."""

    @while_attached
    def forward(self, x: Any, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None) -> Tensor:
        _check_images(x, patch_coord, patch_valid)
        if self.global_pool != "soft":
            return super().forward(x) if self.global_pool == "avg" or self.vitrim_inside else self.forward_features(x)
        with self.open_call(x):
            return pooled_by_place(self, self.forward_features(x), grid_of(self, x.shape[-2:]))

    @while_attached
    def forward_features(self, x: Any, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None) -> Tensor:
        """All patches (B, N, C), restored."""
        _check_images(x, patch_coord, patch_valid)
        return super().forward_features(x)

    @while_attached
    def forward_intermediates(  # pyright: ignore[reportIncompatibleMethodOverride]  (in the order of timm's)
        self,
        x: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        _check_images(x, patch_coord, patch_valid)
        out = super().forward_intermediates(
            x, indices, False, norm, stop_early, output_fmt, intermediates_only, output_dict
        )
        if output_dict:
            rows, columns = grid_of(self, x.shape[-2:])
            out["patch_valid"] = torch.ones(x.shape[0], rows * columns, dtype=torch.bool, device=x.device)
        return out

    def vitrim_shaped(self, whole_BNC: Tensor, images: Tensor) -> Tensor:
        return whole_BNC


class ReducedGemma4VitClassifier(ReducedClassifier, Gemma4VitClassifier):
    """`Gemma4VitClassifier` with a reduction attached."""

    @while_attached
    def forward(self, x: Any, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None) -> Tensor:
        _check_images(x, patch_coord, patch_valid)
        return super().forward(x)

    @while_attached
    def forward_head(  # pyright: ignore[reportIncompatibleMethodOverride]  (in the order of timm's)
        self, x: Tensor, patch_valid: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        if averages(self) and trace_of(x) is None and not self.vitrim_policy.idle(self.training):
            raise VitrimError(UNKNOWN)  # Nothing tells the tokens that are left from restored ones.
        return super(ReducedModel, self).forward_head(self.vitrim_pooled(x), None, pre_logits)


def pooled_by_place(tower: Any, whole_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """What Gemma's pooling makes of all patches of images of so many rows and columns."""
    coordinates, _ = tower.patch_embed._default_patch_coord(len(whole_BNC), *grid, whole_BNC.device)
    out, _ = tower.pooler(whole_BNC, coordinates.flip(-1), None)
    return out if tower.std_bias is None else (out - tower.std_bias) * tower.std_scale


def _check_images(x: Any, *places: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or any(each is not None for each in places):
        raise VitrimError(
            "a reduced Gemma 4 ViT takes images (B, C, H, W) of one size, no patches with coordinates; call "
            "handle.remove() first"
        )


class TimmGemma4(_TimmTower):
    """Vision towers of Gemma 4, and classifiers on them."""

    name = "timm-gemma4"
    covers = "timm Gemma 4 ViT: towers of Gemma 4 with their pooling, and classifiers on them; images of one size"

    _encoder, _classifier = Gemma4VitEncoder, Gemma4VitClassifier
    _filters = checkpoint_filter_fn_encoder, checkpoint_filter_fn_classifier
    _attentions = (Gemma4Attention,)
    _reduced_blocks: ClassVar[Classes] = {Gemma4Block: ReducedGemma4Block}
    _reduced_models: ClassVar[Classes] = {
        Gemma4VitEncoder: ReducedGemma4VitEncoder,
        Gemma4VitClassifier: ReducedGemma4VitClassifier,
    }

    def check_widths(self, model: Any) -> NoReturn:
        raise WidthError(
            f"the width of the blocks of this {type(model).__name__} cannot be cut: norms follow attention and "
            "MLP, and would act on what is left of a removed one"
        )

    def keeps_attention(self, model: nn.Module) -> str:
        return "a norm of its values needs all dims of its heads"

    def _size(self, model: Any) -> tuple[int, int]:
        known = getattr(model, "_traits", {}).get("img_size")
        if known is None and getattr(model, "pretrained_cfg", None):
            known = get_model_input_config(model)["input_size"][1:]
        height, width = known or _DEFAULT_SIZE
        return int(height), int(width)

    def _projected(self, tower: Any, whole_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        return pooled_by_place(tower, whole_BNC, grid) if tower.global_pool == "soft" else whole_BNC

    def _patch_macs(self, model: Any) -> Macs:
        embed, patches = self.tower(model).patch_embed, self.geometry(model).num_patches
        # Positions are rows of a table that products with one-hot vectors choose, and angles are products as well.
        angles = 2 * len(self.tower(model).rotary_emb.inv_freq)
        weights = embed.input_proj.weight.numel() + embed.position_embedding_table.numel()
        return Macs(patches * weights, patches * angles)

    def _projector_macs(self, projector: Any, read: int) -> int:
        return read * read * projector.pooling_kernel_size**2 * projector.hidden_size

    def _shape(self, block: Any, width: int) -> BlockShape:
        attn = block.attn
        query, key, value = (macs_per_row(layer, width) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        dims = attn.num_heads * attn.head_dim
        mlp = block.mlp
        gated = macs_per_row(mlp.gate_proj, width) + macs_per_row(mlp.up_proj, width)
        return BlockShape(
            width=width,
            attn_dim=dims,
            head_dim=attn.head_dim,
            qkv_macs=query + key + value,
            proj_macs=macs_per_row(attn.o_proj, dims),
            mlp_macs=gated + macs_per_row(mlp.down_proj, mlp.gate_proj.linear.out_features),
            query_macs=query,
            key_macs=key,
            whole_attention=intercepted(attn) != "",
        )
