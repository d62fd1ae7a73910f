"""Which images to draw, and where their pictures go. Nothing is decoded here."""

from collections import Counter
from collections.abc import Sequence
from hashlib import sha1
from itertools import count
from pathlib import Path
from typing import TypeVar

from ..data.data_sets import all_images
from ..data.decode import suffixes
from ..errors import DataError

T = TypeVar("T")
_MOST_BYTES = 120  # Of the name of a picture; file systems take 143 or 255.


def find_images(images: str | Path | Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Names and paths of the image files in a folder (at any depth, sorted), or of the files listed.

    Raises:
        DataError: a path does not exist, or there are no images.
    """
    if isinstance(images, str | Path):
        root = Path(images)
        if root.is_file():
            return [(root.name, root)]
        if not root.is_dir():
            raise DataError(f"{root} is not a folder or an image")
        return [(path.relative_to(root).as_posix(), path) for path in sorted(map(Path, all_images(root)))]
    paths = [Path(image) for image in images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} is not a file")
    if not paths:
        raise DataError("the list of images is empty")
    return [(path.name, path) for path in paths]


def spread_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items at equal distances, so that several classes of a folder are shown."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[at * len(items) // limit] for at in range(limit)]


def picture_paths(names: Sequence[str], out: Path, montage: bool) -> list[Path]:
    """Where each image is drawn: PNGs of its own in the folder `out`, all different, or one montage for all.

    Raises:
        DataError: `out` is a file where a folder is needed, or has the name of a picture that is not written.
    """
    single = montage and out.suffix.lower() == ".png"
    if not single and not out.is_dir() and out.suffix.lower() in {*suffixes(), ".svg", ".pdf"}:
        advice = "a montage is a PNG file" if montage else "pictures need a folder, unless all are in one montage"
        raise DataError(f"{out} is the name of a file; {advice}")
    folder = out.parent if single else out
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; pictures need a folder")
    if montage:
        return [out if single else out / "montage.png"] * len(names)
    flat = [name.replace("/", "-") for name in names]
    # a.jpg and a.png keep their suffixes; equal names get a number.
    stems = [Path(name).stem for name in flat]
    repeated = Counter(stems)
    paths: dict[Path, None] = {}
    for stem, name in zip(stems, flat, strict=True):
        wanted = _short_name(name if repeated[stem] > 1 else stem)
        tries = (f"{wanted}.png" if number == 1 else f"{wanted}-{number}.png" for number in count(1))
        paths[next(out / name for name in tries if out / name not in paths)] = None
    return list(paths)


def _short_name(name: str) -> str:
    """The name without characters that terminals act on or UTF-8 lacks, and short enough for any file system."""
    clean = "".join(letter if letter.isprintable() else "_" for letter in name)
    if len(clean.encode()) <= _MOST_BYTES:
        return clean
    kept = clean.encode()[: _MOST_BYTES - 9].decode(errors="ignore")
    return f"{kept}-{sha1(name.encode(errors='surrogateescape')).hexdigest()[:8]}"
