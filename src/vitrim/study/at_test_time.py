"""Settings of a reduction that are tried on a network as it is, on test images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..data.seeding import permutation
from ..data.specs import DataSpec
from ..data.splits import plain_stream
from ..elastic.chain import hash_of
from ..measure.accelerator import make_accelerator
from ..measure.accuracy import evaluate_all
from ..models import DENSE, variant
from .compare import Row
from .hopeless import Watch
from .subject import cost_row
from .template import fill_template


class AtTestTime:
    """A network, and a method with names in braces. See `Subject`.

    Args:
        name: what rows call it.
        model: the network.
        data: the test images. They are read in an order of their own, so that the first ones are like the others.
        method: the reduction.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, name: str, model: nn.Module, data: DataSpec, method: str, batch_size: int, device: str) -> None:
        self.name, self._data, self._method, self._batch_size, self._device = name, data, method, batch_size, device
        self._model = model
        self._dense = variant(model, DENSE)
        self._accelerator = make_accelerator(cpu=device == "cpu")
        self._stream = plain_stream(model, data)
        self._stream.indices = permutation(len(self._stream), "sweep", 0)

    def identity(self) -> Mapping[str, Any]:
        """See `Subject`."""
        data = self._data
        folder = data.root and str(Path(data.root).resolve())
        return {
            "method": self._method, "batch size": self._batch_size, "device": self._device,
            "model": hash_of(self._model),
            "data": [data.name, folder, data.test_split, data.image_size, data.crop_pct, data.on_corrupt],
        }  # fmt: skip

    def reference(self) -> Row:
        """See `Subject`."""
        return {"method": DENSE, **self._cost(self._dense), **self._evaluated(self._dense, None)}

    def cost(self, setting: Mapping[str, Any]) -> Row:
        """See `Subject`."""
        method = fill_template(self._method, setting)
        return {"method": method, **self._cost(variant(self._model, method))}

    def accuracy(self, setting: Mapping[str, Any], watch: Watch) -> Row:
        """See `Subject`."""
        return self._evaluated(variant(self._model, fill_template(self._method, setting)), watch)

    def _cost(self, model: nn.Module) -> Row:
        return cost_row(self._dense, model, min(self._batch_size, len(self._stream)), self._accelerator.device)

    def _evaluated(self, model: nn.Module, watch: Watch | None) -> Row:
        found = evaluate_all(
            {self.name: model}, self._stream, batch_size=self._batch_size, workers=self._data.workers,
            accelerator=self._accelerator,
            watch=None if watch is None else lambda name, hits, seen: watch.check(hits, seen, len(self._stream)),
        )[self.name].checked(self.name)  # fmt: skip
        return {
            "accuracy": found.accuracy, "loss": found.loss, "entropy": found.entropy, "num_images": found.num_images,
            "unreadable": list(found.unreadable),
        }  # fmt: skip
