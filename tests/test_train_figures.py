"""Figures that a curriculum reads are there from the first epoch, or the run is refused before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from vitrim import build_model
from vitrim.errors import RecipeError, ScoreError
from vitrim.models import narrow
from vitrim.tokens import CURRICULA, Curriculum, Figure
from vitrim.train.figures import check_figures, measure_figures
from vitrim.train.learner import prepare_student, reduction_of
from vitrim.train.optimizer import make_scheduler
from vitrim.train.recipe import Recipe
from vitrim.train.specs import OptimSpec

ENTROPY = CURRICULA["Adaptive"]("entropy").reads
CLASSES = [str(digit) for digit in range(10)]


def recipe(reduction: str, **options: object) -> Recipe:
    return Recipe.from_dict({"reduction": reduction, "epochs": 4, **options})


def test_attention_entropy_without_attention_is_refused_at_the_start() -> None:
    model = build_model("vitrim_digits_vit")
    check_figures(model, ENTROPY)
    middle = len(model.blocks) // 2
    narrow(model, {f"blocks.{middle}.attn": 0})
    with pytest.raises(ScoreError, match=f"attention of block {middle} was removed"):
        check_figures(model, ENTROPY)


def test_attention_entropy_without_cls_is_refused_before_training() -> None:
    args = {"class_token": False, "global_pool": "avg"}
    plain = {"name": "vitrim_digits_vit", "args": args}
    with pytest.raises(ScoreError, match="no CLS token, which attention_entropy of Adaptive"):
        prepare_student(recipe("ToMe() @ KeepRate(0.5) @ Adaptive(entropy)", model=plain), CLASSES)
    prepare_student(recipe("ToMe() @ KeepRate(0.5) @ Adaptive(slope)", model=plain), CLASSES)


@pytest.mark.parametrize("phase", ["both", "train"])
def test_full_strength_is_checked_before_training(phase: str) -> None:
    with pytest.raises(ValueError, match="use r of at most"):
        prepare_student(recipe("TopK() @ ConstantR(60) @ Delayed(1)", phase=phase), CLASSES)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Curriculum]]:
    monkeypatch.setattr(CURRICULA, "_entries", dict(CURRICULA))
    monkeypatch.setattr(CURRICULA, "_homes", dict(CURRICULA._homes))

    @dataclass(frozen=True)
    class Follow(Curriculum):
        """Follow one figure."""

        figure: str = "val_accuracy"

        @property
        def reads(self) -> tuple[Figure, ...]:
            return (Figure(self.figure, best=(1.0, 1.0)),)

        def strength(self, epoch: float, history: object = ()) -> float:
            return min(1.0, max((figures[self.figure] for figures in history), default=0.0))

    return Follow


def test_a_curriculum_needs_what_it_reads(own: type[Curriculum]) -> None:
    assert reduction_of(recipe("TopK() @ KeepRate(0.5) @ Follow()")) is not None
    with pytest.raises(RecipeError, match=r"Follow\(\) follows figures on held-out images, but data.holdout is 0"):
        reduction_of(recipe("TopK() @ KeepRate(0.5) @ Follow()", data={"holdout": 0.0}))
    with pytest.raises(RecipeError, match=r"Follow\(\) never acts within 1 epochs"):
        reduction_of(recipe("TopK() @ KeepRate(0.5) @ Follow()", epochs=1))
    with pytest.raises(RecipeError, match="nothing measures the figure 'luck'; give it `measure`, or read one of val_"):
        prepare_student(recipe("TopK() @ KeepRate(0.5) @ Follow(luck)"), CLASSES)


def test_a_figure_may_bring_its_own_measure() -> None:
    figure = Figure("largest", measure=lambda model, images: float(images.max()))
    assert measure_figures(nn.Identity(), [figure, Figure("val_loss")], torch.ones(2, 1, 4, 4)) == {"largest": 1.0}


def test_the_rate_does_not_fall_where_the_warm_up_ends() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(
        optimizer, OptimSpec(lr=1.0, warmup_epochs=5, min_lr=0.0), epochs=10, updates_per_epoch=50
    )
    rates = []
    for update in range(501):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[249] == pytest.approx(1.0, abs=0.01)
    assert rates[250] == 1.0
    assert rates[251] == pytest.approx(1.0, abs=0.001)
    assert rates[375] == pytest.approx(0.5)
    assert rates[500] == 0.0
    assert max(abs(b - a) for a, b in pairwise(rates)) < 0.01


@pytest.mark.parametrize("warmup", [0.0, 0.5, 2.0])
def test_a_warm_up_may_take_all_of_a_run(warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, OptimSpec(lr=1.0, warmup_epochs=warmup, min_lr=0.1), 2, 2)
    for update in range(5):
        scheduler.step_update(update)
    assert optimizer.param_groups[0]["lr"] == (1.0 if warmup == 2.0 else pytest.approx(0.1))
