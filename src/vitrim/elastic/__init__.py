"""One super-network, every size: ordering of widths (WPAC), nested chains, training (PIAD) and extraction."""

from .chain import Chain, Entry
from .supernet import SuperNet, stratify
from .wpac import ORDERINGS, wpac

__all__ = ["ORDERINGS", "Chain", "Entry", "SuperNet", "stratify", "wpac"]
