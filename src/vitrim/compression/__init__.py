"""One budget in, a cheaper model and a certificate out: tokens and width together."""

from .certificate import Certificate, Line
from .compressed import Compressed
from .findings import Verified
from .run import compress
from .verification import verify

__all__ = ["Certificate", "Compressed", "Line", "Verified", "compress", "verify"]
