"""Parameters of a student that an objective does not train."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..models import adapter_of
from ..models.copying import copied
from ..models.outputs import Wanted


def idle_parameters(model: nn.Module, wanted: Wanted, reads: Collection[str]) -> list[str]:
    """Parameters that get no gradient from these outputs: a classifier that no term reads, blocks after the last read.

    Found on the meta device, where a copy of the model takes no memory and computes nothing.

    Args:
        model: the student.
        wanted: the outputs that are computed.
        reads: keys of those that enter the loss.
    """
    adapter = adapter_of(model)
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    empty = copied(model, memo).train()
    learnt = {name: parameter for name, parameter in empty.named_parameters() if parameter.requires_grad}
    dtype = next(model.parameters()).dtype
    with torch.enable_grad():
        images = torch.empty(2, *adapter.input_format(model).size, device="meta", dtype=dtype)
        found = adapter.outputs(empty, images, wanted)
        read = [found[name].sum() for name in reads if name in found and found[name].requires_grad]
    reached = torch.autograd.grad(read, list(learnt.values()), allow_unused=True) if read else [None] * len(learnt)
    return [name for name, gradient in zip(learnt, reached, strict=True) if gradient is None]
