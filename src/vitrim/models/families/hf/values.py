"""Attention of transformers that rotates queries and keys by place, with heads of another width.

The class of such a layer is made when a model of its family is first met. These classes are attributes of this module,
such as `NarrowDINOv3ViTAttention`, so that pickle finds them by name.
"""

import threading
from typing import Any, ClassVar

from torch import Tensor, nn

from ...heads import split_heads
from ...widths.rotary_pairs import columns, dims_of
from .layout import LAYOUTS, Layout
from .reduced_block import attended

_PREFIX = "Narrow"
_lock = threading.RLock()
_made: dict[type[nn.Module], type[nn.Module]] = {}


class _Narrow(nn.Module):
    """Mixin before an attention layer that was cut."""

    vitrim_layout: ClassVar[Layout]
    value_dim: int
    query_dim: int
    kept_pairs: Tensor

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the layer of transformers."""
        layout, parts = self.vitrim_layout, vars(self)
        dropout = parts[layout.dropout] if self.training else 0.0
        query, key = queries_and_keys(self, layout, hidden_states, kwargs[layout.rotary])
        value = split_heads(self.get_submodule("v_proj")(hidden_states), parts[layout.heads])
        out, maps = attended(self, query, key, value, attention_mask, parts[layout.scale], dropout)
        return self.get_submodule(layout.out)(out), maps


def queries_and_keys(attn: Any, layout: Layout, x_BTC: Tensor, table: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, T, D) of an attention layer, rotated by the table of its family."""
    heads = getattr(attn, layout.heads)
    query, key = (split_heads(layer(x_BTC), heads) for layer in (attn.q_proj, attn.k_proj))
    return rotated(attn, layout, query, table), rotated(attn, layout, key, table)


def rotated(attn: Any, layout: Layout, stream_BHTD: Tensor, table: Any, pairs_Hp: Tensor | None = None) -> Tensor:
    """Queries or keys of an attention layer, rotated by the table of its family.

    Args:
        attn, layout: the layer, and where its parts lie.
        stream_BHTD: of all heads, prefix tokens first.
        table: cosines and sines of all dims of a head.
        pairs_Hp: the rotary pairs that the stream has, which lie in halves; None: those of the layer.
    """
    pairs_Hp = getattr(attn, "kept_pairs", None) if pairs_Hp is None else pairs_Hp
    if pairs_Hp is not None:
        dims = dims_of(pairs_Hp, attn.head_dim // 2, half=True)
        table = tuple(columns(part, dims) for part in table)
    return layout.rotate(stream_BHTD, table)


def narrow_class(layout: Layout, foreign: type[nn.Module]) -> type[nn.Module]:
    """The class of narrowed layers of this attention layer of transformers."""
    with _lock:
        if foreign not in _made:
            name = _PREFIX + foreign.__name__
            doc = f"`{foreign.__name__}` with fewer dims per head, of values, of queries and keys, or of both."
            body = {"__module__": __name__, "__qualname__": name, "__doc__": doc, "vitrim_layout": layout}
            _made[foreign] = type(name, (_Narrow, foreign), body)
        return _made[foreign]


class _Unknown(AttributeError):
    pass


def __getattr__(name: str) -> Any:
    """The narrowed class of this name: pickle asks for it where no model of its family has been met yet."""
    for layout in LAYOUTS.values():
        if layout.rotary and name == _PREFIX + layout.prefix + layout.attention:
            return narrow_class(layout, layout.part_class(layout.attention))
    raise _Unknown(f"module {__name__!r} has no attribute {name!r}")
