"""What the images of a model of Hugging Face transformers are like, as its processor says."""

import math
from collections.abc import Mapping
from typing import Any

from ....errors import CheckpointError, UnsupportedModelError, VitrimError
from .layout import Layout, layout_of

Images = dict[str, Any]
"""What images are like, in the words of `InputFormat`: mean, std, interpolation, crop_pct, crop_mode."""
_OWN = "vitrim_images"
"""Attribute of a model: what its images are like."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def library() -> Any:
    """The package transformers; `VitrimError` with the command that installs it where it is missing."""
    try:
        import transformers
    except ImportError:
        raise VitrimError("transformers is not installed; run: pip install 'vitrim[hf]'") from None
    return transformers


def images_of(model: Any) -> Images:
    """What the images of this model are like.

    Raises:
        UnsupportedModelError: its weights come from somewhere, and the processor that belongs to them is not there.
    """
    if (own := vars(model).get(_OWN)) is not None:
        return dict(own)
    source = getattr(model, "name_or_path", "") or ""
    layout = layout_of(model)
    assert layout is not None
    if not source:
        return default_images(layout)
    try:
        processor = library().AutoImageProcessor.from_pretrained(source, local_files_only=True)
    except Exception:  # Whatever is wrong, its format is not known.
        raise UnsupportedModelError(
            f"what images this {type(model).__name__} expects is not known, since {source} has no processor here; save "
            "it there with processor.save_pretrained, or give size, mean and std"
        ) from None
    return read_processor(processor, source)[0]


def set_images(model: Any, images: Images) -> None:
    """Note what the images of this model are like."""
    vars(model)[_OWN] = images


def read_processor(processor: Any, source: str) -> tuple[Images, tuple[int, int]]:
    """What a processor makes of images, in the words of `InputFormat`, and their (height, width)."""

    def read(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    size, crop = _sides(read("size", {})), _sides(read("crop_size", {}))
    cropped = bool(read("do_center_crop", False)) and "height" in crop
    final = crop if cropped else size
    resized = size.get("shortest_edge", size.get("height", 0))
    factor = float(read("rescale_factor", 1 / 255))
    if "height" not in final or not resized or not read("do_resize", True) or abs(factor * 255 - 1) > 1e-3:
        raise CheckpointError(
            f"the processor of {source} does not scale all images to one size and to values from 0 to 1, so it cannot "
            "be the format of a model here"
        )
    squashes = "height" in size
    mean, std = (read("image_mean"), read("image_std")) if read("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    images = {
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "interpolation": _FILTERS[int(read("resample", 2))],
        "crop_pct": _share(crop["height"], resized) if cropped else 1.0,
        "crop_mode": "squash" if squashes else "center",
    }
    return images, (final["height"], final["width"])


def _share(part: int, whole: int) -> float:
    """part / whole, such that the whole is what division by it and rounding down give back."""
    share = part / whole
    return share if math.floor(part / share) == whole else math.nextafter(share, 0)


def _sides(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    found = dict(size) if isinstance(size, Mapping) else vars(size)
    return {key: int(value) for key, value in found.items() if value is not None}


def default_images(layout: Layout) -> Images:
    """What images are like where nothing says more than the family of the model."""
    mean, std = layout.stats
    return {
        "mean": list(mean), "std": list(std), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
