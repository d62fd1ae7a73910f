"""`vitrim.compress`: one budget in, a cheaper model and a certificate out."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitrim
from elastic_models import images, small
from eva_models import EVA
from eva_models import MORE as EVA_MORE
from vitrim import Certificate, Compressed, ToMe, TopK
from vitrim.compression import solver, timing, verification, verify
from vitrim.compression.budget import fixed_part
from vitrim.compression.candidates import power, stages
from vitrim.compression.certificate import Line, row_of
from vitrim.compression.findings import Finding, Verified
from vitrim.compression.goal import Goal, check_using
from vitrim.compression.images import Pictures, divide, gather
from vitrim.compression.job import Job
from vitrim.compression.request import Request, check_model
from vitrim.elastic.chain import start_chain
from vitrim.errors import CheckpointError, DataError, UnknownNameError, UnsupportedModelError, VitrimError
from vitrim.models import narrow
from vitrim.showing.report import write_report

TINY = {"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 2}
IMAGES = images(96, dtype=torch.float32)


@pytest.fixture(scope="module", autouse=True)
def few() -> Any:
    """Two reducers and two short sessions, which is enough to see that everything works together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "reducers", lambda has_cls: [TopK(), ToMe()] if has_cls else [ToMe()])
        patch.setattr(solver, "first_shapes", lambda depth: [power(1.4), *stages(depth)[:1]])
        patch.setattr(timing.sessions, "__kwdefaults__", {"number": 2, "rounds": 1})
        yield


def model(**options: Any) -> nn.Module:
    return small(torch.float32, **TINY | options)


def quiet(line: str) -> None:
    pass


def compressed(network: nn.Module, data: Any = IMAGES, **options: Any) -> Compressed:
    return vitrim.compress(network, data, **{"batch_size": 2, "trials": 2, "say": quiet} | options)


@pytest.fixture(scope="module")
def half() -> Compressed:
    classes = model()(IMAGES).argmax(1)
    return compressed(model(), macs=0.7, val=(images(40, seed=9, dtype=torch.float32), classes[:40]), max_drop=1.0)


@pytest.fixture(scope="module")
def folder(half: Compressed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half.save(tmp_path_factory.mktemp("half") / "model")


def test_the_answer_meets_the_budget_and_the_model_given_stays_as_it_was(half: Compressed) -> None:
    whole = model()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    found = compressed(whole, macs=0.9, using="tokens")
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state_dict().items())
    assert vitrim.attached(whole) is None
    for one, most in ((half, 0.7), (found, 0.9)):
        assert vitrim.cost(one.model).macs == one.certificate["macs"].value <= most * vitrim.cost(whole).macs
        assert one.certificate.met
    assert found.certificate["params"].value == vitrim.cost(whole).params, "tokens alone keep all weights"


def test_a_certificate_states_what_was_asked_and_what_was_found(half: Compressed) -> None:
    found = half.certificate
    assert found.asked == "at most 0.7 of the MACs"
    keys = [line.key for line in found.lines]
    assert keys[:4] == ["macs", "params", "divergence", "agreement"]
    assert {"accuracy", "drop", "time", "ms"} < {*keys}
    assert {"over_tokens", "over_width"} & {*keys}, "the answer is compared with the pure ones"
    assert found["divergence"].number == found["drop"].number == 40, "val is what the search has not seen"
    assert found["drop"].asked == 1.0
    assert found["drop"].met
    assert found["time"].number == 2
    assert found.settings["batch_size"] == 2
    assert found.environment["torch"]
    assert {row["kind"] for row in found.tried} >= {"tokens", "width", "joint"}
    assert found.tried[0]["divergence"] == min(row["divergence"] for row in found.tried if row["images"] == 32)
    text = found.table().text()
    assert "at most 0.7 of the MACs, met" in text
    assert "same top class" in text


