"""The teacher: any network, frozen, dense and in eval mode, shown exactly the student's batch in its own format."""

import hashlib
from collections.abc import Sequence
from math import sqrt
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from ..errors import DistillError
from ..models import adapter_of, attached
from ..tokens.precision import wide
from .features import Anatomy, Wanted, look

Grid = tuple[int, int]
_HOW = {"training", "fused_attn", "grad_checkpointing"}
"""Settings of modules that decide how an output in eval mode is computed, and not which."""


class Teacher(nn.Module):
    """A frozen network that is asked about images prepared for its student.

    Images arrive as the student sees them, augmented, mixed and normalised. They are normalised anew and resized
    (bicubic) to the teacher's own input; its patch tokens are resampled (bilinear) to the student's grid. The teacher
    stays in eval mode whatever its surroundings do, and leaves no weights in checkpoints of the student.

    Args:
        model: any timm model or own network; loaded by `vitrim.models.build.build_model`, for example. Headless and
            with registers or distillation token as it may be. A network without `forward_intermediates` (CNN) gives
            logits alone.
        input_size: (height, width) it expects; by default the model's own.
        mean, std: per channel, what its images are normalised with; by default the model's own.
        images_mean, images_std: what arriving images have been normalised with; by default the teacher's.

    Raises:
        DistillError: tokens are reduced in the model.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        input_size: Grid | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        images_mean: Sequence[float] | None = None,
        images_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        handle = attached(model)
        if handle is not None and handle.reduction is not None:
            raise DistillError("a teacher is dense, but a reduction is attached to it; call handle.remove() first")
        self.model = model.eval().requires_grad_(False)
        self.anatomy = Anatomy.of(model)
        if input_size is None or mean is None or std is None:
            form = adapter_of(model).input_format(model)
            input_size, mean, std = input_size or form.size[1:], mean or form.mean, std or form.std
        self.input_size: Grid = input_size
        own = torch.tensor([list(mean), list(std)], dtype=torch.float64)
        given = torch.tensor([images_mean or own[0].tolist(), images_std or own[1].tolist()], dtype=torch.float64)
        self.renormalises = not torch.equal(own, given)
        self.register_buffer("scale", _channels(given[1] / own[1]), persistent=False)
        self.register_buffer("shift", _channels((given[0] - own[0]) / own[1]), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode."""
        return super().train(False)

    def shard(self) -> None:
        """Let every process keep its share of the weights alone and gather one block at a time (FSDP).

        All processes of the default group call this, and from then on ask the teacher at the same steps.
        """
        device = self.scale.device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in getattr(self.model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: a checkpoint of the student need not carry its teacher."""
        return {} if destination is None else destination

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) as the teacher expects them; grey ones get its number of channels."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if images.shape[-2:] == self.input_size:
            return images
        return F.interpolate(images, self.input_size, mode="bicubic", antialias=True, align_corners=False)

    @torch.no_grad()
    def forward(self, images: Tensor, wanted: Wanted, grid: Grid | None = None) -> dict[str, Tensor]:
        """What is wanted of the teacher about these images; patch tokens on the student's `grid` (rows, columns)."""
        ready = self.prepare(images)
        found = look(self.model, ready, wanted)
        if "tokens" in found:
            own = grid_of(found["tokens"].shape[1], ready.shape[-2:])
            found["tokens"] = resample_tokens(found["tokens"], own, grid or own)
        return found

    def fingerprint(self) -> str:
        """SHA-256 of weights, settings of all modules and input format: equal fingerprints give equal outputs.

        Device, mode, hooks, compilation and what else changes no output do not count.
        """
        code = hashlib.sha256(repr((self.anatomy, self.input_size, _settings(self.model))).encode())
        constants = {**dict(self.model.named_buffers()), "scale": self.scale, "shift": self.shift}
        tensors = {**self.model.state_dict(), **constants}
        for name, tensor in tensors.items():
            flat = tensor.detach().cpu().contiguous().flatten()
            code.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            code.update(flat.view(torch.uint8).numpy())
        return code.hexdigest()


def grid_of(num_tokens: int, image_size: Sequence[int]) -> Grid:
    """Rows and columns of square patches that give so many tokens of an image (height, width)."""
    height, width = image_size
    rows, columns = round(sqrt(num_tokens * height / width)), round(sqrt(num_tokens * width / height))
    if rows * columns != num_tokens:
        raise DistillError(f"{num_tokens} patch tokens of an image of {height} x {width} pixels form no grid")
    return rows, columns


def resample_tokens(tokens_BNC: Tensor, old: Grid, new: Grid) -> Tensor:
    """Tokens of one grid at the places of another, (B, N', C): bilinear, and averaging where the new one is coarser."""
    if old == new:
        return tokens_BNC
    image = tokens_BNC.transpose(1, 2).unflatten(2, old)
    image = F.interpolate(wide(image), new, mode="bilinear", antialias=True, align_corners=False)
    return image.flatten(2).transpose(1, 2)


def _settings(model: nn.Module) -> list[tuple[object, ...]]:
    """What of a model's function is in none of its tensors: kinds of its modules, and their public plain values."""
    return [
        (
            name,
            type(module).__name__,
            *sorted((key, repr(value)) for key, value in vars(module).items() if _counts(key, value)),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _counts(name: str, value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_counts(name, entry) for entry in cast("tuple[object, ...]", value))
    return not name.startswith("_") and name not in _HOW and isinstance(value, bool | int | float | str | None)


def _channels(values: Tensor) -> Tensor:
    return values.float().view(1, -1, 1, 1)
