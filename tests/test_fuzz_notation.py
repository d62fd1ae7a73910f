"""Any text is either read and comes back the same from what `str` writes of it, or is refused in one short line."""

import random
from collections.abc import Callable

import pytest

from fuzzing import COUNT, altered_text, fault_of, fuzz
from vitrim.distill import LOSSES, TERMS, WEIGHTS, Terms
from vitrim.errors import VitrimError
from vitrim.tokens import CURRICULA, REDUCERS, SCHEDULES, SCORES, Reduction

REDUCTIONS = [
    "TopK(cls_attention, fuse=sum, normalise=true) @ KeepRate(0.7, at=(3, 6, 9), round_to=8)",
    "TopK(norm, momentum=0.5, shallow=3) @ Stages({4: 0.85, 8: 0.5}, reinstate=9) @ Polynomial(40, 140, initial=0.1)",
    "ToMe(prop_attn=False) @ ConstantR(13, place=before) @ Adaptive(signal='entropy', threshold=0.3, per_step=True)",
    "TopK @ Counts([9, 8, 7]) @ Delayed(5)",
    "ToMe() @ Budget(0.5, shape=PowerLaw(r_max=1.0, alpha=1.4)) @ CosineWarmup(30, 5)",
]
OBJECTIVES = [
    "Labels(Linear(0.3, 0.5)) + Logits(Linear(0.7, 0.5), temperature=4) + ClsStages(0.3)",
    "Tokens(2.0, loss=smooth_l1) + Cls(loss='cosine') + DistToken(hard=true)",
]
NAMES = [*SCORES, *REDUCERS, *SCHEDULES, *CURRICULA, *TERMS, *WEIGHTS, *LOSSES, "true", "None", "rate", "at", "shape"]
VALUES = ["0", "1", "-1", "0.5", "1e999", "-1e999", "10**9", "9" * 400, "9" * 5000, "1e-320", "nan", "'x'", "''",
    "b'x'", "1j", "...", "{}", "()", "[[]]", "{1: 2}", "{[1]: 2}", "{1, 2}", "*x", "**x", "f'{1}'", "x.y",
    "'\\x00'", "'é'", "\ud800", "\x00", "\x1b[31m", "\\", "\n", "not 1", "__import__('os')"]  # fmt: skip


def invented(rng: random.Random, depth: int = 0) -> str:
    """An expression out of known names and odd values, more or less well formed."""
    kind = rng.randrange(8) if depth < 6 else 0
    if kind == 0:
        return rng.choice(VALUES)
    if kind == 1:
        return rng.choice(NAMES)
    inner = [invented(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        return rng.choice(("({})", "[{}]", "({},)", "-{}", "{{1: {}}}")).format(", ".join(inner))
    if kind == 3:
        return rng.choice((" @ ", " + ", "@", " ", " * ")).join(inner)
    given = [f"{rng.choice(NAMES)}={text}" if rng.random() < 0.4 else text for text in inner]
    return f"{rng.choice(NAMES)}({', '.join(given)})"


def overgrown(rng: random.Random) -> str:
    """An expression that is very long, very deep, or both."""
    number = rng.choice((10, 30, 300, 3_000, 30_000))
    opening, closing = rng.choice((
        ("-", ""), ("(", ")"), ("[", "]"), ("{1:", "}"), ("not ", ""), ("Budget(0.5, shape=", ")"), ("TopK(", ")"),
        ("x.", ""), ("1,", ""), ("1+", ""), ("TopK()@", ""), ("Cls()+", ""), ("a", ""), ("'", "'"), ("(", ""),
    ))  # fmt: skip
    return f"TopK({opening * number}1{closing * number}) @ KeepRate()"


def text(rng: random.Random, examples: list[str]) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return overgrown(rng)
    if kind == 1:
        return invented(rng)
    made = rng.choice(examples)
    for _ in range(rng.choice((1, 1, 2, 4))):
        made = altered_text(made, rng)
    return made


def reduction(rng: random.Random) -> None:
    phase = rng.choice(("both", "train", "eval"))
    made = Reduction.parse(text(rng, REDUCTIONS), phase)
    assert Reduction.parse(str(made), phase) == made
    assert hash(made) == hash(Reduction.parse(str(made), phase))
    for strength in (0.0, 0.3, 1.0):
        message = ""
        try:
            made.schedule.scaled(strength).check(12, 196, made.reducer)
        except VitrimError as error:
            message = str(error)
        assert not message or not fault_of(message)


def objective(rng: random.Random) -> None:
    made = Terms.parse(text(rng, OBJECTIVES))
    assert Terms.parse(str(made)) == made


@pytest.mark.parametrize("surface", [reduction, objective], ids=lambda surface: surface.__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_any_text_is_read_and_written_again_or_refused(surface: Callable[[random.Random], None]) -> None:
    outcomes = fuzz(surface, count=max(500, COUNT))
    assert min(outcomes["accepted"], outcomes["refused"]) > 10 or not outcomes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"TopK({'-' * 5_000}1) @ KeepRate()", "cannot read"),
        (f"TopK({'-' * 50}1) @ KeepRate()", "it is nested more than 20 levels deep"),
        (f"{'(' * 5_000}TopK{')' * 5_000} @ KeepRate()", "cannot read"),
        (f"TopK() @ {'Budget(0.5, shape=' * 30}KeepRate(){')' * 30}", "it is nested more than 20 levels deep"),
        (f"TopK() @ Counts({'1,' * 50_000})", "it has more than 20000 characters"),
        (f"TopK() @ Counts(({'1,' * 500}))", "Counts: counts has more than 256 entries"),
        (f"TopK() @ ConstantR({'9' * 400})", "ConstantR: r is a whole number, not 9999"),
        (f"TopK() @ ConstantR({'9' * 5000})", "cannot read"),
        ("TopK() @ KeepRate(1e999)", "KeepRate: rate is a number, not inf"),
        ("TopK() @ Budget(1e30)", "Budget: macs is a number, not 1e+30"),
        ("TopK() @ KeepRate({[1]: 2})", "not a value"),
        ("TopK(norm, score=norm) @ KeepRate()", "got multiple values for argument 'score'"),
        ("TopK(score=norm, score=random) @ KeepRate()", "an option is given twice"),
        ("TopK() @ KeepRate(\x00)", "cannot read"),
        ("TopK() @ KeepRate(\ud800)", "it is not an expression"),
        (f"{'x' * 10_000}() @ KeepRate()", "unknown reducer, schedule or curriculum"),
        (f"TopK({'x' * 10_000}) @ KeepRate()", "unknown score"),
        ("TopK() @ KeepRate(\n0.7 x)", "cannot read 'TopK() @ KeepRate(\\n0.7 x)'"),
    ],
    ids=lambda one: one[:40] if one.isprintable() else ascii(one[:40]),
)
def test_texts_without_bounds_are_refused_in_one_short_line(text: str, says: str) -> None:
    with pytest.raises(VitrimError) as raised:
        Reduction.parse(text)
    assert says in str(raised.value)
    assert not fault_of(str(raised.value))
