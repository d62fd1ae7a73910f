"""What identifies the images of a data set, so that results computed on them are not used for others."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset


def fingerprint(dataset: Any, probes: int = 64, *, sizes: bool = True) -> str:
    """SHA-256 of names and sizes of the image files; of some of the images themselves where there are no files.

    Args:
        dataset: by index, items (image, target, ...); or a `torch.utils.data.Subset` of one.
        probes: how many images are read where there are no files, at equal distances.
        sizes: of files; without them no file is touched, which takes long where there are a million.
    """
    if isinstance(dataset, Subset):
        return _digest([fingerprint(dataset.dataset, probes, sizes=sizes), *map(int, dataset.indices)])
    names = _file_names(dataset, sizes)
    if names is not None:
        return _digest(
            [part for name in names for part in (Path(name).name, Path(name).stat().st_size if sizes else 0)]
        )
    length = len(dataset)
    chosen = sorted({round(i * (length - 1) / max(probes - 1, 1)) for i in range(probes)}) if length else []
    code = hashlib.sha256(str(length).encode())
    for index in chosen:
        try:
            image, target = dataset[index][:2]
        except Exception:  # One that cannot be read is so every time, and readers fail in many ways.
            code.update(b"unreadable")
            continue
        content = image.read() if hasattr(image, "read") else np.ascontiguousarray(image).tobytes()
        code.update(repr(target).encode() + content)
    return code.hexdigest()


def _file_names(dataset: Any, look: bool) -> Sequence[str] | None:
    if callable(getattr(dataset, "filenames", None)):  # timm
        names: Sequence[str] = dataset.filenames(absolute=True)
    else:  # vitrim's folders, torchvision, a list of (file, class)
        listed = dataset if isinstance(dataset, list) else getattr(dataset, "samples", [])
        names = [sample[0] for sample in listed]
    if not all(isinstance(name, str | Path) for name in names):
        return None
    return names if len(names) and all(Path(name).is_file() for name in (names if look else names[:1])) else None


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="surrogateescape")).hexdigest()
