"""Every term against a slow, obvious reference in float64; the notation; the weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vitrim.distill import LOSSES, TERMS, Cls, Logits, ModelInfo, Terms
from vitrim.distill.losses import coarse_kl, soft_kl
from vitrim.distill.objective import Batch, Linear
from vitrim.distill.positions import group_means
from vitrim.errors import VitrimError

B, N, M, P, K, WIDTH, WIDE = 3, 8, 5, 2, 7, 4, 6
STUDENT = ModelInfo("student", K, depth=6, width=WIDTH, num_prefix=P, has_cls=True, has_dist=True)
TEACHER = ModelInfo("teacher", K, depth=9, width=WIDE, num_prefix=1, has_cls=True)


@pytest.fixture
def batch():
    torch.manual_seed(11)
    # Image 0: slot 2 is fused of positions 2 and 7; image 1 merges; image 2 has no group at all.
    origin = torch.tensor([[0, 1, 2, -1, 3, 4, -1, 2], [0, 0, 1, 2, 3, 1, 1, 4], [0, -1, 1, -1, 2, 3, -1, 4]])
    fused = torch.zeros(B, M, dtype=torch.bool)
    fused[0, 2] = fused[2, 4] = True  # The second is fused of one position alone: a multiple of it, not its likeness.
    student = {
        "logits": torch.randn(B, K).double() * 3,
        "dist_logits": torch.randn(B, K).double(),
        "stages@3": torch.randn(B, 2, WIDTH).double(),
        "cls": torch.randn(B, WIDTH).double(),
        "tokens": torch.randn(B, M, WIDTH).double(),
        "origin": origin,
        "fused": fused,
    }
    teacher = {
        "logits": torch.randn(B, K).double() * 3,
        "stages@3": torch.randn(B, 2, WIDE).double(),
        "cls": torch.randn(B, WIDE).double(),
        "tokens": torch.randn(B, N, WIDE).double(),
    }
    return Batch(student, teacher, torch.tensor([1, 0, 6]), nn.functional.cross_entropy)


def softmax(values, temperature=1.0):
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def reference_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True))
    return temperature**2 * total / len(student)


def reference_distance(a, b, kind, normalise):
    a, b = a.tolist(), b.tolist()
    norm = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    if normalise:
        a, b = [x / norm[0] for x in a], [x / norm[1] for x in b]
    if kind == "cosine":
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
            sum(x * x for x in a) * sum(y * y for y in b)
        )
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    if kind == "mse":
        return sum(g * g for g in gaps) / len(gaps)
    return sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(gaps)


def made(text):
    (term,) = Terms.parse(text).terms
    project = term.project(STUDENT, TEACHER)
    return term, None if project is None else project.double()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_are_the_softened_kl(batch, temperature):
    term, project = made(f"Logits(temperature={temperature})")
    expected = reference_kl(batch.student["logits"], batch.teacher["logits"], temperature)
    assert project is None
    assert term.compare(batch, None).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("text", "key"), [("Logits(hard=True)", "logits"), ("DistToken()", "dist_logits")])
def test_hard_labels_are_the_top_class_of_the_teacher(batch, text, key):
    expected = 0.0
    for s, t in zip(batch.student[key].tolist(), batch.teacher["logits"].tolist(), strict=True):
        expected -= math.log(softmax(s)[t.index(max(t))]) / B
    assert made(text)[0].compare(batch, None).item() == pytest.approx(expected, rel=1e-10)


def test_soft_distillation_token_reads_its_own_logits(batch):
    expected = reference_kl(batch.student["dist_logits"], batch.teacher["logits"], 3.0)
    got = made("DistToken(hard=False, temperature=3)")[0].compare(batch, None)
    assert got.item() == pytest.approx(expected, rel=1e-10)


def test_labels_are_the_training_criterion(batch):
    expected = (
        -sum(math.log(softmax(s)[c]) for s, c in zip(batch.student["logits"].tolist(), [1, 0, 6], strict=True)) / B
    )
    assert made("Labels")[0].compare(batch, None).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("normalise", [False, True])
def test_feature_terms_match_loops(batch, kind, normalise):
    options = f"loss={kind}, normalise={normalise}"
    term, project = made(f"Cls({options})")
    mapped = project(batch.student["cls"])
    expected = sum(reference_distance(mapped[b], batch.teacher["cls"][b], kind, normalise) for b in range(B)) / B
    assert term.compare(batch, project).item() == pytest.approx(expected, rel=1e-10)

    term, project = made(f"ClsStages({options})")
    expected = 0.0
    for s in range(2):
        mapped = project[s](batch.student["stages@3"][:, s])
        each = [reference_distance(mapped[b], batch.teacher["stages@3"][b, s], kind, normalise) for b in range(B)]
        expected += sum(each) / B / 2
    assert term.compare(batch, project).item() == pytest.approx(expected, rel=1e-10)

    for name, singles in (("Tokens", True), ("Merged", False)):
        term, project = made(f"{name}({options})")
        expected = reference_tokens(batch, project, singles, kind, normalise)
        assert expected > 0
        assert term.compare(batch, project).item() == pytest.approx(expected, rel=1e-10)


def reference_tokens(batch, project, singles, kind, normalise):
    total = 0.0
    for b in range(B):
        losses = []
        for slot in range(M):
            members = [i for i in range(N) if batch.student["origin"][b, i] == slot]
            if batch.student["fused"][b, slot] or (len(members) == 1) != singles:
                continue
            target = sum(batch.teacher["tokens"][b, i] for i in members) / len(members)
            losses.append(reference_distance(project(batch.student["tokens"][b, slot]), target, kind, normalise))
        total += sum(losses) / len(losses) if losses else 0.0
    return total / B


def test_stages_of_equal_width_learn_nothing():
    (term,) = Terms.parse("ClsStages()").terms
    assert term.project(STUDENT, STUDENT) is None
    assert STUDENT.boundaries(3) == (1, 3)
    assert TEACHER.boundaries(3) == (2, 5)
    assert ModelInfo("vit_base", 0, depth=12).boundaries(3) == (3, 7)


def test_a_single_member_gets_exactly_the_teachers_token(batch):
    target, count = group_means(batch.teacher["tokens"], batch.student["origin"], M)
    assert torch.equal(target[2], batch.teacher["tokens"][2, [0, 2, 4, 5, 7]])
    assert count.tolist() == [[1, 1, 2, 1, 1], [2, 3, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_top_logits_lose_no_probability(batch):
    torch.manual_seed(5)
    student, teacher = torch.randn(4, 20).double() * 3, torch.randn(4, 20).double() * 3
    full = soft_kl(student, teacher, 4.0).item()
    seen = []
    for k in (1, 5, 19):
        top, index = teacher.topk(k, dim=1)
        rest = torch.stack([teacher[b, [i for i in range(20) if i not in index[b].tolist()]] for b in range(4)])
        got = coarse_kl(student, top, index, (rest / 4).logsumexp(1), 4.0).item()
        expected = 0.0
        for b in range(4):
            q, p = softmax(student[b].tolist(), 4.0), softmax(teacher[b].tolist(), 4.0)
            chosen = index[b].tolist()
            pairs = [(p[i], q[i]) for i in chosen] + [(1 - sum(p[i] for i in chosen), 1 - sum(q[i] for i in chosen))]
            expected += 16 * sum(x * math.log(x / y) for x, y in pairs) / 4
        assert got == pytest.approx(expected, rel=1e-9)
        seen.append(got)
    assert seen == sorted(seen)  # The finer, the more is told apart.
    assert seen[-1] == pytest.approx(full, rel=1e-12)  # One class left over is not a coarsening.


def test_gradient_of_top_logits_is_finite_and_right():
    torch.manual_seed(6)
    student, teacher = torch.randn(2, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 6).double()
    top, index = teacher.topk(2, dim=1)
    rest = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: coarse_kl(s, top, index, rest, 2.0), student)


@pytest.mark.parametrize(
    "text",
    [
        "Logits(weight=0.7) + ClsStages(weight=0.3)",
        "Labels(weight=Linear(start=0.3, end=0.5)) + Logits(weight=Linear(start=0.7, end=0.5), temperature=2)",
        "Cls() + Tokens(loss='cosine', normalise=True) + Merged(weight=0.5)",
        "DistToken(temperature=3.0, hard=False)",
    ],
)
def test_what_is_printed_can_be_read(text):
    assert str(Terms.parse(text)) == text
    assert Terms.parse(str(Terms.parse(text))) == Terms.parse(text)


def test_notation_takes_short_forms():
    terms = Terms.parse("Labels + Logits(Linear(0.7, 0.5), temperature=4) + Tokens(loss=cosine)")
    assert [term.name for term in terms.terms] == ["labels", "logits", "tokens"]
    logits = terms.terms[1]
    assert [logits.weight_at(p) for p in (0, 0.5, 1, 2)] == pytest.approx([0.7, 0.6, 0.5, 0.5])
    assert terms.wanted(of_teacher=True).temperatures == {4.0}


def test_booleans_may_be_written_as_in_yaml():
    assert Terms.parse("Logits(hard=true) + DistToken(hard=false)") == Terms.parse(
        "Logits(hard=True) + DistToken(hard=False)"
    )


def test_numbers_from_elsewhere_can_be_printed_and_read():
    made = Terms((Logits(np.float32(0.5), temperature=np.int64(2)), Cls(Linear(np.float64(0), 1), normalise=True)))
    assert str(made) == "Logits(weight=0.5, temperature=2) + Cls(weight=Linear(start=0.0, end=1), normalise=True)"
    assert Terms.parse(str(made)) == made
    with pytest.raises(VitrimError, match="weight is a number or a Weight, not nan"):
        Logits(float("nan"))


def test_table_holds_all_terms():
    own = {name for name, term in TERMS.items() if term.__module__.startswith("vitrim.")}
    assert own == {"Labels", "Logits", "ClsStages", "Cls", "Tokens", "Merged", "DistToken"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Logit()", "did you mean Logits"),
        ("Logits(temperature=0)", "temperature must be above 0"),
        ("Logits(heat=2)", "options are weight, temperature, hard"),
        ("Logits() + Logits()", "each at most once"),
        ("Tokens(loss=huber)", "unknown feature loss 'huber'"),
        ("ClsStages(stages=1)", "2 stages or more"),
        ("Linear(0, 1)", "is not a distillation term"),
        ("Logits() *", "cannot read"),
        ("Logits() @ Cls()", "cannot read"),
        ("Logits('much')", "Logits: weight is a number or a Weight, not 'much'"),
        ("Logits(True)", "Logits: weight is a number or a Weight, not True"),
        ("Logits(1e400)", "Logits: weight is a number or a Weight, not inf"),
        ("Logits(Linear(1, a))", "Linear: end is a number, not 'a'"),
        ("Logits(-1)", "Logits: the weight must be 0 or more, and not 0 all the time, but it is -1"),
        ("Logits(0)", "Logits: the weight must be 0 or more, and not 0 all the time, but it is 0"),
        ("Cls(Linear(1, -0.5))", "not 0 all the time, but it is Linear(start=1, end=-0.5)"),
        ("Labels(Linear(0, 0))", "Labels: the weight must be 0 or more"),
        ("Logits(hard=no)", "Logits: hard is True or False, not 'no'"),
        ("Logits(hard=1)", "Logits: hard is True or False, not 1"),
        ("Cls(normalise='no')", "Cls: normalise is True or False, not 'no'"),
        ("Cls(loss=2)", "Cls: loss is text, not 2"),
        ("ClsStages(stages=2.5)", "ClsStages: stages is a whole number, not 2.5"),
        ("Logits(temperature=x)", "Logits: temperature is a number, not 'x'"),
        ("Logits(temperature=1e400)", "Logits: temperature is a number, not inf"),
        ("__import__('os').remove('x')", "cannot read"),
        ("", "cannot read"),
    ],
)
def test_mistakes_take_one_line(text, part):
    with pytest.raises(VitrimError) as refused:
        Terms.parse(text)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)
