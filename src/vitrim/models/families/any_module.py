"""Any PyTorch network at all: logits, and classes as far as it says how many. The last family to be tried."""

from torch import nn

from ..adapter import Adapter


class AnyModule(Adapter, cuts=False):
    """Networks of which nothing is known: your own, wrapped ones, or those of other libraries."""

    name = "any-module"
    covers = "any network that maps images to logits; as a teacher of logits, or to be measured"

    def claims(self, model: nn.Module) -> bool:
        return True
