"""Random numbers: no two purposes share a seed, and whoever calls vitrim keeps his own random state."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitrim.data.data_sets import open_both
from vitrim.data.seeding import Purpose, mix, permutation, restored_generators, seed_everything, seeded
from vitrim.data.specs import AugmentSpec, DataSpec
from vitrim.data.splits import make_splits, plain_stream
from vitrim.data.streams import EpochSampler, Stream, make_loader
from vitrim.measure.accuracy import evaluate
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

PURPOSES = get_args(Purpose)
SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.fixture
def expected() -> Iterator[tuple[float, float, float]]:
    """What the generators give next; the test starts in the state from which they give it."""
    with restored_generators():
        seed_everything("step", 3)
        numbers = draws()
        seed_everything("step", 3)
        yield numbers


def test_all_of_a_seed_counts():
    numbers = [(), (0,), (5,), (0, 0), (5, 0), (5, 0, 0), (0, 5), (5, 1), (2**32 + 5,), (5, 2**32), (-5,), (51,)]
    seeds = {mix(purpose, *given) for purpose in PURPOSES for given in numbers}
    assert len(seeds) == len(PURPOSES) * len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix("order", np.int64(5), 1) == mix("order", 5, 1)


def test_every_purpose_draws_its_own_numbers():
    seen = []
    for purpose, given in itertools.product(PURPOSES, ((5,), (5, 0), (5, 0, 0), (5, 1))):
        with seeded(purpose, *given):
            seen.append(draws())
        with seeded(purpose, *given):
            assert draws() == seen[-1]
    for one in zip(*seen, strict=True):
        assert len(set(one)) == len(seen)
    orders = {tuple(permutation(20, purpose, 5)) for purpose in PURPOSES}
    assert len(orders) == len(PURPOSES)


def test_the_first_epoch_shares_no_seed_with_the_split_or_the_weights():
    spec = DataSpec(name="digits", holdout=0.5, limit=200)
    model = timm.create_model("vitrim_digits_vit", **SIZES)
    images, tested = open_both(spec)
    splits = make_splits(images, tested, model, spec, AugmentSpec(), seed=1)
    chosen = permutation(len(images), "subset", 1)[:200]
    assert splits.select is not None
    assert sorted(chosen[:100]) == splits.select.indices
    assert sorted(chosen[100:]) == splits.train.indices
    for epoch in range(3):
        sampler = EpochSampler(len(images), 1, shuffle=True)
        sampler.epoch = epoch
        order = [key - len(images) * epoch for key in sampler]
        assert sorted(order) == list(range(len(images)))
        assert order[:200] != chosen


def test_evaluation_leaves_the_generators_as_they_were(expected: tuple[float, float, float]):
    model = timm.create_model("vitrim_digits_vit", **SIZES)
    seed_everything("step", 3)
    for workers in (0, 1):
        evaluate(model, plain_stream(model, DataSpec(name="digits")), workers=workers)
    assert draws() == expected


def test_a_pass_through_a_loader_leaves_the_generators_as_they_were(expected: tuple[float, float, float]):
    def noisy(image: Image.Image) -> torch.Tensor:
        return torch.rand(3) + random.random() + float(np.random.rand())

    stream = Stream([(Image.new("RGB", (4, 4)), 0)] * 6, noisy)
    loader, _ = make_loader(stream, 2, 0, shuffle=True)
    assert len({float(image.sum()) for batch in loader for image in batch[0]}) == 6
    assert draws() == expected


def test_a_run_leaves_the_generators_as_they_were(expected: tuple[float, float, float], tmp_path: Path):
    given = {"model": {"name": "vitrim_digits_vit", "args": SIZES}, "data": {"limit": 40, "workers": 0}, "epochs": 1}
    train(Recipe.from_dict(given), tmp_path / "run")
    assert draws() == expected


def test_generators_are_restored_after_an_exception(expected: tuple[float, float, float]):
    def fail() -> None:
        with seeded("augment", 1):
            draws()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draws() == expected
