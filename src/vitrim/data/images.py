"""Labelled images by index, decoded but not transformed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from .decode import decode, read_image


class Images:
    """Labelled images by index, decoded but not transformed.

    Args:
        source: by index, items that begin with (image, class index), where the image is a path, an open file or a
            Pillow image.
        classes: names of the classes, if they are known.
        mode: Pillow mode of the decoded images, "RGB" or "L".
        notes: lines on what belongs to the data set and is not read.
        place: where they are, as the user named it: a folder, or a data set and its split.
    """

    def __init__(
        self, source: Any, classes: Sequence[str] = (), mode: str = "RGB", notes: Sequence[str] = (), place: str = ""
    ) -> None:
        self.source, self.classes, self.mode, self.notes = source, list(classes), mode, list(notes)
        self.place = place

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Where image `index` comes from."""
        if (reader := getattr(self.source, "reader", None)) is not None:
            return str(reader.filename(index, absolute=True))
        if (samples := getattr(self.source, "samples", None)) is not None:
            return str(samples[index][0])
        if isinstance(self.source, list) and isinstance(path := self.source[index][0], str | Path):
            return str(path)
        return f"image {index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image `index` and its class.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        # timm's own data set replaces an unreadable image by its neighbour without a word; its reader does not.
        items = getattr(self.source, "reader", None) or self.source
        try:
            item, target = items[index][:2]
        except DataError:
            raise
        except Exception as error:  # Readers decode too, and raise whatever their libraries raise.
            raise DataError(f"cannot read {self.name(index)}: {' '.join(str(error).split())}") from None
        if isinstance(item, str | Path):
            return read_image(item, self.mode), int(target)
        if isinstance(item, Image.Image):
            return decode(item, self.mode, self.name(index)), int(target)
        if not hasattr(item, "read"):
            raise DataError(
                f"{self.name(index)} is of type {type(item).__name__}; give paths, open files or Pillow images, and "
                "leave transforms out of the data set"
            )
        with item:
            return decode(item, self.mode, self.name(index)), int(target)
