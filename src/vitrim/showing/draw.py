"""Draw which tokens of one image are left after a cut, patch by patch.

Shapes: N input patch tokens on a grid of (rows, columns), M tokens now. A canvas is an array of bytes
(rows, patch height, columns, patch width, 3), so that one index picks a patch and another a strip of it.
"""

from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Canvas = NDArray[np.uint8]
Grid = tuple[int, int]

GREY_VEIL, BLUE_VEIL = np.array([229, 231, 235]), np.array([182, 212, 240])


def make_canvas(pixels_HWC: NDArray[np.uint8], grid: Grid, side: int) -> Canvas:
    """The image enlarged to whole patches, its longer side about `side` pixels; small images keep their hard pixels."""
    rows, columns = grid
    height, width = pixels_HWC.shape[:2]
    scale = side / max(height, width)
    patch_height = max(3, round(scale * height / rows))
    patch_width = max(3, round(scale * width / columns))
    how = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC
    enlarged = Image.fromarray(pixels_HWC).resize((columns * patch_width, rows * patch_height), how)
    return np.asarray(enlarged).reshape(rows, patch_height, columns, patch_width, 3)


def to_image(canvas: Canvas) -> Image.Image:
    """The canvas as a picture."""
    rows, patch_height, columns, patch_width, _ = canvas.shape
    return Image.fromarray(canvas.reshape(rows * patch_height, columns * patch_width, 3))


def draw_tokens(canvas: Canvas, origin_N: NDArray[np.int64], fused_M: NDArray[np.bool_]) -> Image.Image:
    """Draw the tokens that are left after a cut.

    A token of one patch shows its pixels. Merged patches take the mean colour of their group, inside a border.
    Dropped patches fade to grey, or to blue where the image itself is grey. So do patches behind a fused token,
    which carry a dot in its mean colour.
    """
    out = canvas.copy()
    rows, columns = canvas.shape[0], canvas.shape[2]
    origin = origin_N.reshape(rows, columns)
    slot = origin.clip(min=0)
    colour_M = slot_colours(canvas, origin_N, len(fused_M))
    population_M = np.bincount(origin_N[origin_N >= 0], minlength=len(fused_M))
    dropped = origin < 0
    fused = ~dropped & fused_M[slot]
    merged = ~dropped & ~fused & (population_M[slot] > 1)
    veil = _veil(canvas)
    by_patch = out.transpose(0, 2, 1, 3, 4)  # a view: (rows, columns, patch height, patch width, 3)
    by_patch[dropped] = _fade(by_patch[dropped], veil)
    tint = colour_M[slot[fused]][:, None, None]
    by_patch[fused] = _fade(by_patch[fused], 0.78 * veil + 0.22 * tint)
    by_patch[fused] = np.where(_dot(canvas), 0.3 * veil + 0.7 * tint, by_patch[fused])
    by_patch[merged] = colour_M[slot[merged]][:, None, None]
    _outline(out, origin, merged, colour_M)
    return to_image(out)


def draw_scores(canvas: Canvas, score_N: NDArray[np.floating]) -> Image.Image:
    """Scores as a heat map over the faint image, bright = high; NaN where there was no token left."""
    rows, columns = canvas.shape[0], canvas.shape[2]
    known = score_N[np.isfinite(score_N)]
    low, high = (known.min(), np.quantile(known, 0.99)) if len(known) else (0.0, 1.0)
    level = ((score_N - low) / max(high - low, np.finfo(np.float64).tiny)).clip(0, 1)
    heat = matplotlib.colormaps["magma"](np.nan_to_num(level).reshape(rows, columns))[..., :3] * 255
    grey = canvas.mean(axis=4, keepdims=True)
    out = (0.8 * heat[:, None, :, None] + 0.2 * grey).astype(np.uint8)
    lost = ~np.isfinite(score_N).reshape(rows, columns)
    by_patch = out.transpose(0, 2, 1, 3, 4)
    by_patch[lost] = _fade(canvas.transpose(0, 2, 1, 3, 4)[lost], _veil(canvas))
    return to_image(out)


def slot_colours(canvas: Canvas, origin_N: NDArray[np.int64], num_slots: int) -> NDArray[np.float64]:
    """Mean colour of the patches behind each token, (M, 3); black for a token without patches."""
    patch_N3 = canvas.mean(axis=(1, 3)).reshape(-1, 3)
    stays = origin_N >= 0
    total_M3 = np.zeros((num_slots, 3))
    np.add.at(total_M3, origin_N[stays], patch_N3[stays])
    return total_M3 / np.bincount(origin_N[stays], minlength=num_slots).clip(min=1)[:, None]


def _veil(canvas: Canvas) -> NDArray[np.int64]:
    """The colour of dropped patches, one that the image itself does not have."""
    return BLUE_VEIL if (canvas.max(axis=4) == canvas.min(axis=4)).all() else GREY_VEIL


def _fade(patches: NDArray[np.generic], towards: NDArray[Any]) -> NDArray[np.uint8]:
    grey = patches.mean(axis=-1, keepdims=True)
    return (0.86 * towards + 0.14 * grey).astype(np.uint8)


def _dot(canvas: Canvas) -> NDArray[np.bool_]:
    """A disc in the middle of a patch, (patch height, patch width, 1)."""
    y, x = (np.arange(size) - (size - 1) / 2 for size in (canvas.shape[1], canvas.shape[3]))
    radius = max(1.0, min(canvas.shape[1], canvas.shape[3]) / 7)
    return (y[:, None] ** 2 + x**2 <= radius**2)[..., None]


def _outline(
    canvas: Canvas, origin: NDArray[np.int64], merged: NDArray[np.bool_], colour_M: NDArray[np.float64]
) -> None:
    """Draw a border inside every merged patch wherever its neighbour belongs to another token."""
    width = max(1, round(min(canvas.shape[1], canvas.shape[3]) / 14))
    # Light lines in dark groups, dark ones in light groups: visible on any image, and the same all around a group.
    bright = colour_M @ np.array([0.299, 0.587, 0.114]) > 128
    line_M3 = np.where(bright[:, None], 0.35 * colour_M, 0.35 * colour_M + 0.65 * 255)
    line = line_M3[origin.clip(min=0)][:, None, :, None].astype(np.uint8)
    padded = np.pad(origin, 1, constant_values=-2)
    strips = {
        (0, 1): np.s_[:, :width],
        (2, 1): np.s_[:, -width:],
        (1, 0): np.s_[:, :, :, :width],
        (1, 2): np.s_[:, :, :, -width:],
    }
    for (down, right), strip in strips.items():
        neighbour = padded[down : down + origin.shape[0], right : right + origin.shape[1]]
        edge = (merged & (neighbour != origin))[:, None, :, None, None]
        canvas[strip] = np.where(edge, line, canvas[strip])
