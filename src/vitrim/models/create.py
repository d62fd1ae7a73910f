"""One door to timm's factory: whatever it stumbles over is told in one line."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from ..errors import CheckpointError, VitrimError

SOURCES = ("hf-hub:", "local-dir:")
"""How names begin that stand for a model which timm saved, with its weights."""


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
            # timm builds with what it is given and stumbles later, over an assertion or in torch.
            raise VitrimError(f"{name} cannot be built with {given}: {_line(error)}") from error
        # Hubs and mirrors fail in many ways; all of them leave the user without weights.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"no pretrained weights for {name}: {reason}; give a file as checkpoint") from error
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "num_patches", None) == 0:
        raise VitrimError(f"images of {embed.img_size} px are smaller than one patch of {embed.patch_size} px")
    return model


def _check(args: Mapping[str, Any]) -> None:
    """What timm takes without a word, and what then fails in training."""
    for name, value in args.items():
        if not isinstance(value, int | float):
            continue
        if name.endswith("_rate") and not 0 <= value <= 1:
            raise VitrimError(f"{name} is {value}; it must be 0 or more, at most 1")
        if name == "depth" and value < 1:
            raise VitrimError(f"{name} is {value}; it must be 1 or more")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
