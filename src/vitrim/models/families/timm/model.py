"""Any timm model: building, saving, input format, classifier, and features of those that are made of tokens."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models import get_model_args, get_model_input_config, get_pretrained_cfg, split_model_name_tag
from torch import Tensor, nn

from ....errors import UnsupportedModelError
from ...adapter import Adapter, Classifier, Description
from ...create import SOURCES, create
from ...input_format import InputFormat, per_channel
from ...outputs import ModelInfo

_IMAGES = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_TOKENS = ("forward_intermediates", "forward_head", "blocks", "num_prefix_tokens", "embed_dim")


class TimmModel(Adapter, cuts=False):
    """What all timm models have in common: CNNs, Swin, EVA, BEiT and so on as teachers."""

    name = "timm-model"
    covers = "any other timm model; as a teacher of logits and, where it is made of tokens, of features"
    speed_settings = frozenset({"training", "fused_attn", "grad_checkpointing", "qkv_bias_separate"})

    def claims(self, model: nn.Module) -> bool:
        return bool(getattr(model, "pretrained_cfg", None)) or type(model).__module__.startswith("timm.models")

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        return list(getattr(model, "blocks", ()))

    def grid(self, model: Any, image_size: Sequence[int]) -> tuple[int, int]:
        embed = getattr(model, "patch_embed", None)
        if embed is None or not hasattr(embed, "dynamic_feat_size"):
            raise UnsupportedModelError(f"the patches of this {type(model).__name__} are not known")
        rows, columns = embed.dynamic_feat_size((image_size[0], image_size[1]))
        return int(rows), int(columns)

    def info(self, model: Any) -> ModelInfo:
        name, classes = _name(model), self.classifier(model).classes
        if not all(hasattr(model, attribute) for attribute in _TOKENS):
            return ModelInfo(name, classes)
        return ModelInfo(
            name=name,
            classes=classes,
            depth=len(model.blocks),
            width=model.embed_dim,
            num_prefix=model.num_prefix_tokens,
            has_cls=getattr(model, "cls_token", None) is not None,
            has_dist=hasattr(model, "head_dist"),
        )

    def output_width(self, model: Any) -> int:
        return self.classifier(model).classes or int(getattr(model, "num_features", 0))

    def features(
        self, model: Any, images: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        if not blocks:
            return model.forward_features(images), {}
        final, between = model.forward_intermediates(
            images, indices=list(blocks), return_prefix_tokens=True, output_fmt="NLC"
        )
        pairs = [each[::-1] if isinstance(each, tuple) else (each[:, :0], each) for each in between]
        return final, dict(zip(blocks, pairs, strict=True))

    def head(self, model: Any, final_BTC: Tensor) -> Tensor:
        return model.forward_head(final_BTC)

    def heads(self, model: Any, final_BTC: Tensor) -> tuple[Tensor, Tensor]:
        pooled = model.head_drop(final_BTC[:, :2])
        return model.head(pooled[:, 0]), model.head_dist(pooled[:, 1])

    def input_format(self, model: Any) -> InputFormat:
        # timm's configuration of an architecture describes its weights, whatever size the model was built with.
        config, size = resolve_model_data_config(model), _input_size(model)
        mean, std = (per_channel(tuple(config[name]), size[0]) for name in ("mean", "std"))
        return InputFormat(size, mean, std, config["interpolation"], config["crop_pct"], config["crop_mode"])

    def resize(self, model: Any, size: int | tuple[int, int]) -> None:
        if not hasattr(model, "set_input_size"):
            super().resize(model, size)
        height, width = (size, size) if isinstance(size, int) else size
        shown = f"{height} px" if height == width else f"{height} x {width} px"
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        if height < patch[0] or width < patch[1]:
            raise UnsupportedModelError(f"images of {shown} are smaller than one patch of {max(patch)} px")
        try:
            model.set_input_size(img_size=(height, width))
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedModelError(f"{_name(model)} cannot take images of {shown}: {reason}") from None

    def final_norm(self, model: Any) -> nn.Module | None:
        return getattr(model, "norm", None)

    def classifier(self, model: Any) -> Classifier:
        config = getattr(model, "pretrained_cfg", None) or {}
        names = _names(config.get("classifier"))
        return Classifier(names, _classes(model, names), config.get("num_classes"))

    def reset_classifier(self, model: Any, classes: int) -> None:
        model.reset_classifier(classes)

    def recompute(self, model: Any, on: bool = True) -> None:
        model.set_grad_checkpointing(on)

    def architectures(self) -> Collection[str]:
        return timm.list_models()

    def builds(self, name: str) -> bool:
        return name.startswith(SOURCES) or timm.is_model(name)

    def build(self, name: str, args: Mapping[str, Any], *, pretrained: bool, images: Mapping[str, Any]) -> nn.Module:
        overlay = {"pretrained_cfg_overlay": dict(images)} if images else {}
        return create(name, {**overlay, **args}, pretrained=pretrained)

    def describe(self, model: Any) -> Description:
        config = getattr(model, "pretrained_cfg", None)
        # A model built without timm's factory has no such record, and its class does not say its size.
        if not config or not hasattr(model, "_model_args"):
            return super().describe(model)
        dropout = {name: value for name, value in model._model_args.items() if name.endswith("_rate")}
        images = {name: config[name] for name in _IMAGES if config.get(name) is not None}
        args = {**get_model_args(model, dropout), "num_classes": self.classifier(model).classes}
        return Description(config["architecture"], args, images)

    def classifiers_of(self, name: str) -> tuple[str, ...]:
        config = get_pretrained_cfg(split_model_name_tag(name)[0])
        return _names(config and config.classifier)


def _name(model: Any) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _names(classifier: str | Sequence[str] | None) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ("head",))


def _classes(model: Any, names: Sequence[str]) -> int:
    """Classes of the classifier as it is: `model.head = nn.Linear(...)` leaves timm's own number as it was."""
    head = getattr(model, names[0], None)
    if type(head) in (nn.Linear, nn.Identity):
        return head.out_features if isinstance(head, nn.Linear) else 0
    return int(getattr(model, "num_classes", 0))


def _input_size(model: Any) -> tuple[int, int, int]:
    channels, *size = get_model_input_config(model)["input_size"]
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    return int(channels), int(height), int(width)


def check_whole_patches(size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int], pads: bool) -> None:
    """Raise `UnsupportedModelError` unless images of (height, width) are a whole number of patches.

    Args:
        size: height and width of the images.
        grid: rows and columns of the patches that the model makes of them.
        patch: height and width of a patch.
        pads: whether the model pads images to whole patches.
    """
    shown = f"{size[0]} x {size[1]} px"
    if not grid[0] * grid[1]:
        raise UnsupportedModelError(f"images of {shown} are smaller than one patch of {max(patch)} px")
    if (grid[0] * patch[0], grid[1] * patch[1]) != size and not pads:
        raise UnsupportedModelError(f"images of {shown} cannot be divided into patches of {max(patch)} px")
