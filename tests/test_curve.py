"""Curves of a study: every figure of the table is that of the network cut and evaluated by hand."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.data.streams import make_loader
from vitrim.elastic import SuperNet, measured_chain, supernet
from vitrim.errors import CheckpointError, RecipeError, UnknownNameError, VitrimError
from vitrim.measure.cost import cost
from vitrim.models import load
from vitrim.models.files.build import build_model
from vitrim.models.widths.block_widths import widths_of
from vitrim.study import curve_points
from vitrim.study.comparisons import compare_with_trained_alone, published_budgets_note
from vitrim.study.curve import Curve
from vitrim.study.curve_points import curve_networks, measure_curve
from vitrim.study.study import Study
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("few_test_digits")
ROOT = Path(__file__).parents[1]
DATA = {"workers": 0, "limit": 200, "holdout": 0.0}
LINES = {
    "WPAC": {"row": "full", "ordering": "wpac"},
    "WPAC + compensation": {"row": "full", "ordering": "wpac", "compensate": "regression"},
    "random": {"row": "full", "ordering": "random"},
    "own": {"row": "family"},
    "alone": ["full", "small"],
}
CURVE = Curve.parse({"lines": LINES, "budgets": [1, 0.5], "images": 64, "width_multiple": 2})
Seeds = dict[int, dict[str, Path]]


def recipe(width: int, seed: int, **options: Any) -> Recipe:
    model = {"args": {"depth": 2, "embed_dim": width, "num_heads": 2}}
    optim = {"lr": 0.003, "warmup_epochs": 0}
    common = {"model": model, "data": DATA, "optim": optim, "epochs": 3, "batch_size": 16, "seed": seed}
    return Recipe.from_dict(common | options)


def ordered(model: nn.Module, ordering: str, seed: int) -> SuperNet:
    """The super-network of 64 training images, in the order of that seed."""
    loader, _ = make_loader(plain_stream(model, DataSpec(**DATA), train=True), 64, 0, seed=seed, shuffle=True)
    images = next(iter(loader))[0]
    return supernet.stratify(
        model, [images], num_images=64, ordering=ordering, width_multiple=2, rounds=1, say=lambda told: None
    )


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Chains measured in one round and compared with the even one at three sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve_points, "stratify", partial(supernet.stratify, rounds=1))
        patch.setattr(measured_chain, "BUDGETS", 3)
        yield


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    """Finished runs of two seeds: a network, a narrower one, and a super-network in the model folder of its run."""
    place, found = tmp_path_factory.mktemp("curve"), {}
    for seed in (0, 1):
        found[seed] = {name: place / f"{name}-s{seed}" for name in ("full", "small", "family")}
        for name, width in (("full", 32), ("small", 20)):
            train(recipe(width, seed), found[seed][name])
        ordered(load(found[seed]["full"] / "model"), "taylor", seed).save(found[seed]["family"] / "model")
    return found


@cache
def images_and_classes() -> tuple[Tensor, Tensor]:
    """The test images (N, 1, H, W), which all models here read in the same form, and their classes (N,)."""
    stream = plain_stream(build_model("vitrim_digits_vit", depth=1), DataSpec(**DATA))
    images, classes, _ = zip(*stream, strict=True)
    return torch.stack(images), torch.tensor(classes)


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits (N, 10) on the test images, and their classes."""
    images, classes = images_and_classes()
    with torch.no_grad():
        return model.eval()(images).double(), classes


def accuracy(model: nn.Module) -> float:
    logits, classes = outputs(model)
    return (logits.argmax(1) == classes).double().mean().item()


def divergence(full: nn.Module, model: nn.Module) -> float:
    """Mean over the images of sum_k p_k log(p_k / q_k)."""
    p, q = (outputs(one)[0].softmax(1) for one in (full, model))
    return (p * (p / q).log()).sum(1).mean().item()


