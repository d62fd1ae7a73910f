"""The playground: what it computes without gradio, and the page as a person uses it."""

import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitrim
from browser import CHROMIUM, Browser, served
from calling import call
from vitrim.errors import DataError, ScheduleError, ScoreError, UnknownNameError, UnsupportedModelError, VitrimError
from vitrim.models.files.classes import class_labels
from vitrim.showing import app, choices, playground
from vitrim.showing.choices import Choice
from vitrim.showing.playground import Subject, figures, sight
from vitrim.tokens import Assignment, Reducer, Schedule

TINY = {"img_size": 64, "patch_size": 8, "depth": 8, "embed_dim": 24, "num_heads": 3}
NAMES = ["cat", "dog", "crane", "crane", "owl", "fox"]
HALF = Choice("TopK()", "cls_attention", "KeepRate", 0.7)
installed = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra app (gradio) is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("playground")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=6, **TINY)
    vitrim.save(model, place / "model", classes=NAMES)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / "noise.png")
    (place / "text.png").write_text("no image")
    return place


@pytest.fixture
def subject(folder):
    return Subject.open(str(folder / "model"))


def test_both_predictions_are_those_of_the_model_with_and_without_the_reduction(folder, subject):
    seen = sight(subject, folder / "noise.png", HALF)
    model = vitrim.load(folder / "model").eval()
    batch = playground.View(*_attached(model, seen.method)).sources([folder / "noise.png"])[0].load()[None]
    with torch.inference_mode():
        reduced = model(batch)[0].softmax(0)
        vitrim.models.attached(model).remove()
        whole = model(batch)[0].softmax(0)
    names = ["cat", "dog", "crane (2)", "crane (3)", "owl", "fox"]
    for found, wanted in ((seen.before, whole), (seen.after, reduced)):
        assert found == pytest.approx({names[at]: wanted[at].item() for at in wanted.topk(5).indices}, abs=1e-5)
    assert seen.before != seen.after
    assert seen.remarks == ()


def _attached(model, method):
    return model, vitrim.attach(model, method, cls_only=True)


def test_figures_count_the_macs_of_both_and_times_are_of_interleaved_rounds(subject, monkeypatch):
    timed, bench = [], playground.bench
    monkeypatch.setattr(playground, "bench", lambda models, **words: timed.append(words) or bench(models, **words))
    monkeypatch.setattr(playground, "ROUNDS", 2)
    counted = figures(subject, HALF)
    assert counted.macs[0] == vitrim.cost(subject.whole).macs > counted.macs[1] / 0.7
    assert counted.token_counts == vitrim.cost(subject.reduced(HALF)).token_counts
    assert (counted.ms, timed) == (None, [])
    found = figures(subject, HALF, timed=True)
    assert timed[0]["batch_sizes"] == (1,)
    assert found.macs == counted.macs
    shown = found.markdown().replace("\u00a0", " ")
    assert f"| {found.ms[0].median:.2f} ms | {found.ms[1].median:.2f} ms | {found.speedup} |" in shown


def test_every_schedule_with_a_strongest_form_meets_the_budget(subject):
    assert choices.shapes() == ["PowerLaw", "KeepRate", "Stages", "ConstantR"]
    for shape in choices.shapes():
        before, after = figures(subject, Choice("TopK()", "norm", shape, 0.8)).macs
        assert 0.5 * before < after <= 0.8 * before
        assert vitrim.tokens.SCHEDULES[shape].strongest(depth=8, num_patches=64) is not None


def test_every_pair_that_is_offered_can_be_made():
    for reducer in choices.reducers()[1:]:
        for score in choices.scores(reducer) or [None]:
            made = Choice(reducer, score, "KeepRate", 0.5).reduction(12, 196).reducer
            assert getattr(made, "score", None) == score
    assert choices.scores("TopK(fuse='sum')") == ["cls_attention", "mean_attention"]
    assert "gradient" not in choices.scores("TopK()")
    assert choices.scores("ToMe()") == choices.scores("own") == []
    assert choices.fitting("TopK(fuse='sum')", "norm") == "cls_attention"


