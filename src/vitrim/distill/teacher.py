"""The teacher: any network, frozen, dense and in eval mode, given the student's batch in its own input format."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from ..errors import DistillError
from ..models import adapter_of, attached
from ..models.outputs import Wanted
from ..tokens.precision import wide

Grid = tuple[int, int]


class Teacher(nn.Module):
    """A frozen network that runs on images prepared for its student.

    Images arrive as the student gets them, augmented, mixed and normalised. They are normalised again for the teacher
    and resized (bicubic) to its own input; its patch tokens are resampled (bilinear) to the student's grid. The teacher
    stays in eval mode when modules around it are put into training mode, and adds no weights to checkpoints of the
    student.

    Args:
        model: any network, for example from `vitrim.build_model`, with or without classifier, registers or
            distillation token. A network that is not made of tokens (a CNN) gives logits only.
        input_size: (height, width) it expects; by default the model's own.
        mean, std: per channel, what its images are normalised with; by default the model's own.
        images_mean, images_std: what arriving images have been normalised with; by default the teacher's.

    Raises:
        DistillError: tokens are reduced in the model.
        UnsupportedModelError: its input format is not known, and not given.
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
        self.adapter = adapter_of(model)
        self.info = self.adapter.info(model)
        if input_size is None or mean is None or std is None:
            form = self.adapter.input_format(model)
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
        """Keep only a share of the weights in every process and gather one block at a time (FSDP).

        All processes of the default group call this, and from then on run the teacher at the same steps.
        """
        device = self.scale.device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in self.adapter.blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: checkpoints of a student do not hold its teacher."""
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
        """The teacher's outputs for these images; those by patch are resampled to the student's `grid`."""
        ready = self.prepare(images)
        found = self.adapter.outputs(self.model, ready, wanted)
        for output in wanted.outputs:
            if output.per_patch:
                own = self.adapter.grid(self.model, ready.shape[-2:])
                found[output.key] = resample_tokens(found[output.key], own, grid or own)
        return found

    def fingerprint(self) -> str:
        """SHA-256 of weights, settings of all modules and input format: equal fingerprints give equal outputs.

        Device, mode, hooks, compilation and whatever else changes no output are left out.
        """
        settings = _settings(self.model, self.adapter.speed_settings)
        code = hashlib.sha256(repr((self.info, self.input_size, settings)).encode())
        constants = {**dict(self.model.named_buffers()), "scale": self.scale, "shift": self.shift}
        tensors = {**self.model.state_dict(), **constants}
        for name, tensor in tensors.items():
            flat = tensor.detach().cpu().contiguous().flatten()
            code.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            code.update(flat.view(torch.uint8).numpy())
        return code.hexdigest()


def resample_tokens(tokens_BNC: Tensor, old: Grid, new: Grid) -> Tensor:
    """Tokens of one grid at the places of another, (B, N', C): bilinear, and averaging where the new one is coarser."""
    if tokens_BNC.shape[1] != old[0] * old[1]:
        raise DistillError(f"{tokens_BNC.shape[1]} patch tokens of a teacher do not fill its grid {old}")
    if old == new:
        return tokens_BNC
    image = tokens_BNC.transpose(1, 2).unflatten(2, old)
    image = F.interpolate(wide(image), new, mode="bilinear", antialias=True, align_corners=False)
    return image.flatten(2).transpose(1, 2)


def _settings(model: nn.Module, left_out: Collection[str]) -> list[tuple[object, ...]]:
    """What decides a model's outputs but is in none of its tensors: kinds of its modules, their public plain values."""
    return [
        (
            name,
            type(module).__name__,
            *sorted(
                (key, repr(value)) for key, value in vars(module).items() if key not in left_out and _plain(key, value)
            ),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _plain(name: str, value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(name, entry) for entry in cast("tuple[object, ...]", value))
    return not name.startswith("_") and isinstance(value, bool | int | float | str | None)


def _channels(values: Tensor) -> Tensor:
    return values.float().view(1, -1, 1, 1)
