"""What transformers prints while a model is made or opened, and what nobody needs who works with images."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of transformers, such as "Loading weights", and its remarks on the tokens of text towers.

    The hub's own bars of a download stay, and so do warnings about weights.
    """
    from transformers.utils.logging import set_tqdm_hook

    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    before = set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        set_tqdm_hook(before)