@pytest.mark.usefixtures("entries_stay")
def test_a_reducer_and_a_schedule_of_the_user_are_offered_and_drawn(folder, subject):
    @dataclass(frozen=True)
    class First(Reducer):
        needs = "nothing"

        def assign(self, evidence, keep):
            kept = torch.arange(keep).expand(len(evidence.hidden_BTC), -1)
            return Assignment.drop(evidence.num_patches, kept, None)

    @dataclass(frozen=True)
    class Once(Schedule):
        keep: float = 0.05

        def blocks(self, depth):
            return (1,)

        def target(self, block, depth, num_now, num_patches):
            return max(1, round(self.keep * num_now))

        def scaled(self, strength):
            return Once(keep=1 - strength * (1 - self.keep))

    assert "First()" in choices.reducers()
    assert "Once" in choices.shapes()
    seen = sight(subject, folder / "noise.png", Choice("First()", None, "Once", 0.7))
    assert seen.method == "First() @ Budget(macs=0.7, shape=Once())"


def test_the_reduction_that_a_model_was_saved_with_is_the_first_choice(folder, subject, tmp_path):
    assert subject.first_choice() == Choice("TopK()", "cls_attention", "PowerLaw", 0.5)
    with pytest.raises(VitrimError, match="reduces no tokens by itself; choose a reducer"):
        sight(subject, folder / "noise.png", Choice("own", None, "PowerLaw", 0.5))
    model = vitrim.load(folder / "model")
    vitrim.attach(model, "ToMe() @ KeepRate(0.6)")
    vitrim.save(model, tmp_path / "reduced")
    own = Subject.open(str(tmp_path / "reduced"))
    assert own.first_choice().reducer == "own"
    assert sight(own, folder / "noise.png", own.first_choice()).method == "ToMe() @ KeepRate(rate=0.6)"
    assert figures(own, own.first_choice()).macs[0] == vitrim.cost(subject.whole).macs


def test_what_cannot_be_shown_is_refused_in_one_line(folder, subject):
    for error, match, image, choice in (
        (DataError, "cannot read .*it is not an image", "text.png", HALF),
        (ScheduleError, "cannot reach", "noise.png", Choice("ToMe()", None, "KeepRate", 0.2)),
        (UnknownNameError, "unknown score", "noise.png", Choice("TopK()", "nrm", "KeepRate", 0.7)),
        (UnknownNameError, "unknown reducer", "noise.png", Choice("TopKK()", None, "KeepRate", 0.5)),
    ):
        with pytest.raises(error, match=match) as found:
            sight(subject, folder / image, choice)
        assert "\n" not in str(found.value)
    pooled = timm.create_model("vit_tiny_patch16_224", num_classes=6, class_token=False, global_pool="avg", **TINY)
    without_cls = Subject("pooled", pooled.eval(), pooled, class_labels("pooled", pooled), trained=True)
    with pytest.raises(ScoreError, match="CLS"):
        sight(without_cls, folder / "noise.png", HALF)


def test_a_model_without_classifier_has_a_cosine_and_random_weights_are_named(folder):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY).eval()
    seen = sight(Subject("bare", model, model, class_labels("bare", model), False), folder / "noise.png", HALF)
    assert (seen.before, seen.after) == ({}, {})
    assert seen.remarks[0].startswith("no classifier; cosine of the features")
    assert seen.remarks[1].endswith("write bare@pretrained or @FILE")


def test_names_of_imagenet_are_a_guess_unless_the_weights_are_published():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert class_labels("vit_tiny_patch16_224@pretrained", model)[281] == "tabby, tabby cat"
    assert class_labels("vit_tiny_patch16_224@mine.pth", model)[281] == "class 281 (in ImageNet: tabby, tabby cat)"
    assert len(set(class_labels("vit_tiny_patch16_224@pretrained", model))) == 1000


