"""Pictures of which tokens survive: the image, and what is left of it after every cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import DataError, ScheduleError, VitrimError
from ..models import attached
from ..models.evaluating import evaluating
from ..output import replacing
from .files import picture_paths, spread_evenly
from .sheet import Tile, montage_rows, sheet, wrap_rows
from .view import Images, Source, View

_BATCH, _TOKENS = 16, 1 << 16


@dataclass(frozen=True)
class Pictures:
    """The pictures that `show` has written. Iterates over their paths.

    skipped: a line for each image that could not be read. left_out: images that were not drawn because of `limit`.
    """

    paths: tuple[Path, ...]
    skipped: tuple[str, ...] = ()
    left_out: int = 0

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)


def show(
    model: nn.Module,
    images: Images,
    out: str | Path,
    *,
    montage: bool = False,
    scores: bool = False,
    blocks: Sequence[int] | None = None,
    limit: int | None = 16,
    device: str | torch.device | None = None,
    overwrite: bool = False,
) -> Pictures:
    """Draw each image and its surviving, merged or fused patches after every cut of the attached reduction.

    Args:
        model: has a reduction attached; runs in eval mode, and its mode and device are restored.
        images: a folder (searched at any depth), files, or a batch (B, C, H, W), normalised as the model takes it.
        out: folder for one PNG per image; with `montage`, the one file (`.png`), or a folder for `montage.png`.
        montage: all images on one sheet, a row each.
        scores: add a heat map of the scores by which each cut chose its tokens.
        blocks: show the tokens leaving these blocks; by default wherever there is a cut.
        limit: draw at most this many images, spread evenly over the sorted files; None draws all.
        device: where to run; by default where the model is.
        overwrite: replace pictures that exist.

    Raises:
        DataError: no images, or none that can be read. A few unreadable ones are skipped and named in the result.
        VitrimError: nothing is attached, nothing is cut, a block does not exist, or a picture exists already.
    """
    handle = attached(model)
    if handle is None:
        raise VitrimError("no reduction is attached to this model; call vitrim.attach(model, ...) first")
    depth = handle.geometry.depth
    wrong = [block for block in blocks or () if not 0 <= block < depth]
    if wrong:
        raise ScheduleError(f"there is no block {wrong[0]}; the model has blocks 0 to {depth - 1}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is the number of images to draw, 1 or more, not {limit}")
    view = View(model, handle)
    found = view.sources(images)
    sources = spread_evenly(found, limit)
    targets = picture_paths([source.name for source in sources], Path(out), montage)
    taken = [path for path in targets if path.exists()]
    if taken and not overwrite:
        raise VitrimError(f"{taken[0]} exists already; choose another place, or pass overwrite (--overwrite)")

    skipped: list[str] = []
    written: list[Path] = []
    rows: list[list[Tile]] = []
    heading = str(handle.reduction)
    with _evaluating(model, device) as device_now:
        # Large images are drawn a few at a time, so that memory does not grow with their number.
        size = max(1, min(_BATCH, _TOKENS // handle.geometry.num_patches))
        for start in range(0, len(sources), size):
            part = slice(start, start + size)
            ready = _load(sources[part], targets[part], skipped)
            if not ready:
                continue
            batch = torch.stack([image for _, _, image in ready])
            with torch.inference_mode():
                drawn = list(view.draw(batch, device_now, blocks, scores, side=192 if montage else 288))
            for (name, target, _), (tiles, heat) in zip(ready, drawn, strict=True):
                if montage:
                    rows += montage_rows(name, tiles, heat, first=not rows)
                else:
                    _save(sheet(wrap_rows(tiles, heat), name, heading), target, overwrite)
                    written.append(target)
    if montage and rows:
        _save(sheet(rows, heading), targets[0], overwrite)
        written.append(targets[0])
    if not written:
        raise DataError(f"none of the {len(sources)} images can be read; the first: {skipped[0]}")
    return Pictures(tuple(written), tuple(skipped), len(found) - len(sources))


@contextmanager
def _evaluating(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """Eval mode on this device within this context; mode and device are restored."""
    home = next(model.parameters()).device
    there = home if device is None else torch.device(device)
    with evaluating(model):
        try:
            model.to(there)
            yield there
        finally:
            model.to(home)


def _load(sources: Sequence[Source], targets: Sequence[Path], skipped: list[str]) -> list[tuple[str, Path, Tensor]]:
    """The images that can be read, each with its name and its target; the others add a line to `skipped`."""
    ready: list[tuple[str, Path, Tensor]] = []
    for source, target in zip(sources, targets, strict=True):
        try:
            ready.append((source.name, target, source.load()))
        except DataError as error:
            skipped.append(str(error))
    return ready


def _save(picture: Image.Image, path: Path, overwrite: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=overwrite) as part:
        picture.save(part, "PNG")
