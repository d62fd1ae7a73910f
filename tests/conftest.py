"""Shared by all tests: one thread per process, their order, and the fixtures."""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # Else it starts an interpreter for each core.

import pytest

LONG = ("test_docs", "test_curve", "test_train_resume", "test_study", "test_study_workers", "test_distill_student")
"""Files whose tests take long. They come first, so that what is left for the end can be shared among processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, but not where tests are only handed out to other processes, which would wait for it."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # Until all tests are collected: what is imported stays.
        config.pluginmanager.import_plugin("shared")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave what is imported, a million objects, out of every later search for garbage: a tenth of all the time."""
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