def test_names_of_folders_of_imagenet_become_what_they_mean(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY)
    vitrim.save(model, tmp_path / "model", classes=["n02123045", "n03028079"])
    assert class_labels(tmp_path / "model", model) == ["tabby, tabby cat", "church, church building"]


# The command


def test_show_names_what_is_missing_without_app_and_what_has_no_effect_with_it(capsys):
    assert call(capsys, "show", "deit_tiny_patch16_224")[2].startswith("vitrim show: missing: --images")
    assert call(capsys, "show", "deit_tiny_patch16_224", "--images", "x")[2].startswith("vitrim show: missing: --out")
    code, _, err = call(capsys, "show", "deit_tiny_patch16_224", "--app", "--method", "ToMe() @ ConstantR(1)")
    assert (code, err.count("\n")) == (2, 1)
    assert "--method has no effect with --app" in err


def test_a_port_in_use_is_one_line_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = call(capsys, "show", "no_such_model", "--app", "--port", port)
    assert code == 2
    assert err == f"vitrim show: port {port} of this machine: address already in use; choose another --port\n"


def test_without_gradio_the_command_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = call(capsys, "show", "deit_tiny_patch16_224", "--app", "--port", 0)
    assert code == 2
    assert err == "vitrim show: gradio is not installed; run: pip install 'vitrim[app]'\n"


# The page


@installed
@pytest.mark.filterwarnings("ignore")  # Of gradio and its servers.
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here; apt-get install chromium")
def test_a_person_drops_in_an_image_and_chooses_a_method(folder, monkeypatch):
    monkeypatch.setattr(playground, "ROUNDS", 1)
    line = "document.querySelector('textarea').value"
    with served(str(folder / "model")) as address, Browser() as page:
        page.call("Page.navigate", url=address)
        page.wait(f"document.querySelector('textarea') && {line} == 'drop in an image'")
        page.choose_file(folder / "text.png")
        page.wait(f"{line}.startsWith('cannot read text.png: it is not an image')")
        page.click("button[aria-label='Clear']")
        page.wait(f"{line} == 'drop in an image'")
        page.choose_file(folder / "noise.png")
        page.wait(f"{line} == 'TopK() @ Budget(macs=0.5)'")
        page.wait("/\\d\\sms/.test(document.body.innerText)")
        assert {"owl", "crane (2)"} & set(page.text().splitlines())
        assert page.evaluate("document.querySelector('img').naturalWidth") > 500
        page.choose("reducer", "ToMe()")
        page.wait(f"{line} == 'ToMe() @ Budget(macs=0.5)'")
        page.click("input[type=range]", at=0.01)
        page.wait(f"{line}.includes('cannot reach')")
        assert "Traceback" not in page.text()
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        outside = [one for one in page.requests if not one.startswith((address, "data:", "blob:", "about:"))]
    assert outside == []


def test_a_model_without_tokens_to_reduce_is_refused_before_a_page_is_served(tmp_path):
    vitrim.save(timm.create_model("test_resnet", num_classes=3), tmp_path / "cnn")
    with pytest.raises(UnsupportedModelError, match=r"no adapter for timm\.models\.resnet"):
        Subject.open(str(tmp_path / "cnn"))


@pytest.mark.parametrize(("pool", "score"), [("token", "cls_attention"), ("avg", "mean_attention")])
def test_the_page_begins_with_a_method_that_the_model_takes(tmp_path, pool, score):
    model = timm.create_model("vit_tiny_patch16_224", global_pool=pool, class_token=pool == "token", **TINY)
    vitrim.save(model, tmp_path / "model")
    subject = Subject.open(str(tmp_path / "model"))
    first = subject.first_choice()
    assert (first.reducer, first.score) == ("TopK()", score)
    assert figures(subject, first).macs[1] < figures(subject, first).macs[0]
