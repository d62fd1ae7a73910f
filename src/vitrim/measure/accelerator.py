"""Where work runs: accelerate's view of devices and processes."""

import atexit
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from ..errors import VitrimError


def make_accelerator(*, cpu: bool = False, **options: Any) -> Accelerator:
    """An accelerator with exactly these options: accelerate would keep those of the first one in a process for good.

    Args:
        cpu: do not use the GPU.
        options: see `accelerate.Accelerator`.

    Raises:
        VitrimError: the launcher splits the weights of the network that is trained over processes.
    """
    if PartialState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
        GradientState._reset_state()
    atexit.unregister(end_processes)  # So that it is registered once.
    atexit.register(end_processes)
    # On a machine without a GPU, processes started by torchrun find each other only if `cpu` is set.
    accelerator = Accelerator(cpu=cpu or not torch.accelerator.is_available(), **options)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise VitrimError(
            f"{accelerator.distributed_type.value} splits the network in training over processes, which vitrim does "
            "not support; launch without it and, for a teacher that fills the device, set shard_teacher"
        )
    return accelerator


def fast_precision() -> Literal["bf16", "no"]:
    """The faster precision of training that needs no loss scaling: bf16 on a GPU that has it, else float32 ("no")."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def end_processes() -> None:
    """Leave the group of processes that were launched together; threads of it must not outlive the interpreter."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
