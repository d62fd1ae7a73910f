"""Processes that die while they write."""

import os
from collections.abc import Callable

import pytest

from vitrim import output


def killed(action: Callable[[], object], at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run this in a child that dies without any clean-up at its renaming number `at`; whether it died there."""
    child = os.fork()
    if child == 0:
        left = [at]

        def dying(name: str) -> Callable[..., None]:
            real = getattr(os, name)

            def call(*args: object) -> None:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                real(*args)

            return call

        for name in ("replace", "rename", "rmdir"):
            monkeypatch.setattr(output.os, name, dying(name))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
