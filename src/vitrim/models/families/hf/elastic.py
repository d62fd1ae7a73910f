"""Attention and MLP layers of Hugging Face transformers at a variable width, made when a model is first met."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from ...removed_branch import RemovedBranch
from ...widths.attention_heads import AttentionHeads
from ...widths.compensation import Compensation
from ...widths.elastic_heads import ElasticHeads
from ...widths.elastic_hidden import ElasticHidden
from ...widths.elastic_values import ElasticValues
from ...widths.slicing import Parts
from ...widths.sublayers import ELASTIC
from .layout import Layout
from .values import narrow_class, queries_and_keys, rotated


class RemovedAttention(RemovedBranch):
    """What remains of an attention layer of width 0, for blocks that take a pair from it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The constant and, in place of an attention map, None."""
        return super().forward(hidden_states), None


class _Attention(AttentionHeads):
    """What both kinds of attention layers share."""

    vitrim_layout: ClassVar[Layout]
    q_proj: Any
    k_proj: Any
    v_proj: Any

    @property
    def num_heads(self) -> int:
        return vars(self)[self.vitrim_layout.heads]

    @property
    def last(self) -> nn.Linear:
        return getattr(self, self.vitrim_layout.out)

    @property
    def dropout(self) -> float:
        return vars(self)[self.vitrim_layout.dropout]

    def remains(self, compensation: Compensation | None = None) -> RemovedBranch:
        branch = super().remains(compensation)
        branch.__class__ = RemovedAttention
        return branch


class _ElasticAttention(_Attention, ElasticHeads):
    @property
    def streams(self) -> Parts:
        return ((self.q_proj, 1), (self.k_proj, 1), (self.v_proj, 1))

    def resized(self, width: int) -> None:
        self.head_dim = width
        vars(self)[self.vitrim_layout.scale] = width**-0.5

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.mix(hidden_states, attention_mask), None


class _ElasticRotary(_Attention, ElasticValues):
    """Attention whose queries and keys are rotated by place."""

    @property
    def projections(self) -> tuple[Any, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def queries_and_keys(self, x: Tensor, table: Any) -> tuple[Tensor, Tensor]:
        return queries_and_keys(self, self.vitrim_layout, x, table)

    @property
    def half_pairs(self) -> bool:
        return True

    def turned(self, stream_BHTD: Tensor, table: Any, pairs_Hp: Tensor | None) -> Tensor:
        return rotated(self, self.vitrim_layout, stream_BHTD, table, pairs_Hp)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.mix(hidden_states, kwargs[self.vitrim_layout.rotary], attention_mask), None


class _Hidden(ElasticHidden):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.narrow_mlp(hidden_states)


class _ElasticMlp(_Hidden):
    """Two layers with an activation between them."""

    fc1: Any
    fc2: Any
    activation_fn: Callable[[Tensor], Tensor]

    @property
    def last(self) -> nn.Linear:
        return self.fc2

    @property
    def first(self) -> Parts:
        return ((self.fc1, 1),)

    def activate(self, x: Tensor) -> Tensor:
        return self.activation_fn(self.made(x))


class _ElasticUpDown(_Hidden):
    """As `_ElasticMlp`, in other words."""

    up_proj: Any
    down_proj: Any
    act_fn: Callable[[Tensor], Tensor]

    @property
    def last(self) -> nn.Linear:
        return self.down_proj

    @property
    def first(self) -> Parts:
        return ((self.up_proj, 1),)

    def activate(self, x: Tensor) -> Tensor:
        return self.act_fn(self.made(x))


class _ElasticGated(_ElasticUpDown):
    """SwiGLU: two layers make the gate and the value rows."""

    gate_proj: Any

    @property
    def first(self) -> Parts:
        return ((self.gate_proj, 1), (self.up_proj, 1))

    def activate(self, x: Tensor) -> Tensor:
        return self.act_fn(self.made(x, 0)) * self.made(x, 1)


_MLPS = {"MLP": _ElasticMlp, "UpDown": _ElasticUpDown, "SwiGLUFFN": _ElasticGated, "GatedMLP": _ElasticGated}


def enter_elastic(layout: Layout) -> None:
    """Make the layers of this layout known as elastic ones."""
    for name, kind in layout.mlps.items():
        _enter(layout, _MLPS[kind], layout.part_class(name))
    attention = layout.part_class(layout.attention)
    if not layout.rotary:
        _enter(layout, _ElasticAttention, attention)
        return
    narrow = narrow_class(layout, attention)
    for each in (attention, narrow):
        _enter(layout, _ElasticRotary, each, narrow=narrow)


def _enter(layout: Layout, mixin: type[nn.Module], foreign: type[nn.Module], **attributes: object) -> None:
    if foreign not in ELASTIC:
        name = f"Elastic{foreign.__name__}"
        body = {"__module__": __name__, "__qualname__": name, "vitrim_layout": layout, **attributes}
        type(name, (mixin, foreign), body, replaces=foreign)
