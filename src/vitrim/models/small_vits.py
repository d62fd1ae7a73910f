"""Small ViTs for small images, as ordinary timm models: system 1's ViT, system 3's hybrid, and one for 8 px digits.

Importing this file registers them in timm. A convolutional stem in place of the patch embedding follows "Early
Convolutions Help Transformers See Better" (Xiao et al., 2021): on few images it learns where a linear one does not.
"""

from itertools import pairwise
from typing import Any

from timm.layers.helpers import to_2tuple
from timm.layers.patch_embed import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
DIGITS = {"mean": (0.3053,), "std": (0.3759,)}
"""Of scikit-learn's digits, whose 17 grey levels are scaled to [0, 1]."""


class ConvStem(PatchEmbed):
    """Three 3x3 convolutions in place of a linear patch embedding; (B, C, H, W) to (B, H W / patch^2, embed_dim).

    Everything else is as in timm's `PatchEmbed`, but patches are square, of 1, 2, 4 or 8 px, and keep their size.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.patch_size not in ((1, 1), (2, 2), (4, 4), (8, 8)):
            raise ValueError(f"a convolutional stem has square patches of 1, 2, 4 or 8 px, not {self.patch_size}")
        plain: nn.Conv2d = self.proj  # pyright: ignore[reportAssignmentType]
        width, dd = plain.out_channels, {"device": plain.weight.device, "dtype": plain.weight.dtype}
        if width < 4:
            raise ValueError(f"a convolutional stem needs an embed_dim of 4 or more, not {width}")
        layers: list[nn.Module] = []
        for index, (old, new) in enumerate(pairwise((plain.in_channels, width // 4, width // 2, width))):
            last = index == 2  # All others have a norm, so that they need no bias.
            stride = 2 if self.patch_size[0] >= 2 ** (index + 1) else 1
            bias = last and plain.bias is not None
            layers.append(nn.Conv2d(old, new, kernel_size=3, stride=stride, padding=1, bias=bias, **dd))
            layers += [] if last else [nn.BatchNorm2d(new, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image size; the patch size is tied to the strides of the convolutions."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"the patches of a convolutional stem stay {self.patch_size} px")
        height_width: Any = None if img_size is None else to_2tuple(img_size)
        super().set_input_size(img_size=height_width)


def _cfg(size: tuple[int, int, int], first_conv: str, **data: Any) -> dict[str, Any]:
    return {
        "input_size": size,
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": "head",
        **data,
    }


default_cfgs = generate_default_cfgs({
    "vitrim_cifar_vit": _cfg((3, 48, 48), "patch_embed.proj", num_classes=10, **CIFAR),
    "vitrim_hybrid_vit": _cfg((3, 32, 32), "patch_embed.proj.0", num_classes=100, **CIFAR),
    "vitrim_digits_vit": _cfg((1, 8, 8), "patch_embed.proj.0", num_classes=10, **DIGITS),
})  # fmt: skip


@register_model
def vitrim_cifar_vit(pretrained: bool = False, **args: Any) -> VisionTransformer:
    """System 1's small ViT: 8 blocks, 12 x 12 patches of 4 px and CLS, on CIFAR images resized to 48 px."""
    return _create("vitrim_cifar_vit", pretrained, args, patch_size=4, embed_dim=192, depth=8, num_heads=3)


@register_model
def vitrim_hybrid_vit(pretrained: bool = False, **args: Any) -> VisionTransformer:
    """System 3's hybrid: convolutional stem to 16 x 16 tokens and CLS, 6 blocks, drop path to 0.1, at 32 px."""
    return _create(
        "vitrim_hybrid_vit", pretrained, args,
        patch_size=2, embed_dim=192, depth=6, num_heads=6, drop_path_rate=0.1, embed_layer=ConvStem,
    )  # fmt: skip


@register_model
def vitrim_digits_vit(pretrained: bool = False, **args: Any) -> VisionTransformer:
    """For the demonstration: convolutional stem that keeps 8 x 8 = 64 tokens and CLS, 8 blocks of width 96."""
    return _create(
        "vitrim_digits_vit", pretrained, args,
        patch_size=1, embed_dim=96, depth=8, num_heads=3, embed_layer=ConvStem, in_chans=1,
    )  # fmt: skip


def _create(name: str, pretrained: bool, args: dict[str, Any], **sizes: Any) -> VisionTransformer:
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **sizes | args,
    )  # fmt: skip
