"""Read images as a model takes them, and draw what its cuts do to them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.decode import read_image
from ..data.specs import DataSpec
from ..data.transforms import transforms_for
from ..errors import DataError, ScheduleError, ScoreError
from ..models import Handle, adapter_of
from ..models.input_format import InputFormat
from ..tokens import TokenState
from ..tokens.precision import exact
from .draw import draw_scores, draw_tokens, make_canvas, slot_colours, to_image
from .files import find_images
from .sheet import Tile

Images = str | Path | Sequence[str | Path] | Tensor


@dataclass(frozen=True)
class Source:
    """One image that is not read yet: its name, and how to read it as the model takes it, (C, H, W)."""

    name: str
    load: Callable[[], Tensor]


class View:
    """Reads images as a model takes them, and draws what its cuts do to them."""

    def __init__(self, model: nn.Module, handle: Handle) -> None:
        self.model, self.handle = model, handle
        self.form = InputFormat.of(model)
        self.transform = transforms_for(model, DataSpec())
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (self.form.mean, self.form.std))

    def sources(self, images: Images) -> list[Source]:
        """All images, none of them read yet."""
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise DataError(f"a batch of images has shape (B, C, H, W), not {tuple(images.shape)}")
            if not len(images):
                raise DataError("the batch of images is empty")
            return [Source(f"image-{at:03d}", lambda image=image: image) for at, image in enumerate(images.cpu())]
        return [Source(name, lambda path=path: self._read(path)) for name, path in find_images(images)]

    def draw(
        self, batch: Tensor, device: torch.device, blocks: Sequence[int] | None, scores: bool, side: int
    ) -> Iterator[tuple[list[Tile], list[Tile | None]]]:
        """For every image: the image and its cuts; heat maps of the scores (None where there are none)."""
        dtype = next(self.model.parameters()).dtype
        adapter_of(self.model).predict(self.model, batch.to(device, dtype))
        states = [_cpu(state) for state in self.handle.states]
        num_patches = states[0].origin.shape[1]
        plan = self.handle.plan(num_patches, training=False)
        place = {cut.block: cut.place for cut in plan.cuts}
        shown = sorted(place) if blocks is None else sorted(set(blocks))
        if not shown:
            raise ScheduleError(
                "the attached reduction cuts nothing in evaluation; attach one that does, with phase='both' "
                "and at full strength"
            )
        if scores and all(states[block].score is None for block in shown):
            raise ScoreError(
                "these cuts were not decided on scores (ToMe and Cluster compare tokens); leave the heat maps out"
            )
        grid = adapter_of(self.model).grid(self.model, batch.shape[-2:])
        before = [TokenState.start(len(batch), num_patches, torch.device("cpu")), *states]
        last = len(states) if plan.reinstate is None else plan.reinstate
        reduced = range(min(place, default=last), last)
        for at, image in enumerate(batch):
            canvas = make_canvas(self._pixels(image), grid, side)
            tiles = [Tile(to_image(canvas), "image", f"{num_patches} patches")]
            heat: list[Tile | None] = [None]
            for block in shown:
                state = states[block]
                origin, fused = state.origin[at].numpy(), self._fused(state, at, cut=block in reduced)
                swatch = slot_colours(canvas, origin, len(fused))[fused].mean(0) if fused.any() else None
                left = f"{int((~fused).sum())} of {num_patches} tokens" + (" + fused" if fused.any() else "")
                tiles.append(Tile(
                    draw_tokens(canvas, origin, fused),
                    f"{place.get(block, 'after')} block {block}",
                    left,
                    None if swatch is None else (int(swatch[0]), int(swatch[1]), int(swatch[2])),
                ))  # fmt: skip
                heat.append(_heat_tile(canvas, before[block], state, at) if scores else None)
            yield tiles, heat if scores else []

    def _fused(self, state: TokenState, at: int, cut: bool) -> np.ndarray:
        """Which tokens now were made by fusing the rest of some cut, (M,): those of several patches, and the last."""
        if not (cut and self.handle.reducer.extra_tokens):
            return np.zeros(state.size.shape[1], dtype=bool)
        fused = state.size[at].numpy() > 1
        fused[-1] = True
        return fused

    def _read(self, path: Path) -> Tensor:
        return self.transform(read_image(path, self.form.mode))

    def _pixels(self, image: Tensor) -> np.ndarray:
        """The picture behind a normalised image, as bytes (H, W, 3)."""
        shown = (image.float() * self.std + self.mean).clamp(0, 1)
        shown = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
        return (shown * 255).round().byte().permute(1, 2, 0).numpy()


def _heat_tile(canvas: np.ndarray, before: TokenState, after: TokenState, at: int) -> Tile | None:
    """The scores that decided a cut, each at the patches of its token."""
    if after.score is None:
        return None
    score = exact(after.score[at]).numpy()
    origin = before.origin[at].numpy()
    spread = np.where(origin < 0, np.nan, score[origin.clip(min=0)])
    return Tile(draw_scores(canvas, spread), "", f"score {score.min():.3g} to {score.max():.3g}")


def _cpu(state: TokenState) -> TokenState:
    score = None if state.score is None else state.score.cpu()
    return TokenState(state.origin.cpu(), state.size.cpu(), score)
