"""Exporting models of Hugging Face transformers without the attention mask that only an export gets.

Where no image is padded there is nothing to mask, and transformers passes no mask on. While `torch.export` runs, it
makes one of ones all the same: it could not look at the values of a mask that was given. Such a mask costs time in
every block, and none can be combined with token reduction.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_DECIDES = "_ignore_bidirectional_mask_sdpa"
_lock = threading.RLock()
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def without_idle_masks() -> Iterator[None]:
    """Within this context, models of transformers make no mask where no mask was given.

    Outside of an export they make none anyway, so that other threads compute what they always do.
    """
    from transformers import masking_utils

    with _lock:
        usual = getattr(masking_utils, _DECIDES, None)
        if usual is None:  # Of another version of transformers.
            yield
            return

        def decides(padding_mask: Any, kv_length: int, local_attention_size: Any = None) -> bool:
            if padding_mask is None and local_attention_size is None:
                return True
            return usual(padding_mask, kv_length, local_attention_size)

        setattr(masking_utils, _DECIDES, decides)
        try:
            yield
        finally:
            setattr(masking_utils, _DECIDES, usual)


def unmasked_in_export(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A method that runs as `without_idle_masks` in `torch.export`; `torch.compile` sees the method alone."""

    @wraps(method)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_exporting():
            with without_idle_masks():
                return method(*args, **kwargs)
        return method(*args, **kwargs)

    return run
