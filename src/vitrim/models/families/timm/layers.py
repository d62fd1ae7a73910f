"""timm's attention and MLP layers at a variable width."""

from typing import Any

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from ....errors import WidthError
from ...widths.elastic_heads import ElasticHeads
from ...widths.elastic_hidden import ElasticHidden
from ...widths.slicing import Parts


class ElasticAttention(ElasticHeads, Attention, replaces=Attention):
    """timm's `Attention` on the leading dims of every head."""

    @property
    def streams(self) -> Parts:
        return ((self.qkv, 3),)

    @property
    def last(self) -> nn.Linear:
        return self.proj

    @property
    def query_key_norms(self) -> tuple[nn.Module, nn.Module]:
        return self.q_norm, self.k_norm

    @property
    def dropout(self) -> float:
        return self.attn_drop.p

    def resized(self, width: int) -> None:
        self.head_dim, self.attn_dim = width, self.num_heads * width
        self.scale = width**-0.5

    def refuse(self, name: str) -> None:
        if self.gate is not None or not isinstance(self.norm, nn.Identity):
            between = "gate" if self.gate is not None else "norm"
            raise WidthError(
                f"the width of {name} cannot be cut: its {between} between attention and output projection forbids "
                "rotating the values"
            )
        super().refuse(name)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.proj_drop(self.mix(x, attn_mask, is_causal))


class _TimmHidden(ElasticHidden):
    """What timm's MLPs share; a mixin before one of them."""

    fc2: Any
    norm: Any
    drop1: Any
    drop2: Any

    @property
    def last(self) -> nn.Linear:
        return self.fc2

    @property
    def hidden_norm(self) -> nn.Module:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.narrow_mlp(x))


class ElasticMlp(_TimmHidden, Mlp, replaces=Mlp):
    """timm's `Mlp` on its leading hidden units."""

    @property
    def first(self) -> Parts:
        return ((self.fc1, 1),)

    def activate(self, x: Tensor) -> Tensor:
        return self.drop1(self.act(self.made(x)))


class ElasticGluMlp(_TimmHidden, GluMlp, replaces=GluMlp):
    """timm's `GluMlp` (packed SwiGLU): one layer makes the value and gate rows of all units, in its two halves."""

    @property
    def first(self) -> Parts:
        return ((self.fc1, 2),)

    def activate(self, x: Tensor) -> Tensor:
        one, two = self.made(x).chunk(2, dim=-1)
        return self.drop1(one * self.act(two) if self.gate_last else self.act(one) * two)


class ElasticSwiGLU(_TimmHidden, SwiGLU, replaces=SwiGLU):
    """timm's `SwiGLU`: two layers make the gate and the value rows."""

    @property
    def first(self) -> Parts:
        return ((self.fc1_g, 1), (self.fc1_x, 1))

    def activate(self, x: Tensor) -> Tensor:
        return self.drop1(self.act(self.made(x, 0)) * self.made(x, 1))