def test_every_figure_is_that_of_the_network_cut_by_hand(seeds: Seeds):
    table = measure_curve(CURVE, "digits", seeds, DataSpec(**DATA))
    hand: dict[tuple[str, str, float | None], list[nn.Module]] = {}
    for seed, folders in seeds.items():
        full = load(folders["full"] / "model")
        wpac, chance = ordered(full, "wpac", seed), ordered(full, "random", seed)
        family = SuperNet.load(folders["family"] / "model")
        for budget in (1, 0.5):
            hand.setdefault(("WPAC", "full", budget), []).append(wpac.extract(macs=budget, compensate="none"))
            moved = wpac.extract(macs=budget)
            hand.setdefault(("WPAC + compensation", "full", budget), []).append(moved)
            hand.setdefault(("random", "full", budget), []).append(chance.extract(macs=budget, compensate="none"))
            hand.setdefault(("own", "family", budget), []).append(family.extract(macs=budget, compensate="none"))
        hand.setdefault(("alone", "full", None), []).append(full)
        hand.setdefault(("alone", "small", None), []).append(load(folders["small"] / "model"))
    assert {(row["curve"], row["row"], row["budget"]) for row in table.rows} == set(hand)
    for row in table.rows:
        nets = hand[row["curve"], row["row"], row["budget"]]
        accuracies, costs = [accuracy(net) for net in nets], [cost(net) for net in nets]
        assert row["accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert row["accuracy_std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
        assert row["n"] == 2
        assert row["gmacs"] == pytest.approx(sum(c.macs for c in costs) / 2e9)
        assert row["gmacs_linear_only"] == pytest.approx(sum(c.macs_linear_only for c in costs) / 2e9)
        assert row["params"] == round(sum(c.params for c in costs) / 2)
        if row["budget"] is None:
            assert row["divergence"] is None
        else:
            whole = [load(folders[row["row"]] / "model") for folders in seeds.values()]
            apart = [divergence(full, net) for full, net in zip(whole, nets, strict=True)]
            assert row["divergence"] == pytest.approx(sum(apart) / 2, rel=1e-3, abs=1e-5)
            assert row["gmacs"] <= row["budget"] * cost(load(seeds[0]["full"] / "model")).macs / 1e9 * (1 + 1e-9)
    # Else equal figures would say nothing.
    assert len({row["accuracy"] for row in table.rows}) > 4
    assert max(row["divergence"] or 0 for row in table.rows) > 1e-3


def test_what_networks_trained_alone_have_at_the_same_cost(seeds: Seeds):
    rows = measure_curve(CURVE, "digits", {0: seeds[0]}, DataSpec(**DATA)).rows
    full, small = (
        next(row for row in rows if (row["curve"], row["row"]) == ("alone", name)) for name in ("full", "small")
    )
    assert small["over_alone"] is None
    for row in rows:
        if row["budget"] is None:
            continue
        if row["gmacs"] < small["gmacs"]:
            assert row["over_alone"] is None
            continue
        share = (row["gmacs"] - small["gmacs"]) / (full["gmacs"] - small["gmacs"])
        line = small["accuracy"] + share * (full["accuracy"] - small["accuracy"])
        assert row["over_alone"] == pytest.approx(row["accuracy"] - line)
    assert any(row["over_alone"] not in (None, 0) for row in rows)


def cut(curve: str, row: str, *points: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Rows of a table from (budget, GMACs, accuracy)."""
    return [{"curve": curve, "row": row, "budget": b, "gmacs": g, "accuracy": a, "published": None}
            for b, g, a in points]  # fmt: skip


ALONE = [{"curve": "alone", "row": row, "budget": None, "gmacs": gmacs, "accuracy": accuracy, "published": 0.9}
         for row, gmacs, accuracy in (("full", 4.0, 0.8), ("small", 1.0, 0.5))]  # fmt: skip


def test_notes_say_where_curves_fall_below_networks_trained_alone_and_which_had_more_training():
    rows = [
        *cut("a, even", "full", (1, 4.0, 0.8), (0.75, 3.0, 0.69), (0.5, 2.0, 0.61), (0.3, 1.2, 0.3), (0.2, 0.8, 0.1)),
        *cut("b", "full", (1, 4.0, 0.79999), (0.5, 2.0, 0.6), (0.2, 0.8, 0.1)),
        *cut("c", "on", (0.5, 2.0, 0.59), (0.3, 1.2, 0.6)),
        *cut("d", "full", (0.2, 0.8, 0.1)),
        *ALONE,
    ]
    notes = compare_with_trained_alone(rows, trained_on=["on"])
    assert notes[0].startswith("Over trained alone: accuracy minus that of networks trained alone")
    assert notes[1].startswith("No equal comparison with networks trained alone")
    assert notes[1].endswith("trained longer: c.")
    assert notes[2].endswith("the largest budget at which they are: a, even (0.75) | c (0.50); never below them: b.")
    assert len(notes) == 3
    assert len(compare_with_trained_alone(rows)) == len(compare_with_trained_alone(rows, ["on", "full", "small"])) == 2
    assert compare_with_trained_alone(rows[:-2]) == []


def test_published_budgets_that_count_otherwise_are_told():
    rows = [*cut("a", "full", (1, 4.0, 0.8), (0.5, 2.0, 0.6)), *ALONE]
    assert published_budgets_note(rows, linear_only=True) == []  # A point of its own stands at no budget.
    rows[1]["published"] = 0.7
    assert "without attention products" in published_budgets_note(rows, linear_only=True)[0]
    assert published_budgets_note(rows, linear_only=False) == []
    study = Study.read(ROOT / "recipes" / "system5" / "study.yaml", "full")
    assert study.curve is not None
    assert study.curve.published_linear_only


def test_orderings_change_the_cut_and_nothing_else(seeds: Seeds):
    nets = curve_networks(CURVE, seeds[0], DataSpec(**DATA))
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        out = {point: net.eval()(images) for point, net in nets.items()}
    for line in ("WPAC", "WPAC + compensation", "random", "own"):
        row = "family" if line == "own" else "full"
        torch.testing.assert_close(out[line, row, 1], out["alone", "full", None], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out["WPAC", "full", 0.5], out["random", "full", 0.5], atol=1e-2)


def test_an_even_line_cuts_every_width_by_the_same_fraction(seeds: Seeds):
    lines = {"even": {"row": "full", "ordering": "wpac", "even": True}, "judged": {"row": "full", "ordering": "wpac"}}
    curve = Curve.parse({"lines": lines, "budgets": [0.5], "images": 64, "width_multiple": 2})
    even, judged = curve_networks(curve, seeds[0], DataSpec(**DATA)).values()
    assert cost(even).macs <= 0.5 * cost(load(seeds[0]["full"] / "model")).macs

    def spread(net: nn.Module) -> float:
        widths = widths_of(net)
        kept = [block.head_dim / 16 for block in widths] + [block.hidden / 128 for block in widths]
        return max(kept) - min(kept)

    assert spread(even) <= 1 / 8  # One group of dims of a head.
    assert spread(judged) > 1 / 8


def test_a_row_without_super_network_of_its_own(seeds: Seeds):
    curve = Curve.parse({"lines": {"own": {"row": "full"}}})
    with pytest.raises(CheckpointError, match=r"no chain\.json"):
        curve_networks(curve, seeds[0], DataSpec(**DATA))


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        ({}, "has no lines"),
        ([], "is a mapping of options"),
        ({"lines": {"a": {"row": "full", "ordering": "wpac"}}, "budget": [1]}, "did you mean budgets"),
        ({"lines": {"a": {"row": "full", "ordering": "wpac"}}, "budgets": [1, 1.5]}, "must list fractions of the MACs"),
        ({"lines": {"a": {"row": "full", "ordering": "wpac"}}, "images": 0}, "are 1 or more"),
        ({"lines": {"a": "full"}}, "or a list of rows"),
        ({"lines": {"a": {"row": "full", "order": "wpac"}}}, "option in curve 'a' 'order'; did you mean ordering"),
        ({"lines": {"a": {"row": "ful", "ordering": "wpac"}}}, "unknown row 'ful'; did you mean full"),
        ({"lines": {"a": ["full", "smal"]}}, "unknown row 'smal'"),
        ({"lines": {"a": {"row": "full", "ordering": "wpca"}}}, "unknown ordering 'wpca'; did you mean wpac"),
        ({"lines": {"a": {"row": "family", "compensate": "regression"}}}, "only a curve that orders compensates"),
        ({"lines": {"a": {"row": "family", "even": True}}}, "only a curve that orders compensates, refits or cuts"),
        ({"lines": {"a": {"row": "full"}}}, "row 'full' is not a super-network; give the row the option elastic"),
        ({"lines": {"a": {"row": "family"}}, "budgets": [1, 0.2]}, "saves 75.0% of the MACs at most, .* budget 0.2"),
        ({"lines": {"a": {"row": "pruned", "ordering": "wpac"}}}, "row 'pruned' reduces tokens"),
        ({"lines": {"a": {"row": "headless", "ordering": "wpac"}}}, "row 'headless' learns no classes"),
        ({"lines": {"a": ["full"]}, "published": {"b": {"full": 0.8}}}, "unknown curve 'b'"),
        ({"lines": {"a": ["full"]}, "published": {"a": {"ful": 0.8}}}, "of 'a' 'ful'; did you mean full"),
        ({"lines": {"a": ["full"]}, "published": {"a": 0.8}}, "published is 0.8; it must be figures"),
        ({"lines": {"a": ["full"]}, "published": {"a": {"full": "0.8"}}}, "it must be figures by budget, or by row"),
        ({"lines": {"a": ["full"]}, "published": {"a": {"full": 79.8}}}, "published at full is 79.8; it must be 0"),
        (
            {"lines": {"a": {"row": "full", "ordering": "wpac"}}, "budgets": [1, 0.5], "published": {"a": {0.6: 0.8}}},
            "of 'a' '0.6'; did you mean 0.5",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(curve: Any, says: str):
    rows = {
        "full": recipe(32, 0),
        "small": recipe(20, 0),
        "family": recipe(32, 0, elastic={"grow_epochs": 1, "max_saving": 0.75}),
        "pruned": recipe(32, 0, reduction="TopK() @ KeepRate(0.5, at=[0])"),
        "headless": Recipe.from_dict({"model": {"args": {"num_classes": 0}}}),
    }
    with pytest.raises(VitrimError, match=says) as caught:
        Curve.parse(curve).check(rows)
    assert isinstance(caught.value, RecipeError | UnknownNameError)
    assert "\n" not in str(caught.value)
