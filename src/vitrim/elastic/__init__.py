"""One super-network, every size: ordering of widths (WPAC), nested chains, training (PIAD) and extraction."""

from .chain import Chain, Entry
from .orderings import ORDERINGS
from .supernet import SuperNet, stratify
from .wpac import wpac

__all__ = ["ORDERINGS", "Chain", "Entry", "SuperNet", "stratify", "wpac"]
