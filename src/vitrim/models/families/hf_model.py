"""Adapter for the Vision Transformers of Hugging Face transformers, whose layouts are in the other `hf_` files."""

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedModelError, VitrimError
from ...tokens import Plan, Reducer
from ..adapter import Adapter, Classifier, Description, Geometry, State, as_tensor
from ..exchange import Reduced, intercepted
from ..foreign_macs import macs_per_row
from ..forward_pass import trace_at_head
from ..input_format import InputFormat, per_channel
from ..macs import BlockShape, Macs, block_macs
from ..outputs import ModelInfo
from ..padded import joined, padded_trace_of
from ..removed_branch import RemovedBranch
from ..sublayers import Elastic
from ..trace import mark, trace_of
from . import hf_config, hf_sizes
from .hf_config import image_size
from .hf_elastic import enter_elastic
from .hf_export import without_idle_masks
from .hf_layout import LAYOUTS, Layout, layout_of, pair
from .hf_reduced import grid, reduced_class


class TransformersViT(Adapter):
    """Models of Hugging Face transformers: towers, and models that hold one for a classifier or a projection."""

    name = "transformers"
    covers = (
        "Hugging Face transformers: ViT, DeiT, DINOv2 (with registers), DINOv3-ViT, CLIP and MetaCLIP 2 vision, "
        "SigLIP, SigLIP 2, I-JEPA, BEiT, ViT-MAE encoder, ViT-MSN; bare, for classification, as a backbone (DINOv2, "
        "DINOv3, BEiT), or as the tower of another model"
    )
    branches: ClassVar[Mapping[str, str]] = {}
    speed_settings = frozenset({"training", "gradient_checkpointing"})

    def claims(self, model: nn.Module) -> bool:
        return layout_of(model) is not None

    def exporting(self) -> AbstractContextManager[None]:
        return without_idle_masks()

    def branches_of(self, model: nn.Module) -> Mapping[str, str]:
        layout = _layout(model)
        return dict(zip(layout.parts, layout.norms, strict=True))

    def check(self, model: Any) -> None:
        layout = _layout(model)
        own = model if not isinstance(model, Reduced) else None
        if own is not None and type(own) not in (getattr(layout.module, name) for name in layout.names):
            raise UnsupportedModelError(
                f"{type(model).__qualname__} overrides parts of {type(model).__mro__[1].__name__} that the {self.name} "
                f"adapter cannot keep; it covers {self.covers}"
            )
        layer, attention = layout.part_class(layout.layer), layout.part_class(layout.attention)
        enter_elastic(layout)
        try:
            blocks, halves = layout.blocks(model), layout.parts
            parts = [(getattr(block, halves[0]), getattr(block, halves[1])) for block in blocks]
            attrgetter(layout.projection)(layout.tower_of(model))
        except AttributeError as error:
            from transformers import __version__

            raise UnsupportedModelError(
                f"the {type(model).__name__} of transformers {__version__} is built in another way ({error}); install "
                "the version that vitrim knows: pip install 'vitrim[hf]'"
            ) from None
        layout.check(layout.tower_of(model))
        for index, (block, (attn, mlp)) in enumerate(zip(blocks, parts, strict=True)):
            if isinstance(attn, Elastic) or isinstance(mlp, Elastic):
                raise VitrimError("the model runs as a sub-network of a super-network; leave that context first")
            known = ((block, (layer, reduced_class(layer))), (attn, (attention, *_removed())))
            for part, classes in known:
                if type(part) not in classes:
                    raise UnsupportedModelError(
                        f"block {index} holds a {type(part).__name__}, which the {self.name} adapter cannot cut; it "
                        f"covers {self.covers}"
                    )

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(_layout(model).blocks(model))

    def parts(self, model: Any) -> Sequence[nn.Module]:
        layout = _layout(model)
        tower = layout.tower_of(model)
        names = {layout.module.__name__ + "." + name for name in layout.others}
        inside = [m for m in tower.modules() if any(f"{c.__module__}.{c.__name__}" in names for c in type(m).__mro__)]
        return [tower, *inside]

    def reduced_class(self, module: nn.Module) -> type[nn.Module]:
        return reduced_class(type(module))

    def geometry(self, model: Any) -> Geometry:
        layout, config = _layout(model), _layout(model).tower_of(model).config
        whole, size = layout.whole(model), image_size(layout, model)
        rows, columns = grid(layout, model, size)
        return Geometry(
            depth=len(layout.blocks(model)),
            num_patches=layout.entering(config, rows * columns),
            num_prefix=layout.num_prefix(model),
            has_cls=layout.has_cls,
            head="tokens" if whole is None else whole.reads,
            input_size=(config.num_channels, *size),
            fixed_size=False,
            rotary=bool(layout.rotary),
            relative=layout.relative(layout.tower_of(model)),
        )

    def grid(self, model: nn.Module, image_size: Sequence[int]) -> tuple[int, int]:
        layout = _layout(model)
        if layout.shuffled:
            raise UnsupportedModelError(
                f"a {type(model).__name__} takes its patches in random order, so it is not known where each token lies"
            )
        return grid(layout, model, image_size)

    def dense_owner(self, model: nn.Module, among: Iterable[object] | None = None) -> nn.Module | None:
        return _holder(model, _layout(model).dense, among)

    def final_norm(self, model: Any) -> nn.Module | None:
        layout = _layout(model)
        return getattr(layout.tower_of(model), layout.final_norm) if layout.final_norm else None

    def check_plan(self, model: nn.Module, plan: Plan, reducer: Reducer) -> None:
        super().check_plan(model, plan, reducer)
        if plan.cuts and (reducer.merges or reducer.extra_tokens) and (holder := _averaged_by(model)) is not None:
            raise VitrimError(
                f"this {type(model).__name__} is the tower of a {type(holder).__name__}, whose head averages patch "
                "tokens and would count a merged one once; attach to the whole model"
            )

    def macs(self, model: Any, plan: Plan, reducer: Reducer | None) -> Macs:
        layout = _layout(model)
        tower, width = layout.tower_of(model), layout.tower_of(model).config.hidden_size
        rows, columns = grid(layout, model, image_size(layout, model))
        projection = attrgetter(layout.projection)(tower)
        total = Macs(rows * columns * projection.weight.numel()) + layout.place_macs(tower, rows * columns)
        for index, (block, tokens) in enumerate(zip(self.blocks(model), plan.entering, strict=True)):
            prefix_only = plan.prefix_only and index == plan.depth - 1
            cuts = plan.cut(index, "before"), plan.cut(index, "inside")
            total += block_macs(_shape(layout, block, width), tokens, plan.num_prefix, *cuts, prefix_only, reducer)
        total += layout.pool_macs(tower, plan.token_counts[-1])
        whole = layout.whole(model)
        for name in () if whole is None else whole.heads:
            head = getattr(model, name)
            total += Macs(macs_per_row(head, getattr(head, "in_features", width)))
        return total

    # What a model gives.

    def info(self, model: Any) -> ModelInfo:
        layout = _layout(model)
        whole = layout.whole(model)
        return ModelInfo(
            name=type(model).__name__,
            classes=self.classifier(model).classes,
            depth=len(layout.blocks(model)),
            width=layout.tower_of(model).config.hidden_size,
            num_prefix=layout.num_prefix(model),
            has_cls=layout.has_cls,
            has_dist=whole is not None and len(whole.heads) > 1,
        )

    def predict(self, model: Any, images: Tensor) -> Tensor:
        out = model(*self.inputs(model, images))
        names = ("logits", "image_embeds", "pooler_output", "feature_maps")
        ready = any(getattr(out, name, None) is not None for name in names)
        return as_tensor(out) if ready else self.head(model, out.last_hidden_state)

    def inputs(self, model: Any, images: Tensor) -> tuple[Any, ...]:
        layout = _layout(model)
        return layout.inputs(layout.tower_of(model), images)

    def output_width(self, model: Any) -> int:
        layout = _layout(model)
        whole, width = layout.whole(model), layout.tower_of(model).config.hidden_size
        return width if whole is None else getattr(getattr(model, whole.heads[0]), "out_features", width)

    def features(
        self, model: Any, images: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        layout = _layout(model)
        prefix = layout.num_prefix(model)
        options = {"output_hidden_states": True} if blocks or layout.maps else {}
        out = layout.tower_of(model)(*self.inputs(model, images), **options, return_dict=True)
        left = {block: out.hidden_states[block + 1] for block in blocks}
        final = self._final(model, out.hidden_states[-1]) if layout.maps else out.last_hidden_state
        return final, {block: (x[:, :prefix], x[:, prefix:]) for block, x in left.items()}

    def _final(self, backbone: nn.Module, last_BTC: Tensor) -> Tensor:
        """What the last norm of a backbone makes of the tokens that its last block gave."""
        norm, trace = self.final_norm(backbone), trace_of(last_BTC)
        if norm is None:
            return last_BTC
        final = norm(last_BTC)
        if trace is not None:
            mark(final, replace(trace, normed=True))
        return final

    def head(self, model: Any, final_BTC: Tensor) -> Tensor:
        return logits_of(_layout(model), model, final_BTC)

    def heads(self, model: Any, final_BTC: Tensor) -> tuple[Tensor, Tensor]:
        whole = _layout(model).whole(model)
        assert whole is not None  # As only a model with two classifiers has `has_dist`.
        return getattr(model, whole.heads[0])(final_BTC[:, 0]), getattr(model, whole.heads[1])(final_BTC[:, 1])

    def input_format(self, model: Any) -> InputFormat:
        layout = _layout(model)
        config = layout.tower_of(model).config
        size = (config.num_channels, *image_size(layout, model))
        images = hf_config.images_of(model)
        mean, std = (per_channel(tuple(images[name]), size[0]) for name in ("mean", "std"))
        return InputFormat(size, mean, std, images["interpolation"], images["crop_pct"], images["crop_mode"])

    def resize(self, model: Any, size: int | tuple[int, int]) -> None:
        hf_sizes.resize(_layout(model), model, pair(size))
        handle = vars(model).get("vitrim_handle")
        if handle is not None:
            handle.refresh()

    def classifier(self, model: Any) -> Classifier:
        whole = _layout(model).whole(model)
        if whole is None or not whole.classifies:
            return Classifier((), 0)
        return Classifier(whole.heads, int(getattr(getattr(model, whole.heads[0]), "out_features", 0)))

    def reset_classifier(self, model: Any, classes: int) -> None:
        whole = _layout(model).whole(model)
        if whole is None or not whole.classifies:
            super().reset_classifier(model, classes)
            return
        hf_config.reset_classifier(_layout(model), model, whole, classes)

    def class_names(self, model: nn.Module) -> list[str] | None:
        return hf_config.class_names(model) if self.classifier(model).classes else None

    def name_classes(self, model: nn.Module, names: Sequence[str]) -> None:
        hf_config.name_classes(model, names)

    def recompute(self, model: Any, on: bool = True) -> None:
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.activation_checkpointing_disable()

    # Building, saving and loading.

    def architectures(self) -> Collection[str]:
        return [name for layout in LAYOUTS.values() for name in layout.names]

    def builds(self, name: str) -> bool:
        return name.startswith(hf_config.SOURCE) or name in self.architectures()

    def build(self, name: str, args: Mapping[str, Any], *, pretrained: bool, images: Mapping[str, Any]) -> nn.Module:
        return hf_config.build(name, args, pretrained, images)

    def describe(self, model: Any) -> Description:
        return hf_config.describe(_layout(model), model)

    def classifiers_of(self, name: str) -> tuple[str, ...]:
        wholes = {name: whole for layout in LAYOUTS.values() for name, whole in layout.wholes.items()}
        return wholes[name].heads if name in wholes else ("classifier",)

    def trained_size(
        self, model: nn.Module, state: State, trained_at: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        return hf_sizes.trained_size(_layout(model), model, state, trained_at)

    def fit_weights(
        self,
        model: nn.Module,
        state: State,
        trained_at: tuple[int, int] | None = None,
        *,
        resample_patches: bool = False,
    ) -> State:
        if "cls_token" in state or "blocks.0.attn.qkv.weight" in state:
            raise CheckpointError(
                "these are weights in the names of timm; load them into a model of timm, and convert that with "
                "vitrim.convert(model, 'transformers')"
            )
        return hf_sizes.fit_weights(_layout(model), model, state, trained_at)


def logits_of(layout: Layout, model: Any, final_BTC: Tensor) -> Tensor:
    """What the heads of a model give for final tokens; pooled tokens for a bare tower."""
    if (padded := padded_trace_of(final_BTC)) is not None:
        return joined(padded.groups, [logits_of(layout, model, group.tokens) for group in padded.groups])
    whole, tower, size = layout.whole(model), layout.tower_of(model), None
    pool, reads = (layout.pool, layout.pool_reads) if whole is None else (whole.pool, whole.reads)
    if isinstance(model, Reduced) and reads == "tokens":
        trace = trace_at_head(model.vitrim_policy, final_BTC)
        size = None if trace is None else trace.size_BN
    pooled = pool(tower, final_BTC, layout.num_prefix(model), size)
    if whole is None:
        return pooled
    if len(whole.heads) == 1:
        return getattr(model, whole.heads[0])(pooled)
    return torch.stack([getattr(model, name)(final_BTC[:, at]) for at, name in enumerate(whole.heads)]).mean(0)


def _averaged_by(tower: nn.Module) -> nn.Module | None:
    """The model around this tower whose head averages its tokens, if there is one; no tower knows what holds it."""
    layout = _layout(tower)
    return _holder(tower, {name: whole.tower for name, whole in layout.wholes.items() if whole.reads == "tokens"})


def _holder(tower: nn.Module, names: Mapping[str, str], among: Iterable[object] | None = None) -> nn.Module | None:
    """The object of one of these classes that holds this tower under the name that belongs to the class."""
    layout = _layout(tower)
    if layout.whole(tower) is not None or not names:
        return None
    if among is None:
        # Few towers are held under such a name: only then is it worth the time to look at all objects.
        dicts = [one for one in gc.get_referrers(tower) if type(one) is dict]
        held = any(one.get(name) is tower for one in dicts for name in names.values())
        among = gc.get_objects() if held else ()
    classes = {getattr(layout.module, name): inside for name, inside in names.items()}
    known: list[Any] = [one for one in among if type(one) in classes]
    return next((one for one in known if getattr(one, classes[type(one)], None) is tower), None)


def _layout(model: nn.Module) -> Layout:
    layout = layout_of(model)
    assert layout is not None  # As `claims` said.
    return layout


def _removed() -> tuple[type[nn.Module], ...]:
    from .hf_elastic import RemovedAttention

    return (RemovedAttention,)


def _shape(layout: Layout, block: Any, width: int) -> BlockShape:
    attn, mlp = getattr(block, layout.parts[0]), macs_per_row(getattr(block, layout.parts[1]), width)
    if isinstance(attn, RemovedBranch):
        return BlockShape(width, 0, 0, 0, 0, mlp)
    dims = getattr(attn, layout.heads) * attn.head_dim
    return BlockShape(
        width=width,
        attn_dim=dims,
        head_dim=attn.head_dim,
        qkv_macs=sum(macs_per_row(layer, width) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)),
        proj_macs=macs_per_row(getattr(attn, layout.out), dims),
        mlp_macs=mlp,
        query_macs=macs_per_row(attn.q_proj, width),
        whole_attention=intercepted(attn) != "",
    )
