"""Fixtures of all tests: one seed before each test, nothing of torch that takes long, and what many files share."""

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import timm
import torch

import processes  # noqa: F401  (says what the processes of tests have imported)
from vitrim import save
from vitrim.data import digits
from vitrim.distill.losses import LOSSES
from vitrim.distill.objective import TERMS, WEIGHTS
from vitrim.models import ADAPTERS
from vitrim.models.widths.sublayers import ELASTIC
from vitrim.study import subject
from vitrim.tokens import CURRICULA, REDUCERS, SCHEDULES, SCORES

for _name, _logger in logging.root.manager.loggerDict.items():
    # pytest puts its handlers on the root, and three times in each test on all loggers that would not pass records on.
    if isinstance(_logger, logging.Logger) and _name.partition(".")[0] == "torch":
        _logger.propagate = True


@pytest.fixture(autouse=True)
def _compiled_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate compiled code, but do not turn it into C++, which takes most of the time and tests torch.

    A test that names a backend gets it.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the settings of a sweep in one round, since no test depends on how long anything takes."""
    monkeypatch.setattr(subject, "ROUNDS", 1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # `torch.manual_seed` also notes a traceback for each kind of device not in use yet, a millisecond in all.
    seed = torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed
    seed(0)


@pytest.fixture
def entries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test enters into the tables of methods."""
    for table in (SCORES, REDUCERS, SCHEDULES, CURRICULA, TERMS, WEIGHTS, LOSSES, ADAPTERS, ELASTIC):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
        monkeypatch.setattr(table, "_homes", dict(table._homes))


@pytest.fixture(scope="module")
def few_test_digits() -> Iterator[None]:
    """Test on 120 digits and not on 364, which takes longer than to train on as many."""

    class Few(digits.Digits):
        def __init__(self, train: bool) -> None:
            super().__init__(train)
            if not train:
                self.pixels, self.targets = self.pixels[:120], self.targets[:120]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(digits.BUILT_IN, "digits", Few)
        yield


@pytest.fixture
def two_forms() -> Iterator[None]:
    """Let torch compile the same code in two forms, not in eight, before it goes back to eager execution."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved digits ViT, wider than students are; its head is grown large enough for its opinions to matter."""
    torch.manual_seed(5)
    model = timm.create_model("vitrim_digits_vit", depth=3, embed_dim=36, num_heads=3)
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return str(save(model, tmp_path_factory.mktemp("teacher") / "model"))
