"""What a model expects of its images: size, statistics, interpolation and crop."""

from dataclasses import dataclass

from torch import nn

from ..errors import DataError, UnknownNameError

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class InputFormat:
    """What a model expects of its images.

    size: (channels, height, width).
    mean, std: per channel, to normalise pixels in [0, 1] with.
    interpolation: Pillow's name of the filter for resizing, one of `INTERPOLATIONS`.
    crop_pct: share of the resized image that an evaluation crop shows.
    crop_mode: how evaluation fits an image in: timm's "center", "squash" (no crop, aspect ratio lost) or "border".

    Raises:
        UnknownNameError: there is no such interpolation or crop mode.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        # timm takes any mode of cropping that it does not know for "center".
        for what, name, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS), ("crop mode", self.crop_mode, CROP_MODES),
        ):  # fmt: skip
            if name not in known:
                raise UnknownNameError(what, name, known)

    @classmethod
    def of(cls, model: nn.Module, image_size: int | None = None) -> "InputFormat":
        """The format of this very model.

        Raises:
            DataError: the model takes images of another size than `image_size`.
            UnsupportedModelError: its format is not known.
        """
        from .finding import adapter_of  # Here, since adapters return this class.

        form = adapter_of(model).input_format(model)
        _, height, width = form.size
        if image_size is not None and (image_size, image_size) != (height, width):
            size = f"{height}" if height == width else f"{height} x {width}"
            raise DataError(f"the model takes images of {size} px, but data.image_size is {image_size}")
        return form

    @property
    def mode(self) -> str:
        """The Pillow mode with so many channels; `DataError` where there is none."""
        if self.size[0] not in (1, 3):
            raise DataError(f"the model takes {self.size[0]} channels; images have 1 (grey) or 3 (colour)")
        return "L" if self.size[0] == 1 else "RGB"


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics for so many channels: their mean where they are of another number."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels
