"""Weights of timm's ViTs in a model of another input size: how their positions lie, and resampling them.

Weights hold a row of positions for every patch, but not how many rows and columns of patches an image had: 144 may be
12 x 12 or 8 x 18. A wrong guess scrambles the positions without any error, so only a square grid is assumed, and only
where nothing speaks for another one.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from ....errors import CheckpointError
from ....text import reason_of
from ...adapter import State

Grid = tuple[int, int]
_POSITIONS = (
    "pos_embed", "visual.positional_embedding", "module.visual.positional_embedding", "visual.trunk.pos_embed",
    "module.visual.trunk.pos_embed", "vision_encoder.pos_embed", "positional_embedding", "visual.pos_embed",
)  # fmt: skip
"""In timm's names, and in those that timm converts."""
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
_PATCHES = (
    "patch_embed.proj.weight", "visual.conv1.weight", "conv1.weight", "visual.trunk.patch_embed.proj.weight",
)  # fmt: skip
ADVICE = (
    "say the size of the images that they were trained on: NAME@FILE@HEIGHTxWIDTH in a command, model.checkpoint_size "
    "in a recipe, checkpoint_size=(HEIGHT, WIDTH) for vitrim.build_model"
)


def trained_size(model: Any, state: State, trained_at: Grid | None) -> Grid | None:
    """See `Adapter.trained_size`."""
    grid, own = _trained_grid(model, state, trained_at), model.patch_embed.grid_size
    if grid is None or grid == own:
        return None
    height, width = model.patch_embed.img_size
    return trained_at or (grid[0] * (height // own[0]), grid[1] * (width // own[1]))


def fit_weights(
    model: Any, state: State, trained_at: Grid | None, resample_patches: bool, convert: Callable[[State, Any], State]
) -> State:
    """See `Adapter.fit_weights`; `convert` is timm's own filter of foreign weights."""
    _check_stem(model, state, resample_patches)
    grid, own = _trained_grid(model, state, trained_at, resample_patches), model.patch_embed.grid_size
    state = dict(state)
    if grid is not None and grid != own and (found := _positions(model, state)) is not None:
        name, positions, prefix = found
        rows = positions if positions.ndim == 3 else positions[None]
        rows = resample_abs_pos_embed(rows, list(own), list(grid), prefix)
        state[name] = rows if positions.ndim == 3 else rows[0]
    # timm takes the grid of the weights from here; the positions have the model's own by now.
    before = getattr(model, "pretrained_model_args", {})
    model.pretrained_model_args = {**before, "img_size": model.patch_embed.img_size}
    try:
        return converted(state, model, convert)
    finally:
        model.pretrained_model_args = before


def converted(state: State, model: Any, convert: Callable[[State, Any], State]) -> State:
    """Weights after timm's own filter of foreign weights.

    Raises:
        CheckpointError: the filter fails, which it does in many ways on weights that do not fit.
    """
    try:
        return convert(state, model)
    except Exception as error:
        raise CheckpointError(f"the weights do not fit {type(model).__name__}: {reason_of(error)}") from error


def _trained_grid(model: Any, state: State, trained_at: Grid | None, resample_patches: bool = False) -> Grid | None:
    """Rows and columns of the patches that the positions in these weights belong to; None where there are none."""
    _check_registers(model, state)
    found, own = _positions(model, state), model.patch_embed.grid_size
    if found is None or getattr(model, "pos_embed", None) is None or own is None:
        return None
    _, positions, prefix = found
    if positions.ndim not in (2, 3) or (positions.ndim == 3 and positions.shape[0] != 1):
        raise CheckpointError(f"positions of shape {tuple(positions.shape)} are those of no ViT")
    count = positions.shape[-2] - prefix
    if trained_at is None:
        return _grid_of(count, own)
    patch = (model.patch_embed.img_size[0] // own[0], model.patch_embed.img_size[1] // own[1])
    if resample_patches and (kernel := _stem(state)) is not None:
        patch = tuple(kernel.shape[-2:])
    grid = trained_at[0] // patch[0], trained_at[1] // patch[1]
    if grid[0] * grid[1] != count:
        raise CheckpointError(f"{count} positions do not belong to images of {trained_at[0]} x {trained_at[1]} px")
    return grid


def _grid_of(count: int, own: Grid) -> Grid:
    """The grid of so many patches, for a model of the grid `own`, if there is no doubt about it."""
    root = isqrt(max(0, count))
    square = root > 0 and root * root == count
    if own[0] == own[1] and square:
        return root, root
    # Images of the model's own proportions.
    factor = isqrt(max(0, count * own[0] // own[1])) / own[0]
    rows, columns = round(own[0] * factor), round(own[1] * factor)
    similar = rows > 0 and rows * columns == count and rows * own[1] == columns * own[0]
    if square and similar:
        raise CheckpointError(
            f"its {count} positions may be a grid of {root} x {root} or {rows} x {columns} patches; {ADVICE}"
        )
    if count == own[0] * own[1]:
        return own
    if square:
        return root, root
    raise CheckpointError(f"its {count} positions make no square grid, so how they lie is not known; {ADVICE}")


def _positions(model: Any, state: State) -> tuple[str, Tensor, int] | None:
    """Name and value of the positions, and how many of them belong to prefix tokens."""
    name = next((name for name in _POSITIONS if name in state), None)
    if name is None:
        return None
    # The official files of DINOv2 with registers hold one more than timm, for CLS.
    official = "register_tokens" in state
    prefix = 1 if official else 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    return name, state[name], prefix


def _stem(state: State) -> Tensor | None:
    return next((state[name] for name in _PATCHES if name in state and state[name].ndim == 4), None)


def _check_registers(model: Any, state: State) -> None:
    registers = next((state[name] for name in _REGISTERS if name in state), None)
    there = 0 if registers is None or registers.ndim != 3 else registers.shape[1]
    own = 0 if getattr(model, "reg_token", None) is None else model.reg_token.shape[1]
    if there != own and ("cls_token" in state or there):
        name = "reg_tokens" if hasattr(model, "num_reg_tokens") else "num_reg_tokens"
        raise CheckpointError(f"the weights have {there} register tokens, the model {own}; ask for {name}={there}")


def _check_stem(model: Any, state: State, resample_patches: bool) -> None:
    """Raise `CheckpointError` for patches that timm would adapt without a word, or with one that nobody understands."""
    theirs, ours = _stem(state), getattr(model.patch_embed.proj, "weight", None)
    if theirs is None or ours is None or ours.ndim != 4:
        return
    if theirs.shape[1] != ours.shape[1]:
        raise CheckpointError(
            f"the weights take images of {theirs.shape[1]} channels, the model of {ours.shape[1]}; ask for "
            f"in_chans={theirs.shape[1]}"
        )
    if theirs.shape[2:] != ours.shape[2:] and not resample_patches:
        size, own = theirs.shape[-1], ours.shape[-1]
        raise CheckpointError(
            f"the weights have patches of {size} px, the model of {own} px; ask for patch_size={size}, or for "
            f"patch_size={own} to resample them"
        )
