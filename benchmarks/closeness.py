"""How close networks stay to the full one on the same test images, and super-networks to compare."""

from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim import SuperNet
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.data.streams import shuffled_batches
from vitrim.elastic.chain import start_chain
from vitrim.elastic.growth import grow_evenly


def batches(model: nn.Module, spec: DataSpec, number: int, seed: int, train: bool) -> list[tuple[Tensor, Tensor]]:
    """The first `number` images of the training or test split in an order drawn by the seed, with their classes."""
    stream, device = plain_stream(model, spec, train=train), next(model.parameters()).device
    found = islice(shuffled_batches(stream, spec.workers, seed), -(-number // 64))
    return [(images.to(device), classes.to(device)) for images, classes in found]


@torch.no_grad()
def outputs(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of all images."""
    return torch.cat([model(images) for images, _ in data])


class TestImages:
    """Test images with what the full network says of them.

    accuracy: of the full network.

    Args:
        network: the full one.
        spec: its images.
        number: of them, at least.
    """

    def __init__(self, network: nn.Module, spec: DataSpec, number: int) -> None:
        self.data = batches(network, spec, number, 0, train=False)
        self.classes = torch.cat([each for _, each in self.data])
        self.full = outputs(network, self.data)
        self.accuracy = self._right(self.full)

    def __len__(self) -> int:
        return len(self.classes)

    def closeness(self, network: nn.Module) -> dict[str, float]:
        """Divergence of another network from the full one (KL, mean over images), and its accuracy."""
        logits = outputs(network, self.data)
        log_full = self.full.log_softmax(1)
        divergence = F.kl_div(logits.log_softmax(1), log_full, reduction="batchmean", log_target=True).item()
        return {"divergence": divergence, "accuracy": self._right(logits)}

    def _right(self, logits: Tensor) -> float:
        return (logits.argmax(1) == self.classes).double().mean().item()


def even_and_measured(net: SuperNet) -> dict[str, SuperNet]:
    """Chains of even and of measured widths in the same ordered weights, with the same compensations."""
    even = replace(grow_evenly(start_chain(net.model), 0.875), weights=net.chain.weights)
    return {"even": SuperNet(net.model, even, net.compensations), "measured": net}