def test_learning_afterwards_never_makes_the_answer_worse() -> None:
    original, goal = model(), Goal.of(0.6, None, None)
    request = Request(goal, ("tokens",), 2, "float32", False, 64, 0)
    parts = divide(gather(IMAGES, check_model(original, Goal.of(0.5, None, None)), 64), False, None)
    job = Job(original, request, parts, torch.device("cpu"), quiet)
    found = job.run()
    closer, further = copy.deepcopy(original), copy.deepcopy(found.model)
    with torch.no_grad():
        further.head.weight.mul_(3.0)
    learnt = job.learnt(found, closer, 2, None, labelled=False)
    assert learnt.model is closer
    assert learnt.certificate["divergence"].value == pytest.approx(0, abs=1e-6)
    assert "was 0." in learnt.certificate.notes[-1]
    kept = job.learnt(found, further, 2, None, labelled=False)
    assert kept.model is found.model
    assert kept.certificate.lines == found.certificate.lines
    assert "so the answer is as it was before" in kept.certificate.notes[-1]


def test_a_saved_answer_is_loaded_by_the_lines_of_its_certificate(half: Compressed, folder: Path) -> None:
    found = Certificate.read(folder)
    names: dict[str, Any] = {}
    exec("\n".join(found.load), names)
    x = images(3, seed=4, dtype=torch.float32)
    assert torch.equal(names["model"](x), half.model(x))
    assert (
        found == half.certificate.in_folder(folder) or found.to_json() == half.certificate.in_folder(folder).to_json()
    )
    with pytest.raises(CheckpointError, match="holds a model already"):
        half.save(folder)


def test_a_report_shows_the_certificate(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder, tmp_path / "report.html").read_text()
    assert "at most 0.7 of the MACs, met" in page
    assert "share of the width" in page


def _shown(found: Verified, key: str) -> str | None:
    (one,) = (finding for finding in found.findings if finding.line.key == key)
    return None if one.here is None else row_of(one.here)["found"]


def test_verify_finds_what_the_certificate_says(folder: Path) -> None:
    val = Pictures(images(40, seed=9, dtype=torch.float32), model()(IMAGES).argmax(1)[:40])
    found = verify(folder, val, model(), say=quiet)
    # In any form that compress takes, in an order of their own; without classes nothing is said of accuracies.
    pair = verify(folder, [(val.images, val.classes)], model(), say=quiet)
    assert _shown(pair, "drop") == _shown(found, "drop")
    alone = verify(folder, val.images, model(), say=quiet)
    assert _shown(alone, "agreement") == _shown(found, "agreement")
    assert _shown(alone, "drop") is None
    assert all(not finding.why for finding in found.findings if finding.here is not None)
    with pytest.raises(DataError, match="1 image is too few to compare models on; give 16 or more"):
        verify(folder, val.images[:1], model(), say=quiet)
    with pytest.raises(DataError, match="but the model takes"):
        verify(folder, torch.randn(8, 3, 8, 8), model(), say=quiet)
    holds = {finding.line.key: finding.holds for finding in found.findings}
    for key in ("macs", "params", "divergence", "agreement", "accuracy", "drop"):
        assert holds[key] is True, key
    assert holds["time"] is None  # Nobody asked for a time.
    assert "certificate" in found.table().text()


@pytest.mark.parametrize(
    ("key", "asked", "found", "holds"),
    [
        ("ms", None, 99.0, None), ("time", None, 0.99, None), ("ms", 12.0, 99.0, False), ("ms", 12.0, 11.0, True),
        ("time", 0.6, 0.5, True), ("time", 0.6, 0.7, False), ("divergence", None, 99.0, False),
        ("agreement", None, 0.1, False), ("macs", None, 99.0, False),
    ],
)  # fmt: skip
def test_times_are_judged_only_where_they_were_asked_for(
    half: Compressed, key: str, asked: float | None, found: float, holds: bool | None
) -> None:
    said = Line(key, 0.5, 0.5, 0.5, asked=asked)
    one = Finding(said, Line(key, found, found, found))
    assert one.holds is holds
    verified = Verified(half.certificate, (one,))
    assert verified.holds is (holds is not False)
    (row,) = verified.table().rows
    assert row["holds"] == {None: "not judged: a time of this machine", True: "yes", False: "NO"}[holds]
    missed = Finding(said, None, "no images were given")
    assert missed.verdict == "not measured: no images were given"
    title = Verified(half.certificate, (missed,)).table().title
    assert title.endswith("holds here" if asked is None else "holds here as far as it was measured")


