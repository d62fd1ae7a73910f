"""Figures of the steps of an epoch: added up where they arise, so that nothing waits for an accelerator."""

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..distill import Distilled

COUNTS = ("images", "seconds")


class Meter:
    """Sums over the images of an epoch so far, and the images that could not be read in the whole run.

    sums: of this process: "images", "seconds", and every other figure times its number of images.
    unreadable: names of images.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, Tensor | float] = {}
        self.unreadable: set[str] = set()
        self._indices: list[Tensor] = []

    def add(self, learnt: Distilled, labels: Tensor) -> None:
        """Add one loss of a step, its terms, and how many of its classes agree with the labels (B,)."""
        means = {"loss": learnt.loss.detach(), **learnt.terms}
        if learnt.logits is not None:
            means["accuracy"] = (learnt.logits.argmax(1) == labels).float().mean()
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.float() * len(labels)

    def close_step(self, index: Tensor, seconds: float) -> None:
        """Add the indices (B,) of the images of a step and the time that it took."""
        self.sums["images"] = self.sums.get("images", 0) + len(index)
        self.spend(seconds)
        self._indices.append(index)

    def spend(self, seconds: float) -> None:
        """Count time that belongs to the steps so far."""
        self.sums["seconds"] = self.sums.get("seconds", 0.0) + seconds

    def means(self) -> dict[str, float]:
        """The figures so far of this process. Waits for the device."""
        images = float(self.sums["images"])
        return {name: float(value) / images for name, value in self.sums.items() if name not in COUNTS}

    def epoch(self) -> dict[str, float]:
        """The means over the epoch that has just ended, as `train_NAME`, the time it took and its speed."""
        total = self.totals()
        means = {f"train_{name}": total[name] / total["images"] for name in total if name not in COUNTS}
        seconds = total["seconds"] / self.accelerator.num_processes
        return means | {"seconds": seconds, "images_per_second": total["images"] / seconds}

    @property
    def images_per_second(self) -> float:
        """Of all processes together, as if all were as fast as this one."""
        return float(self.sums["images"] * self.accelerator.num_processes / self.sums["seconds"])

    def note(self, names: Iterable[str]) -> None:
        """Remember images that could not be read."""
        self.unreadable |= set(names)

    def take_indices(self) -> list[int]:
        """Indices of the images since the last call; negative where one could not be read."""
        taken = torch.cat(self._indices).tolist() if self._indices else []
        self._indices = []
        return taken

    def totals(self) -> dict[str, float]:
        """Sums over the epoch so far and over all processes."""
        values = torch.tensor([float(value) for value in self.sums.values()], device=self.accelerator.device)
        return dict(zip(self.sums, self.accelerator.reduce(values).tolist(), strict=True))

    def all_unreadable(self) -> list[str]:
        """Names of the images that any process could not read."""
        return sorted(set(gather_object(sorted(self.unreadable))))

    def clear(self) -> None:
        """Begin an epoch."""
        self.sums = {}

    def restore(self, totals: Mapping[str, float], unreadable: Iterable[str]) -> None:
        """Continue from the sums of all processes; the main process keeps them."""
        self.sums = {name: value if self.accelerator.is_main_process else 0.0 for name, value in totals.items()}
        self.unreadable = set(unreadable)
