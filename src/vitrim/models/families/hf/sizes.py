"""Models of Hugging Face transformers for images of another size: their learnt positions, resampled."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....errors import CheckpointError, UnsupportedModelError, VitrimError
from ...adapter import State
from .config import set_image_size
from .layout import Layout, pair
from .weight_names import POSITIONS


def resize(layout: Layout, model: Any, size: tuple[int, int]) -> None:
    """See `Adapter.resize`."""
    tower = layout.tower_of(model)
    patch = pair(tower.config.patch_size)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    if rows == 0 or columns == 0:
        raise UnsupportedModelError(f"images of {size[0]} x {size[1]} px are smaller than one patch of {max(patch)} px")
    if layout.any_size:
        set_image_size(layout, model, size)
        return
    own = layout.own_size(tower.config)
    name, table = _positions(tower)
    if rows != columns and name.endswith("weight"):
        raise UnsupportedModelError(f"{type(model).__name__} takes square images only")
    prefix = layout.num_prefix(model) if layout.has_cls else 0
    grid = own[0] // patch[0], own[1] // patch[1]
    new = nn.Parameter(_resampled(table, prefix, grid, (rows, columns)), requires_grad=table.requires_grad)
    embeddings = tower.embeddings
    if name.endswith("weight"):
        embeddings.position_embedding = nn.Embedding.from_pretrained(new.detach(), freeze=not table.requires_grad)
        embeddings.position_ids = torch.arange(len(new), device=new.device)[None]
        embeddings.image_size = size[0]
        embeddings.num_patches, embeddings.num_positions = rows * columns, len(new)
        tower.config.image_size = size[0]
    else:
        embeddings.position_embeddings = new
        embeddings.image_size = embeddings.patch_embeddings.image_size = size
        embeddings.patch_embeddings.num_patches = rows * columns
        tower.config.image_size = size[0] if size[0] == size[1] else list(size)


def trained_size(layout: Layout, model: Any, state: State, trained_at: tuple[int, int] | None) -> Any:
    """See `Adapter.trained_size`."""
    found = _in_state(state)
    if found is None:
        return None
    grid, own = _grid(layout, model, found[1], trained_at), _own_grid(layout, model)
    patch = pair(layout.tower_of(model).config.patch_size)
    return None if grid == own else trained_at or (grid[0] * patch[0], grid[1] * patch[1])


def fit_weights(layout: Layout, model: Any, state: State, trained_at: tuple[int, int] | None) -> State:
    """See `Adapter.fit_weights`."""
    found = _in_state(state)
    if found is None:
        return state
    name, table = found
    grid, own = _grid(layout, model, table, trained_at), _own_grid(layout, model)
    prefix = _prefix(layout, model)
    return state if grid == own else {**state, name: _resampled(table, prefix, grid, own)}


def _prefix(layout: Layout, model: Any) -> int:
    """Positions of prefix tokens. Registers have none."""
    return layout.prefix_tokens if layout.has_cls else 0


def _own_grid(layout: Layout, model: Any) -> tuple[int, int]:
    config = layout.tower_of(model).config
    (height, width), (rows, columns) = layout.own_size(config), pair(config.patch_size)
    return height // rows, width // columns


def _grid(layout: Layout, model: Any, table: Tensor, trained_at: tuple[int, int] | None) -> tuple[int, int]:
    count, patch = table.shape[-2] - _prefix(layout, model), pair(layout.tower_of(model).config.patch_size)
    own = _own_grid(layout, model)
    if trained_at is not None:
        grid = trained_at[0] // patch[0], trained_at[1] // patch[1]
        if grid[0] * grid[1] != count:
            raise CheckpointError(f"{count} positions do not belong to images of {trained_at[0]} x {trained_at[1]} px")
        return grid
    if count == own[0] * own[1]:
        return own
    root = isqrt(max(0, count))
    if root * root != count:
        raise CheckpointError(f"its {count} positions make no square grid, so how they lie is not known")
    return root, root


def _positions(tower: Any) -> tuple[str, Any]:
    parameters = dict(tower.named_parameters())
    for name in POSITIONS:
        if name in parameters:
            return name, parameters[name]
    raise UnsupportedModelError(f"the image size of this {type(tower).__name__} is fixed")


def _in_state(state: State) -> tuple[str, Tensor] | None:
    return next(((key, value) for key, value in state.items() if key.endswith(POSITIONS)), None)


@torch.no_grad()
def _resampled(table: Tensor, prefix: int, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    rows = table if table.ndim == 3 else table[None]
    patches = rows[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), size=new, mode="bicubic", antialias=True).to(table.dtype)
    out = torch.cat([rows[:, :prefix], patches.flatten(2).mT], 1)
    return (out if table.ndim == 3 else out[0]).contiguous()


def grid(layout: Layout, model: Any, size: Any) -> tuple[int, int]:
    """Rows and columns of the patches of images of (height, width)."""
    rows, columns = pair(layout.tower_of(model).config.patch_size)
    return int(size[0] // rows), int(size[1] // columns)


def check_size(layout: Layout, model: Any, images: Any, interpolates: bool) -> None:
    """Raise `VitrimError` for images of a size that the positions of this model do not fit."""
    if getattr(images, "ndim", 0) != 4:
        return
    size, own = tuple(images.shape[-2:]), layout.own_size(layout.tower_of(model).config)
    if 0 in grid(layout, model, size):
        raise VitrimError(f"images of {size[0]} x {size[1]} px are smaller than one patch of this model")
    if size != own and not interpolates and not layout.any_size:
        raise VitrimError(
            f"images of {size[0]} x {size[1]} px, but the model takes {own[0]} x {own[1]}; resize them, or pass "
            "interpolate_pos_encoding=True"
        )