def test_verify_without_images_or_the_given_model_measures_what_it_can(folder: Path) -> None:
    found = {finding.line.key: finding for finding in verify(folder, say=quiet).findings}
    assert found["macs"].holds is True
    assert found["time"].here is not None, "the certificate describes the given model"
    assert found["divergence"].holds is None
    assert found["divergence"].why == "no images were given"


def test_verify_sees_worse_images_and_refuses_other_weights(folder: Path, tmp_path: Path, half: Compressed) -> None:
    wrong = json.loads((folder / "certificate.json").read_text())
    for line in wrong["lines"]:
        if line["key"] == "divergence":
            line.update(value=-2.0, low=-3.0, high=-1.0)
    altered = half.save(tmp_path / "altered")
    (altered / "certificate.json").write_text(json.dumps(wrong))
    found = verify(altered, Pictures(images(40, seed=9, dtype=torch.float32)), model(), say=quiet)
    assert {one.line.key for one in found.findings if one.holds is False} >= {"divergence"}
    assert not found.holds
    assert "DOES NOT HOLD" in found.table().title
    with pytest.raises(VitrimError, match="another model"):
        verify(folder, None, model(seed=5), say=quiet)
    wrong["weights"] = "0" * 64
    (altered / "certificate.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match="other weights"):
        verify(altered, say=quiet)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1}', "damaged"),
        ("1", "damaged"),
    ],
)
def test_a_damaged_certificate_is_one_line(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "certificate.json").write_text(text)
    with pytest.raises(CheckpointError, match=fault):
        Certificate.read(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        Certificate.read(tmp_path / "nothing")


def test_an_altered_certificate_is_one_line(half: Compressed, tmp_path: Path) -> None:
    good = json.loads(half.certificate.to_json())
    for change in (
        {"settings": {"batch_size": 10**9}}, {"settings": {"batch_size": "2"}}, {"settings": {"dtype": "float8"}},
        {"settings": {"device": "../x"}}, {"settings": []}, {"lines": [{"key": "macs", "value": "many"}]},
        {"lines": [{"key": ["macs"], "value": 1}]}, {"lines": [{"key": "joy", "value": 1}]}, {"lines": 3},
        {"weights": 7},
    ):  # fmt: skip
        (tmp_path / "certificate.json").write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match="certificate"):
            Certificate.read(tmp_path)
    source = {"description": good["source"]["description"].replace('"depth": 3', '"depth": 4')}
    assert source["description"] != good["source"]["description"]
    with pytest.raises(CheckpointError, match="describes another model"):
        verification.described(Certificate.from_json(json.dumps(good | {"source": source})))


def test_the_title_of_a_certificate_names_what_was_missed() -> None:
    kept = Line("macs", 5.0, asked=6.0, of=10.0)
    lost = Line("drop", 0.01, low=0.0, high=0.03, asked=0.02)
    assert Certificate("half", [kept, lost], "", "").table().title == "Certificate: half, NOT MET: accuracy lost"
    assert Certificate("half", [kept], "", "").table().title == "Certificate: half, met"


def test_parameters_are_saved_by_width_alone() -> None:
    found = compressed(model(), params=0.8)
    assert found.certificate["params"].value <= 0.8 * vitrim.cost(model()).params
    assert found.certificate.met
    assert found.certificate.reduction is None


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("make", [small, EVA["dinov3"], EVA_MORE["eva02"]])
def test_what_no_candidate_saves_is_what_the_model_costs_without_its_blocks(
    make: Callable[[], nn.Module], kind: Any
) -> None:
    """Pairs of rotary models and layers as a whole have costs of their own."""
    model = make()
    fixed = fixed_part(SimpleNamespace(original=model, supernet=None), None, Goal(kind, 0.5, 0.5, True))
    narrow(model, dict.fromkeys(start_chain(model).units, 0))
    assert fixed == getattr(vitrim.cost(model), kind)


