"""Reduced classes for models of Hugging Face transformers, made when a model of their family is first met.

They are attributes of this module, such as `ReducedViTLayer`, so that pickle finds them by name.
"""

import inspect
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import VitrimError
from ..exchange import while_attached
from ..forward_pass import finish
from ..heads import split_heads
from ..reduced import ReducedBlock
from ..reduced_model import ReducedModel
from ..removed_branch import RemovedBranch
from .hf_export import unmasked_in_export
from .hf_layout import LAYOUTS, Layout, pair

_PREFIX = "Reduced"
_lock = threading.RLock()
_made: dict[type[nn.Module], type[nn.Module]] = {}


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
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]
        return tuple(split_heads(layer(normed_BTC), dim=attn.head_dim) for layer in layers)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        attn, layout = self._attention, self.vitrim_layout
        if not self.attends:
            return self._after(attn(normed_BQC)[0], 0)
        dropout = getattr(attn, layout.dropout) if self.training else 0.0
        mixed = attention(attn, query, key, value, bias, getattr(attn, layout.scale), dropout)
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


def attention(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Attention (B, T, H * D) of (B, H, T, D) tensors by the implementation that the model is set to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attn.config._attn_implementation
    if name == "sdpa" or (bias is not None and name != "eager"):  # Flash attention takes no bias.
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).flatten(2)
    eager = inspect.getmodule(_foreign(type(attn))).eager_attention_forward  # type: ignore[union-attr]
    run = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return run(attn, query, key, value, bias, scaling=scale, dropout=dropout)[0].flatten(2)


class ReducedTransformer(ReducedModel):
    """What a tower and a model that holds one have in common."""

    vitrim_layout: ClassVar[Layout]
    vitrim_arguments: ClassVar[tuple[str, ...]]
    config: Any
    loss_function: Any

    def expected_patches(self, images: Any) -> int | None:
        if getattr(images, "ndim", 0) != 4:
            return None
        rows, columns = grid(self.vitrim_layout, self, images.shape[-2:])
        return self.vitrim_layout.entering(self.vitrim_layout.tower_of(self).config, rows * columns)

    def vitrim_open(self, images: Any, kwargs: dict[str, Any]) -> Any:
        """Open a call, unless it asks for what a reduced model cannot give."""
        check_size(self.vitrim_layout, self, images, bool(kwargs.get("interpolate_pos_encoding")))
        call = self.open_call(images)
        self.refuse_maps(kwargs, call.expected or self.vitrim_policy.geometry.num_patches)
        return call

    def refuse_maps(self, kwargs: Mapping[str, Any], *num_patches: int) -> None:
        """Raise `VitrimError` where attention maps are asked for and images of so many patches are cut."""
        asked = kwargs.get("output_attentions")
        wanted = asked or (asked is None and getattr(self.config, "output_attentions", False))
        if wanted and self.cuts(*num_patches):
            raise VitrimError(
                "output_attentions=True has no meaning where tokens are cut: the maps of the blocks differ in size "
                "and a block that cuts computes no whole map; leave it out, or call handle.remove() first"
            )

    def cuts(self, *num_patches: int) -> bool:
        """Whether anything is left out of images of so many patches."""
        plans = [self.vitrim_policy.plan(number, self.training) for number in set(num_patches)]
        return any(plan.cuts or plan.prefix_only for plan in plans)


class ReducedTower(ReducedTransformer):
    """A bare model with a reduction attached, or the tower inside one."""

    @while_attached
    @unmasked_in_export
    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        with self.vitrim_open(pixel_values, kwargs):
            out = super().forward(pixel_values, *args, **kwargs)
            finish(self.vitrim_policy, out[0])
            return out


