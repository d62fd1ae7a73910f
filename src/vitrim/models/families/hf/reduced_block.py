"""A block of Hugging Face transformers with a cut."""

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from ....errors import VitrimError
from ...attention_product import attention_product
from ...heads import split_heads
from ...reduction.exchange import while_attached
from ...reduction.reduced_block import ReducedBlock
from ...removed_branch import RemovedBranch
from .layout import Layout


class ReducedLayer(ReducedBlock):
    """A block with a cut: its own norms, projections, layer scales and drop path, on the attention that is set."""

    vitrim_layout: ClassVar[Layout]
    vitrim_arguments: ClassVar[tuple[str, ...]]
    mask_argument = "attention_mask"
    training: bool

    @while_attached
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, **dict(zip(self.vitrim_arguments, args, strict=False)), **kwargs)

    @property
    def _attention(self) -> Any:
        return getattr(self, self.vitrim_layout.parts[0])

    @property
    def attends(self) -> bool:
        return not isinstance(self._attention, RemovedBranch)

    @property
    def head_scale(self) -> float:
        return getattr(self._attention, self.vitrim_layout.scale) if self.attends else 1.0

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return getattr(self, self.vitrim_layout.norms[0])(x_BTC)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self._attention
        if not self.attends:  # Nothing is projected, and nothing attends.
            return (normed_BTC.new_empty(normed_BTC.shape[0], 1, normed_BTC.shape[1], 0),) * (last - first)
        layers, heads = (attn.q_proj, attn.k_proj, attn.v_proj)[first:last], getattr(attn, self.vitrim_layout.heads)
        return tuple(split_heads(layer(normed_BTC), heads) for layer in layers)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        attn, layout = self._attention, self.vitrim_layout
        if not self.attends:
            return self._after(attn(normed_BQC)[0], 0)
        dropout = getattr(attn, layout.dropout) if self.training else 0.0
        mixed, _ = attended(attn, query, key, value, bias, getattr(attn, layout.scale), dropout)
        return self._after(getattr(attn, layout.out)(mixed), 0)

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        if not self.runs_whole(bias):
            return None
        attn, rotary = self._attention, {} if table is None else {self.rotary_argument: table}
        if bias is not None and attn.config._attn_implementation not in ("eager", "sdpa"):
            raise VitrimError(
                f"the {self.vitrim_attention} of block {self.vitrim_index} has a hook, and its attention takes no "
                "sizes of merged tokens; call model.set_attn_implementation('sdpa')"
            )
        return self._after(attn(normed_BTC, attention_mask=bias, **rotary)[0], 0)

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        layout = self.vitrim_layout
        return x_BTC + self._after(getattr(self, layout.parts[1])(getattr(self, layout.norms[1])(x_BTC)), 1)

    def _after(self, x: Tensor, half: int) -> Tensor:
        for name in self.vitrim_layout.after[half]:
            part = getattr(self, name)
            x = part(x) if isinstance(part, nn.Module) else part * x
        return x


def attended(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attention (B, T, H * V) of (B, H, T, D) tensors by the implementation that the model is set to, and its maps.

    Flash attention takes no bias and no values of other dims; where there are such, PyTorch's own takes its place.

    Raises:
        VitrimError: a function that others registered would have to add a bias to its logits; it may ignore it.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attn.config._attn_implementation
    run = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager)
    if name != "eager" and run.__module__.startswith("transformers."):
        if name == "sdpa" or bias is not None or value.shape[-1] != query.shape[-1]:
            out = attention_product(query, key, value, bias, dropout=dropout, scale=scale)
            return out.transpose(1, 2).flatten(2), None
    elif run is not _eager and bias is not None:
        raise VitrimError(
            f"the attention function registered as {name!r} may ignore the mask that holds the sizes of merged tokens; "
            "call model.set_attn_implementation('eager'), or use a reducer that needs no sizes, such as TopK() or "
            "ToMe(prop_attn=false)"
        )
    out, maps = run(attn, query, key, value, bias, scaling=scale, dropout=dropout)
    return out.flatten(2), maps


def _eager(attn: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What the file of the layer's own class calls eager attention."""
    module: Any = inspect.getmodule(_foreign(type(attn)))
    return module.eager_attention_forward(attn, *args, **kwargs)


def _foreign(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of transformers that this one is, or is made from."""
    return next(one for one in cls.__mro__ if one.__module__.startswith("transformers."))
