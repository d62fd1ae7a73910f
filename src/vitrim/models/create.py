"""Calling timm's factory: whatever goes wrong in it becomes one line."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from ..errors import CheckpointError, VitrimError
from ..text import short_name

SOURCES = ("hf-hub:", "local-dir:")
"""How the names of models begin that timm saved together with their weights."""
_FILES = ("checkpoint_path", "pretrained_cfg", "cache_dir", "pretrained_model_args")


def create(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A model by its timm name.

    Raises:
        CheckpointError: published weights that cannot be had.
        VitrimError: arguments that the architecture does not take, or that make no sense.
    """
    _check(args)
    given = {key: value for key, value in args.items() if value is not None and key != "pretrained_cfg_overlay"}
    try:
        model = timm.create_model(name, pretrained=pretrained, **args)
    except TypeError as error:
        raise VitrimError(f"{name} does not take these arguments: {_line(error)}") from error
    except Exception as error:
        if not pretrained and not name.startswith(SOURCES):
            # timm builds with what it is given and fails later, in an assertion or in torch.
            raise VitrimError(f"{name} cannot be built with {short_name(given, 150)}: {_line(error)}") from error
        # Hubs and mirrors fail in many ways; all of them leave the user without weights.
        raise CheckpointError(f"no pretrained weights for {name}: {_line(error)}; give a file as checkpoint") from error
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "num_patches", None) == 0:
        raise VitrimError(f"images of {embed.img_size} px are smaller than one patch of {embed.patch_size} px")
    return model


def _check(args: Mapping[str, Any]) -> None:
    """What timm accepts, and what then fails in training or reads a file that nobody checked."""
    for name, value in args.items():
        if name in _FILES:
            raise VitrimError(f"{name} is not an argument of an architecture; give a file of weights as checkpoint")
        if not isinstance(value, int | float):
            continue
        if name.endswith("_rate") and not 0 <= value <= 1:
            raise VitrimError(f"{name} is {value}; it must be 0 or more, at most 1")
        if name == "depth" and value < 1:
            raise VitrimError(f"{name} is {value}; it must be 1 or more")


def _line(error: Exception) -> str:
    return short_name(" ".join(str(error).split()) or type(error).__name__, 200)
