"""What a model expects of its images: size, statistics, interpolation and crop."""

from dataclasses import dataclass

from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn

from ..errors import DataError


@dataclass(frozen=True)
class InputFormat:
    """What a model expects of its images: (channels, height, width), and the statistics to normalise with."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    """How evaluation fits an image into the input: timm's "center", "squash" (no crop, aspect lost) or "border"."""

    @classmethod
    def of(cls, model: nn.Module, image_size: int | None = None) -> "InputFormat":
        """The format of this very model; timm's configuration tells only that of its architecture.

        Raises:
            DataError: the model takes images of another size than `image_size`.
        """
        config, size = resolve_model_data_config(model), input_size_of(model)
        if image_size not in (None, size[1]):
            raise DataError(f"the model takes images of {size[1]} px, but data.image_size is {image_size}")
        mean, std = (
            (sum(values) / len(values),) * size[0] if len(values) != size[0] else tuple(values)
            for values in (config["mean"], config["std"])
        )
        return cls(size, mean, std, config["interpolation"], config["crop_pct"], config["crop_mode"])

    @property
    def mode(self) -> str:
        """The Pillow mode with so many channels; `DataError` where there is none."""
        if self.size[0] not in (1, 3):
            raise DataError(f"the model takes {self.size[0]} channels; images have 1 (grey) or 3 (colour)")
        return "L" if self.size[0] == 1 else "RGB"


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that this very model takes, of whatever kind it is.

    timm's configuration of an architecture keeps those of its weights, whatever the model was built with.
    """
    channels, *size = get_model_input_config(model)["input_size"]
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    return int(channels), int(height), int(width)
