"""Clocks that stand still unless a test moves them, so that no result depends on how busy the machine is."""

from types import ModuleType, SimpleNamespace

import pytest


class Clock:
    """Seconds since the start, moved by `sleep`; each reading takes a nanosecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """The time, as `time.monotonic` and `time.perf_counter` give it."""
        self.now += 1e-9
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        assert seconds >= 0
        self.now += seconds

    def replace_time_in(self, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
        """Make a module that imports `time` read this clock."""
        patch.setattr(module, "time", SimpleNamespace(monotonic=self.read, perf_counter=self.read, sleep=self.sleep))