class ReducedWhole(ReducedTransformer):
    """A model that holds a tower: where its head averages patch tokens, each counts as the patches behind it."""

    @while_attached
    @unmasked_in_export
    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self.vitrim_arguments, args, strict=False)), **kwargs}
        whole = self.vitrim_layout.whole(self)
        with self.vitrim_open(pixel_values, kwargs):
            if whole is None or whole.reads == "prefix" or not self.vitrim_policy.fuses:
                return super().forward(pixel_values, **kwargs)
            return self._weighed(pixel_values, getattr(self, whole.tower), **kwargs)

    def _weighed(
        self, images: Any, tower: Any, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        from .hf_model import logits_of

        out = tower(images, **kwargs)
        logits = logits_of(self.vitrim_layout, self, out.last_hidden_state)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        result = ImageClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        whole = self.config.return_dict if return_dict is None else return_dict
        return result if whole else result.to_tuple()


def reduced_class(foreign: type[nn.Module]) -> type[nn.Module]:
    """The reduced class of a class of transformers."""
    with _lock:
        if foreign not in _made:  # Parts that a backbone shares with the tower of its family are those of the tower.
            found = ((layout, _mixin(layout, foreign)) for layout in LAYOUTS.values())
            layout, mixin = next((layout, mixin) for layout, mixin in found if mixin is not None)
            _made[foreign] = _make(layout, mixin, foreign)
        return _made[foreign]


def _mixin(layout: Layout, foreign: type[nn.Module]) -> type[nn.Module] | None:
    if not foreign.__module__.startswith(f"transformers.models.{layout.package}."):
        return None
    name = foreign.__name__
    mixins = {layout.prefix + layout.layer: layout.block or ReducedLayer}
    mixins |= {layout.tower: layout.tower_class or ReducedTower}
    mixins |= dict.fromkeys(layout.wholes, layout.whole_class or ReducedWhole)
    return {**mixins, **layout.others}.get(name)


def _make(layout: Layout, mixin: type[nn.Module], foreign: type[nn.Module]) -> type[nn.Module]:
    # transformers writes the name of a model's class into its files, and looks up there what a class can record.
    names = tuple(inspect.signature(foreign.forward).parameters)[2:]
    body: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": _PREFIX + foreign.__name__,
        "__doc__": f"`{foreign.__name__}` with a reduction attached.",
        "vitrim_layout": layout,
        "vitrim_arguments": tuple(name for name in names if name not in ("args", "kwargs")),
    }
    meta: Any = type(foreign)
    made = meta(foreign.__name__, (mixin, foreign), body)
    if issubclass(made, ReducedTransformer):
        made.forward.__wrapped__ = foreign.forward  # Trainer reads the arguments of a model from its signature.
    if hasattr(foreign, "_can_record_outputs"):
        from transformers.utils import output_capturing

        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(made), foreign._can_record_outputs)
    return made


def _foreign(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of transformers that this one is, or is made from."""
    return next(one for one in cls.__mro__ if one.__module__.startswith("transformers."))


def grid(layout: Layout, model: Any, size: Any) -> tuple[int, int]:
    """Rows and columns of the patches of images of (height, width)."""
    rows, columns = pair(layout.tower_of(model).config.patch_size)
    return int(size[0] // rows), int(size[1] // columns)


def check_size(layout: Layout, model: Any, images: Any, interpolates: bool) -> None:
    """Raise `VitrimError` for images of a size that the positions of this model do not fit."""
    if getattr(images, "ndim", 0) != 4:
        return
    size, own = tuple(images.shape[-2:]), layout.own_size(layout.tower_of(model).config)
    if 0 in grid(layout, model, size):
        raise VitrimError(f"images of {size[0]} x {size[1]} px are smaller than one patch of this model")
    if size != own and not interpolates and not layout.any_size:
        raise VitrimError(
            f"images of {size[0]} x {size[1]} px, but the model takes {own[0]} x {own[1]}; resize them, or pass "
            "interpolate_pos_encoding=True"
        )


class _Unknown(AttributeError):
    pass


def __getattr__(name: str) -> Any:
    """The reduced class of this name: pickle asks for it where nothing has been attached yet."""
    if name.startswith(_PREFIX):
        for layout in LAYOUTS.values():
            known = (layout.prefix + layout.layer, *layout.names, *layout.others)
            if name.removeprefix(_PREFIX) in known:
                return reduced_class(getattr(layout.module, name.removeprefix(_PREFIX)))
    raise _Unknown(f"module {__name__!r} has no attribute {name!r}")
