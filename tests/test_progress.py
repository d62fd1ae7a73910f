"""What the bar of a run says while it goes on."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from vitrim.show import progress
from vitrim.train.state import Report


def test_the_time_left_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch):
    clock, bars = [0.0], []

    class Seen(progress.Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options, get_time=lambda: clock[0])
            bars.append(self)

    def go_on(report: Report, epoch: int, epochs: int, steps: range) -> float | None:
        """One second for every step of 4; the seconds left that are shown then."""
        for step in steps:
            clock[0] += 1
            figures = {"loss": 1.0, "accuracy": None, "terms": {}, "images_per_second": 9.0, "tokens": None}
            report("step", {"epoch": epoch, "epochs": epochs, "step": step, "steps": 4, **figures})
        return bars[0].tasks[0].time_remaining

    monkeypatch.setattr(progress, "Progress", Seen)
    with progress.live(Console(file=StringIO())) as report:
        assert go_on(report, 0, 10, range(1, 5)) == 36
        clock[0] += 4  # The evaluation after an epoch takes part of the time that is left.
        assert go_on(report, 1, 10, range(1, 5)) in range(40, 65)
        report("done", {})
        report("run", {"name": "b-s0"})
        clock[0] += 99
        assert go_on(report, 3, 6, range(2, 5)) == 8  # An interrupted run that goes on where it was.
