"""What timm's ViTs with relative positions share: a bias of attention by the places of both tokens, and its weights.

The bias follows the tokens that are left, image by image: a dropped token takes its rows and columns away, a merged
one keeps those of its largest member, a fused one those of its best-scored member.
"""

from dataclasses import replace
from math import isqrt
from typing import Any

from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from ....errors import CheckpointError
from ...adapter import Geometry, State
from ...foreign_macs import macs_per_row
from ...heads import split_heads
from ...macs import BlockShape
from ...reduction.reduced_block import ReducedBlock
from ..timm_vit import TimmViT
from .reduced import after_norms, mix, rows_of_qkv, splits
from .weights import ADVICE, Grid

_TABLE = "relative_position_bias_table"


class ReducedRelativeBlock(ReducedBlock):
    """Projections and attention of a block whose `qkv` is one layer."""

    attn: Any

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self.attn
        rows = rows_of_qkv(attn, attn.proj.in_features, normed_BTC, first, last)
        return after_norms(attn, [split_heads(out, attn.num_heads) for out in rows], first)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        """Attention with its output projection."""
        return mix(self.attn, query, key, value, bias, normed_BQC, self.training)

    @property
    def head_scale(self) -> float:
        return self.attn.scale


class _TimmRelative(TimmViT):
    """Geometry, weights and MACs of families whose blocks have relative positions."""

    def geometry(self, model: Any) -> Geometry:
        return replace(super().geometry(model), relative=True)

    def trained_size(self, model: Any, state: State, trained_at: Grid | None) -> Grid | None:
        found, own = super().trained_size(model, state, trained_at), model.patch_embed.grid_size
        if found is not None:
            return found
        tables = _tables(model, state)
        grid = None if not tables else _window(model, tables, trained_at)
        if grid is None or grid == own:
            return None
        return trained_at or (grid[0] * (_patch(model)[0]), grid[1] * _patch(model)[1])

    def fit_weights(
        self, model: Any, state: State, trained_at: Grid | None = None, *, resample_patches: bool = False
    ) -> State:
        # timm takes every table of a square length for that of a square window.
        tables = _tables(model, state)
        rest = {name: value for name, value in state.items() if name not in tables}
        fitted = super().fit_weights(model, rest, trained_at, resample_patches=resample_patches)
        window = _window(model, tables, trained_at) if tables else (0, 0)
        for name, table in tables.items():
            own, shape = model.patch_embed.grid_size, model.get_parameter(name).shape
            same = window == own or table.shape[1:] != shape[1:]
            fitted[name] = table if same else resize_rel_pos_bias_table(table, own, tuple(shape), window)
        return fitted

    def _shape(self, block: Any, width: int) -> BlockShape:
        attn, dims = block.attn, block.attn.proj.in_features
        return BlockShape(
            width=width,
            attn_dim=dims,
            head_dim=dims // attn.num_heads,
            qkv_macs=macs_per_row(attn.qkv, width),
            proj_macs=macs_per_row(attn.proj, dims),
            mlp_macs=macs_per_row(block.mlp, width),
            whole_qkv=not splits(attn.qkv),
        )


def _patch(model: Any) -> Grid:
    (height, width), (rows, columns) = model.patch_embed.img_size, model.patch_embed.grid_size
    return height // rows, width // columns


def _tables(model: Any, state: State) -> State:
    """The tables of the model's own relative positions among these weights."""
    own = dict(model.named_parameters())
    return {name: value for name, value in state.items() if name.endswith(_TABLE) and name in own and value.ndim == 2}


def _window(model: Any, tables: State, trained_at: Grid | None) -> Grid:
    """Rows and columns of the patches that these tables belong to: (2 rows - 1)(2 columns - 1) offsets and a few more.

    Raises:
        CheckpointError: there is more than one answer, or none.
    """
    own = model.patch_embed.grid_size
    name, table = next(iter(tables.items()))
    extra = model.get_parameter(name).shape[0] - _offsets(own)
    count = table.shape[0] - extra
    root = isqrt(max(0, count))
    square = ((root + 1) // 2, (root + 1) // 2) if root % 2 and root * root == count else None
    if trained_at is not None:
        patch = _patch(model)
        grid = trained_at[0] // patch[0], trained_at[1] // patch[1]
        if _offsets(grid) != count:
            size = f"{trained_at[0]} x {trained_at[1]} px"
            raise CheckpointError(f"{table.shape[0]} relative positions do not belong to images of {size}")
        return grid
    fits = count == _offsets(own)
    if fits and square not in (None, own):
        raise CheckpointError(
            f"its {table.shape[0]} relative positions may be those of {own[0]} x {own[1]} or {square[0]} x {square[1]} "
            f"patches; {ADVICE}"
        )
    if not fits and square is None:
        raise CheckpointError(
            f"its {table.shape[0]} relative positions belong to no square grid, so how they lie is not known; {ADVICE}"
        )
    return own if fits or square is None else square


def _offsets(grid: Grid) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)
