"""One budget in, a cheaper model and a certificate out: tokens and width together."""

from .certificate import Certificate, Line
from .run import Compressed, compress

__all__ = ["Certificate", "Compressed", "Line", "compress"]
