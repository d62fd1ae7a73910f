"""Libraries that talk beside what vitrim says."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep back what a library prints and what it warns of, where vitrim tells in words of its own what matters."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)
