"""What a sweep tries settings on: a network as it is, or a recipe that is trained."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..measure.cost import cost
from ..measure.speed import bench
from ..models.evaluating import evaluating
from .compare import Row
from .hopeless import Watch

ROUNDS = 7
"""Interleaved rounds in which the time of a setting is measured."""


class Subject(Protocol):
    """A network, or a recipe, whose settings are tried."""

    name: str

    def identity(self) -> Mapping[str, Any]:
        """Everything about it that decides the result of a trial, as plain data."""
        ...

    def reference(self) -> Row:
        """The figures of the network without a reduction; empty where there are none."""
        ...

    def cost(self, setting: Mapping[str, Any]) -> Row:
        """What the network at this setting costs, before its accuracy is known."""
        ...

    def accuracy(self, setting: Mapping[str, Any], watch: Watch) -> Row:
        """How good the network at this setting is.

        Raises:
            Hopeless: by `watch`, which sees the figures as they come.
            DivergedError: it cannot be trained at this setting.
        """
        ...


def cost_row(dense: nn.Module, model: nn.Module, batch_size: int, device: torch.device) -> Row:
    """MACs of a network, counted, and its time next to the dense one, measured in turns."""
    with evaluating(model):
        spent = cost(model)
        whole = spent.macs if model is dense else cost(dense).macs
    entries = {"dense": dense} if model is dense else {"dense": dense, "setting": model}
    table = bench(entries, batch_sizes=(batch_size,), rounds=ROUNDS, warmup=1, device=device)
    row = table.row("dense" if model is dense else "setting", batch_size)
    return {
        "speed": row.speedup.median, "images_per_second": row.images_per_second, "gmacs": spent.macs / 1e9,
        "gmacs_linear_only": spent.macs_linear_only / 1e9, "macs_ratio": whole / spent.macs, "params": spent.params,
        "tokens": list(spent.token_counts),
    }  # fmt: skip
