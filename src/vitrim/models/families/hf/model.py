"""Adapter for the Vision Transformers of Hugging Face transformers, whose layouts are in the files of families."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from ....errors import CheckpointError, UnsupportedModelError, VitrimError
from ....tokens import Plan, Reducer
from ...adapter import Adapter, Classifier, Description, Geometry, State
from ...input_format import InputFormat, per_channel
from ...macs import Macs
from ...outputs import ModelInfo, as_tensor
from . import check, config, hub, macs, sizes
from .config import image_size
from .export import without_idle_masks
from .heads import logits_of, normed
from .images import images_of
from .layout import LAYOUTS, Layout, layout_of, pair
from .owners import averaging_owner, holder
from .reduced_classes import reduced_class
from .sizes import grid


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
        check.check(self, _layout(model), model)

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

    def keeps_attention(self, model: nn.Module) -> str:
        return ""

    def dense_owner(self, model: nn.Module, among: Iterable[object] | None = None) -> nn.Module | None:
        layout = _layout(model)
        return holder(layout, model, layout.dense, among)

    def final_norm(self, model: Any) -> nn.Module | None:
        layout = _layout(model)
        return getattr(layout.tower_of(model), layout.final_norm) if layout.final_norm else None

    def check_plan(self, model: nn.Module, plan: Plan, reducer: Reducer) -> None:
        super().check_plan(model, plan, reducer)
        fuses = plan.cuts and (reducer.merges or reducer.extra_tokens)
        if fuses and (owner := averaging_owner(_layout(model), model)) is not None:
            raise VitrimError(
                f"this {type(model).__name__} is the tower of a {type(owner).__name__}, whose head averages patch "
                "tokens and would count a merged one once; attach to the whole model"
            )

    def macs(self, model: Any, plan: Plan, reducer: Reducer | None) -> Macs:
        return macs.macs(_layout(model), model, plan, reducer)

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
        with self.one_pass(model, images):
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
        final = normed(self.final_norm(model), out.hidden_states[-1]) if layout.maps else out.last_hidden_state
        return final, {block: (x[:, :prefix], x[:, prefix:]) for block, x in left.items()}

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
        images = images_of(model)
        mean, std = (per_channel(tuple(images[name]), size[0]) for name in ("mean", "std"))
        return InputFormat(size, mean, std, images["interpolation"], images["crop_pct"], images["crop_mode"])

    def resize(self, model: Any, size: int | tuple[int, int]) -> None:
        sizes.resize(_layout(model), model, pair(size))
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
        config.reset_classifier(_layout(model), model, whole, classes)

    def class_names(self, model: nn.Module) -> list[str] | None:
        return config.class_names(model) if self.classifier(model).classes else None

    def name_classes(self, model: nn.Module, names: Sequence[str]) -> None:
        config.name_classes(model, names)

    def recompute(self, model: Any, on: bool = True) -> None:
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.activation_checkpointing_disable()

    # Building, saving and loading.

    def architectures(self) -> Collection[str]:
        return [name for layout in LAYOUTS.values() for name in layout.names]

    def builds(self, name: str) -> bool:
        return name.startswith(hub.SOURCE) or name in self.architectures()

    def build(self, name: str, args: Mapping[str, Any], *, pretrained: bool, images: Mapping[str, Any]) -> nn.Module:
        if name.startswith(hub.SOURCE):
            return hub.opened(name, args)
        return config.build(name, args, pretrained, images)

    def describe(self, model: Any) -> Description:
        return config.describe(_layout(model), model)

    def classifiers_of(self, name: str) -> tuple[str, ...]:
        wholes = {name: whole for layout in LAYOUTS.values() for name, whole in layout.wholes.items()}
        return wholes[name].heads if name in wholes else ("classifier",)

    def trained_size(
        self, model: nn.Module, state: State, trained_at: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        return sizes.trained_size(_layout(model), model, state, trained_at)

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
        return sizes.fit_weights(_layout(model), model, state, trained_at)


def _layout(model: nn.Module) -> Layout:
    layout = layout_of(model)
    assert layout is not None  # As `claims` said.
    return layout
