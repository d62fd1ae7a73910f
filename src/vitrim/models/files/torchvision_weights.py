"""Weights of torchvision's `vit_*`, plain or pruned in stages (PTP-FAKD), as weights of timm's `VisionTransformer`.

The pruned form keeps the model under `base.` and repeats its blocks as `stage1.i.*`, `stage2.i.*`, `stage3.i.*`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ...errors import CheckpointError
from ...text import short_name

_BLOCK = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)")
_STAGE = re.compile(r"stage(\d+)\.(?:encoder_layer_)?(\d+)\.(.+)")
_OUTSIDE = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
    "heads.head.weight": "head.weight",
    "heads.head.bias": "head.bias",
}
_INSIDE = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.linear_1": "mlp.fc1",  # Files older than torchvision 0.13.
    "mlp.linear_2": "mlp.fc2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}
_NAMES = {
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 32): "vit_base_patch32_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1024, 24, 32): "vit_large_patch32_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
_HEADS = {1280: 16}  # vit_h_14 has heads of 80 dims; all others have 64.


@dataclass(frozen=True, eq=False)
class Converted:
    """A timm architecture, the arguments that give it the sizes of the checkpoint, its classes and its state dict."""

    name: str
    sizes: dict[str, int | float]
    num_classes: int
    state: dict[str, Tensor]

    @property
    def data(self) -> dict[str, tuple[float, ...]]:
        """What torchvision normalises images with; to overlay on timm's own configuration."""
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a torchvision `vit_*`, plain or pruned, maybe under a prefix."""
    return any(f".{name}".endswith(".encoder.pos_embedding") for name in state)


def convert_torchvision(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> Converted:
    """Rename and regroup a torchvision state dict; its tensors show depth, width, patch, image size and classes.

    Args:
        state: names to tensors, as torchvision or the pruned models write them.
        num_heads: attention heads; by default one per 64 dims (16 for the 1280 dims of `vit_h_14`).

    Raises:
        CheckpointError: a convolutional stem, a hidden layer in the head, names that are not torchvision's,
            blocks that are missing, or copies of a block that differ.
    """
    plain = {name.removeprefix("base."): value for name, value in _without_prefix(state).items()}
    blocks, outside = _gather(plain)
    out = {_rename_outside(name): value for name, value in outside.items()}
    for index, block in enumerate(blocks):
        for name, value in block.items():
            out[f"blocks.{index}.{_rename_inside(name)}"] = value
    if absent := [name for name in _OUTSIDE.values() if name not in out and not name.startswith("head.")]:
        raise CheckpointError(f"not a whole torchvision ViT: {', '.join(absent)} cannot be found in the file")
    stem, hidden = out["patch_embed.proj.weight"], out.get("blocks.0.mlp.fc1.weight")
    shapes = stem.ndim == 4 and stem.shape[2] == stem.shape[3] and min(stem.shape) > 0 and out["pos_embed"].ndim == 3
    if not shapes or hidden is None or hidden.ndim != 2 or ("head.weight" in out and out["head.weight"].ndim != 2):
        raise CheckpointError("not a whole torchvision ViT: tensors are missing, or have other shapes than in any")
    width, channels, patch, _ = stem.shape
    grid = math.isqrt(max(0, out["pos_embed"].shape[1] - 1))
    if not grid or grid * grid + 1 != out["pos_embed"].shape[1]:
        raise CheckpointError(f"{out['pos_embed'].shape[1]} positions are not a square grid and a class token")
    heads = num_heads or _HEADS.get(width) or width // 64
    if not heads or width % heads:
        raise CheckpointError(f"cannot divide {width} dims into heads of 64; pass num_heads=, the number of them")
    sizes = {
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        # A step up, for timm takes int(ratio * width), which can fall one short of the hidden width.
        "mlp_ratio": math.nextafter(hidden.shape[0] / width, math.inf),
        "patch_size": patch,
        "img_size": grid * patch,
        "in_chans": channels,
    }
    name = _NAMES.get((width, len(blocks), patch), "vit_base_patch16_224")
    return Converted(name, sizes, out["head.weight"].shape[0] if "head.weight" in out else 0, out)


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The part of the names that training code put in front of a whole model is removed, with all that it is not of."""
    names = [name for name in state if f".{name}".endswith(".encoder.pos_embedding")]
    prefix = names[0].removesuffix("encoder.pos_embedding").removesuffix("base.") if names else ""
    if len(names) > 1:
        raise CheckpointError(
            "the weights of several torchvision models are in one file; save the one to use by itself"
        )
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _gather(plain: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The blocks in order, from `encoder.layers`, from the stages or from both, and everything else."""
    layers: dict[int, dict[str, Tensor]] = {}
    staged: dict[tuple[int, int], dict[str, Tensor]] = {}
    outside: dict[str, Tensor] = {}
    for name, value in plain.items():
        if found := _BLOCK.fullmatch(name):
            layers.setdefault(int(found[1]), {})[found[2]] = value
        elif found := _STAGE.fullmatch(name):
            staged.setdefault((int(found[1]), int(found[2])), {})[found[3]] = value
        else:
            outside[name] = value
    blocks = [layers[index] for index in sorted(layers)]
    copies = [staged[place] for place in sorted(staged)]
    if not blocks and not copies:
        raise CheckpointError("the file holds no blocks, neither encoder.layers.* nor stage*.*")
    if sorted(layers) != list(range(len(layers))):
        raise CheckpointError(f"blocks are missing: encoder.layers has only {sorted(layers)}")
    if blocks and copies and not _same(blocks, copies):
        raise CheckpointError(
            "encoder.layers and the copies of its blocks in stage1, stage2, ... differ; leave the wrong ones out"
        )
    return blocks or copies, outside


def _same(blocks: list[dict[str, Tensor]], copies: list[dict[str, Tensor]]) -> bool:
    return len(blocks) == len(copies) and all(
        block.keys() == copy.keys() and all(torch.equal(value, copy[name]) for name, value in block.items())
        for block, copy in zip(blocks, copies, strict=True)
    )


def _rename_outside(name: str) -> str:
    if name not in _OUTSIDE:
        what = "a convolutional stem" if name.startswith("conv_proj") else repr(short_name(name))
        raise CheckpointError(f"the torchvision loader cannot place {what} in a timm ViT")
    return _OUTSIDE[name]


def _rename_inside(name: str) -> str:
    for old, new in _INSIDE.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise CheckpointError(f"the torchvision loader cannot place {short_name(name)!r} of a block in a timm ViT")
