"""Which images to draw, and where their pictures go. Nothing is decoded here."""

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

from ..data.decode import suffixes
from ..errors import DataError

T = TypeVar("T")


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
        kinds = suffixes()
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in kinds and path.is_file())
        if not paths:
            raise DataError(f"{root} holds no images ({', '.join(sorted(kinds))})")
        return [(path.relative_to(root).as_posix(), path) for path in paths]
    paths = [Path(image) for image in images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} is not a file")
    if not paths:
        raise DataError("the list of images is empty")
    return [(path.name, path) for path in paths]


def spread_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, at equal distances, so that a folder of classes shows several of them."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[at * len(items) // limit] for at in range(limit)]


def picture_paths(names: Sequence[str], out: Path, montage: bool) -> list[Path]:
    """Where each image is drawn: PNGs of its own in the folder `out`, all different, or one montage for all.

    Raises:
        DataError: `out` is a file where a folder is needed.
    """
    single = montage and out.suffix.lower() == ".png"
    folder = out.parent if single else out
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; pictures need a folder")
    if montage:
        return [out if single else out / "montage.png"] * len(names)
    flat = [name.replace("/", "-") for name in names]
    # a.jpg and a.png keep their endings, names that are equal still get a number.
    stems = [Path(name).stem for name in flat]
    twice = Counter(stems)
    paths: dict[Path, None] = {}
    for stem, name in zip(stems, flat, strict=True):
        wanted = name if twice[stem] > 1 else stem
        tries = (f"{wanted}.png" if number == 1 else f"{wanted}-{number}.png" for number in count(1))
        paths[next(out / name for name in tries if out / name not in paths)] = None
    return list(paths)
