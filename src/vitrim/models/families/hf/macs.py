"""What models of Hugging Face transformers cost."""

from operator import attrgetter
from typing import Any

from ....tokens import Plan, Reducer
from ...foreign_macs import macs_per_row
from ...macs import BlockShape, Macs, block_macs
from ...reduction.exchange import intercepted
from ...removed_branch import RemovedBranch
from ...widths.elastic_pairs import query_dim, value_dim
from .config import image_size
from .layout import Layout
from .sizes import grid


def macs(layout: Layout, model: Any, plan: Plan, reducer: Reducer | None) -> Macs:
    """See `Adapter.macs`."""
    tower, width = layout.tower_of(model), layout.tower_of(model).config.hidden_size
    rows, columns = grid(layout, model, image_size(layout, model))
    projection = attrgetter(layout.projection)(tower)
    total = Macs(rows * columns * projection.weight.numel()) + layout.place_macs(tower, rows * columns)
    for index, (block, tokens) in enumerate(zip(layout.blocks(model), plan.entering, strict=True)):
        prefix_only = plan.prefix_only and index == plan.depth - 1
        cuts = plan.cut(index, "before"), plan.cut(index, "inside")
        total += block_macs(_shape(layout, block, width), tokens, plan.num_prefix, *cuts, prefix_only, reducer)
    total += layout.pool_macs(tower, plan.token_counts[-1])
    whole = layout.whole(model)
    for name in () if whole is None else whole.heads:
        head = getattr(model, name)
        total += Macs(macs_per_row(head, getattr(head, "in_features", width)))
    return total


def _shape(layout: Layout, block: Any, width: int) -> BlockShape:
    attn, mlp = getattr(block, layout.parts[0]), macs_per_row(getattr(block, layout.parts[1]), width)
    if isinstance(attn, RemovedBranch):
        return BlockShape(width, 0, 0, 0, 0, mlp)
    heads = getattr(attn, layout.heads)
    values = heads * value_dim(attn)
    return BlockShape(
        width=width,
        attn_dim=heads * query_dim(attn),
        head_dim=query_dim(attn),
        qkv_macs=sum(macs_per_row(layer, width) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)),
        proj_macs=macs_per_row(getattr(attn, layout.out), values),
        mlp_macs=mlp,
        query_macs=macs_per_row(attn.q_proj, width),
        key_macs=macs_per_row(attn.k_proj, width),
        value_dims=values,
        whole_attention=intercepted(attn) != "",
    )
