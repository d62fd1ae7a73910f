"""Decoding: the one way from a file, or from an image in memory, to 8-bit pixels, in training, evaluation and pictures.

- The EXIF orientation is applied. Of an animation, the first frame counts. Colour profiles are ignored.
- Transparent pixels are shown on white, in every mode that has transparency (RGBA, LA, palettes, PNG's tRNS).
- Grey images of 9 to 16 bits are scaled to 8 bits. Floating-point images must lie in [0, 1].
- CMYK, YCbCr, HSV, LAB and palette images are converted to the mode of the model, "RGB" or "L".
- Refused, since their range is unknown: 32-bit integers of a TIFF file or in memory (Pillow's mode "I"), floats outside
  of [0, 1], and 16-bit images in memory that hold nothing above 4095, which are dark or meant in 8 or 12 bits.

Only the formats in `FORMATS` are opened, whatever a file is called. Others that Pillow knows start programs (EPS) or
hold no photographs.
"""

import os
import stat
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import Image

from ..errors import DataError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are read."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""
_DARK = 4095
"""The largest value of 12 bits, which is a sixteenth of white in 16."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that are taken for images, such as ".jpg", in lower case."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def read_image(path: str | os.PathLike[str], mode: str) -> Image.Image:
    """The image in a file, upright and in this mode ("RGB" or "L").

    Raises:
        DataError: the file is missing, is not a regular file, or cannot be decoded. The message names it.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):  # Opening a FIFO would wait for a writer, for ever if there is none.
            raise DataError(f"cannot read {path}: it is not a regular file")
        with Path(path).open("rb") as file:
            return decode(file, mode, str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from None


def decode(source: BinaryIO | Image.Image, mode: str, name: str) -> Image.Image:
    """The image in an open file, or an image in memory, upright and in this mode ("RGB" or "L").

    Raises:
        DataError: it cannot be decoded; `name` is what the message calls it.
    """
    try:
        if isinstance(source, Image.Image):
            return _converted(source, mode)
        with Image.open(source, formats=_formats()) as image:
            return _converted(image, mode)
    except DataError as error:
        raise DataError(f"cannot read {name}: {error}") from None
    except Exception as error:  # Pillow raises whatever its many parsers run into, from struct.error to MemoryError.
        raise DataError(f"cannot read {name}: {_reason(error)}") from None


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow can be built without some of them.


def _converted(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    eight = _eight_bits(image)
    if eight.has_transparency_data:
        eight = eight.convert("RGBA")
        eight = Image.alpha_composite(Image.new("RGBA", eight.size, "white"), eight)
    eight = eight.convert(mode)
    return eight if upright is None else eight.transpose(upright)


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data; 1, upright, without them and where they are damaged, as in many photographs."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel; Pillow's own conversion clips to 255."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        # Of files the format says the range. Cameras with 10 or 12 bits leave the upper ones of images in memory empty.
        if image.format is None and 0 < values.max() <= _DARK:
            way = "astype(np.uint8)" if values.max() <= 255 else "astype(float) / 4095"
            raise DataError(
                f"its 16-bit values go up to {values.max()} only, which is black or nearly so; if they are meant in "
                f"{'8' if values.max() <= 255 else '12'} bits, give Image.fromarray(np.asarray(image).{way})"
            )
        return _scaled(values, *_range_of(image))
    if image.mode == "I":
        values = np.asarray(image)
        # Of PNG and PPM files these are 16 bits, from 0 to 65535. Nothing says what others are, those in memory too.
        if image.format not in ("PNG", "PPM") or values.min() < 0 or values.max() > 65535:
            raise DataError(
                'its 32-bit integers (mode "I") have no known range; convert it to 8 or 16 bits without sign, as with '
                "Image.fromarray(np.asarray(image).astype(np.uint8)) where they go from 0 to 255"
            )
        return _scaled(values.astype(np.int64), 65535)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is not in the range either.
            raise DataError("its floating-point values are not all in [0, 1]; scale them, or convert it to 8 bits")
        return _scaled(np.round(values.astype(np.float64) * 65535).astype(np.int64), 65535)
    return image.convert("RGB") if image.mode == "LAB" else image  # It has no direct way to "L".


def _range_of(image: Image.Image) -> tuple[int, bool]:
    """The largest value of a 16-bit image, and whether it means black; TIFF files hold 12 bits too, and negatives."""
    tags = cast("dict[int, object]", getattr(image, "tag_v2", {}))
    bits = tags.get(_TIFF_BITS, (16,))
    most = 2 ** int(bits[0] if isinstance(bits, tuple) else cast("int", bits)) - 1
    return most, tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO


def _scaled(values_HW: np.ndarray, most: int, negative: bool = False) -> Image.Image:
    grey = (values_HW * 255 + most // 2) // most
    return Image.fromarray((255 - grey if negative else grey).astype(np.uint8))


def _reason(error: Exception) -> str:
    """What went wrong, in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify" in text:
        return "it is not an image in a format that vitrim reads (JPEG, PNG, WebP, GIF, BMP, TIFF, ...)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text if len(text) <= 200 else text[:197] + "..."