def test_an_impossible_wish_gives_the_nearest_model_and_says_so() -> None:
    lines: list[str] = []
    found = compressed(model(), macs=0.01, using="tokens", say=lines.append)
    assert found.certificate.notes[0].startswith("Change: the number of tokens is reduced, no width is cut")
    assert not found.certificate.met
    assert "cannot be reached" in found.certificate.notes[1]
    assert "outside of the blocks" in found.certificate.notes[1]
    assert found.certificate.notes[1] in lines
    assert found.certificate.table().title.endswith("NOT MET: MACs")
    least = min(row["price"] for row in found.certificate.tried)
    assert least <= 1
    assert vitrim.cost(found.model).macs == found.certificate["macs"].value


def test_models_without_a_classifier_are_compared_by_their_features() -> None:
    found = compressed(model(num_classes=0), macs=0.85, using="tokens")
    assert "agreement" not in found.certificate
    assert 0 <= found.certificate["divergence"].value < 2


def test_a_family_whose_widths_cannot_change_loses_tokens_only() -> None:
    sizes = {"img_size": 56, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    eva = timm.create_model("eva02_enormous_patch14_clip_224", **sizes)
    found = compressed(eva.eval(), torch.randn(80, 3, 56, 56), macs=0.8)
    assert any(note.startswith("widths stay as they are") for note in found.certificate.notes)
    assert found.certificate.met


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "exactly one budget"),
        ({"macs": 0.5, "params": 0.5}, "exactly one budget"),
        ({"macs": 0}, "positive number"),
        ({"macs": -1}, "positive number"),
        ({"macs": float("nan")}, "positive number"),
        ({"macs": float("inf")}, "positive number"),
        ({"macs": True}, "positive number"),
        ({"macs": 70}, "macs is 70, a count that no model has; write a fraction of the model, such as 0.7"),
        ({"params": 1.5}, "params is 1.5, a count that no model has"),
        ({"params": 0.5, "using": "tokens"}, "save no parameters"),
        ({"macs": 0.5, "using": ()}, "nothing may be reduced"),
        ({"macs": 0.5, "max_drop": 0.01}, "needs val"),
        ({"macs": 0.5, "batch_size": 0}, "batch_size"),
        ({"macs": 0.5, "trials": -1}, "trials"),
        ({"macs": 0.5, "val": IMAGES[:20]}, "no whole numbers as classes"),
        ({"macs": 1}, "all that the model needs"),
        ({"params": 1e9}, "within the budget of 1,000,000,000 parameters already"),
        ({"macs": 0.5, "device": "gpu"}, "device is a name such as 'cpu'"),
        ({"macs": 0.5, "device": "cuda:99"}, "there is no device cuda:99 here"),
    ],
)
def test_impossible_options_are_one_line(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(VitrimError, match=fault):
        compressed(model(), **options)


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="part to reduce"):
        compressed(model(), macs=0.5, using=("depth",))
    with pytest.raises(UnknownNameError, match="dtype"):
        compressed(model(), macs=0.5, dtype="float31")
    assert check_using(["tokens", "width"], Goal.of(None, 0.5, None)) == ("width",)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ([], "there are none"),
        (IMAGES[:0], "there are none"),
        (IMAGES[:1], "one image is too few"),
        (IMAGES[:40], "40 images are too few"),
        (IMAGES[:1].expand(80, -1, -1, -1), "all the same"),
        (torch.randn(80, 3, 32, 32), r"size \(3, 32, 32\).* resize them, or make the model for their size"),
        (torch.full((80, 3, 64, 64), float("nan")), "not finite"),
        (TensorDataset(torch.zeros(80)), "needed"),
        (7, "not a int"),
    ],
    ids=["no batch", "no image", "one", "few", "alike", "size", "nan", "no images", "number"],
)
def test_images_that_cannot_be_used_are_one_line(data: Any, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        compressed(model(), data, macs=0.5)


def test_models_that_cannot_be_compressed_are_one_line() -> None:
    reduced = model()
    vitrim.attach(reduced, "TopK() @ KeepRate(0.7, at=(1,))")
    with pytest.raises(VitrimError, match=r"handle.remove\(\)"):
        compressed(reduced, macs=0.5)
    with pytest.raises(UnsupportedModelError, match="no adapter"):
        compressed(timm.create_model("resnet10t", num_classes=3), macs=0.5)
    broken = model()
    nn.init.constant_(broken.head.weight, float("inf"))
    with pytest.raises(VitrimError, match="not finite"):
        compressed(broken, macs=0.5)


def test_images_come_in_any_form_users_have() -> None:
    size, labels = (3, 64, 64), torch.arange(96) % 5
    forms: dict[str, Any] = {
        "tensor": IMAGES, "pair": (IMAGES, labels), "batches": list(IMAGES.split(20)),
        "pairs": list(zip(IMAGES.split(20), labels.split(20), strict=True)),
        "data set": TensorDataset(IMAGES, labels), "loader": DataLoader(TensorDataset(IMAGES, labels), 16),
        "iterator": iter(IMAGES.split(20)), "images": list(DataLoader(IMAGES, 8)),
    }  # fmt: skip
    for name, form in forms.items():
        found = gather(form, size, 50)
        assert (found.images.shape, found.classes) == ((50, *size), None), name
    for name in ("pair", "pairs", "data set", "loader"):
        assert len(gather(forms[name], size, 50, classes=5).classes) == 50, name  # type: ignore[arg-type]
    whole = gather((IMAGES, labels), size, 50, classes=5)
    place = [int((image == IMAGES).flatten(1).all(1).nonzero()) for image in whole.images]
    assert [int(labels[row]) for row in place] == whole.classes.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("label", [77, -1])
def test_labels_that_are_no_classes_of_the_model_are_refused(label: int) -> None:
    labels = torch.arange(96) % 5
    labels[60] = label
    items = TensorDataset(IMAGES, labels)
    forms: tuple[Any, ...] = ((IMAGES, labels), [(IMAGES, labels)], items, DataLoader(items, 96))
    for form in forms:
        with pytest.raises(DataError, match=rf"labels go from .*{label}.*, but the model has 5 classes"):
            compressed(model(), macs=0.5, val=form)
    for form in ((IMAGES, labels[:90]), [(IMAGES, labels[:90])]):
        with pytest.raises(DataError, match="90 labels for 96 images"):
            compressed(model(), macs=0.5, val=form)
    with pytest.raises(VitrimError, match="no classifier, so it has no accuracy; leave val out"):
        compressed(model(num_classes=0), macs=0.5, val=(IMAGES, labels))


def test_parts_of_the_images_do_not_overlap() -> None:
    everything = Pictures(torch.arange(100.0).view(100, 1, 1, 1))

    def numbers(part: Pictures) -> list[float]:
        return part.images.flatten().tolist()

    parts = divide(everything, True)
    assert [*numbers(parts.fit), *numbers(parts.judge), *numbers(parts.unseen)] == [float(n) for n in range(100)]
    assert (len(parts.fit), len(parts.judge), len(parts.unseen)) == (50, 25, 25)
    parts = divide(everything, False)
    assert (len(parts.fit), len(parts.judge), len(parts.unseen)) == (0, 50, 50)
    other = Pictures(torch.zeros(7, 1, 1, 1))
    parts = divide(everything, True, other)
    assert (len(parts.fit), len(parts.judge), parts.unseen) == (66, 34, other)


def test_a_model_with_one_answer_for_all_images_is_warned_about() -> None:
    lines: list[str] = []
    constant = model()
    nn.init.zeros_(constant.head.weight)
    compressed(constant, macs=0.9, using="tokens", say=lines.append)
    assert any("same top class for all images" in line for line in lines)


def test_a_model_that_cannot_be_saved_is_named_before_the_search() -> None:
    lines: list[str] = []
    built = VisionTransformer(patch_size=16, num_classes=5, weight_init="", **TINY).eval()
    found = compressed(built, macs=0.9, using="tokens", say=lines.append)
    assert lines[0].startswith("what is found can be used but not saved: ")
    assert lines[0] in found.certificate.notes
    with pytest.raises(VitrimError) as refused:
        found.save("nowhere")
    assert str(refused.value) in lines[0]
