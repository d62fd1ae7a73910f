"""What is shown of an object at a prompt: a line or two that tell what it is, never its tensors."""

import pytest
import torch

import vitrim
from vitrim.text import outline
from zoo import build, images

QUIET = {"say": lambda line: None}


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    torch.manual_seed(0)
    model, pixels = build("timm-vit", "vit"), images(64)
    net = vitrim.stratify(model, pixels, num_images=32, rounds=1, **QUIET)
    found = {"SuperNet": net, "Chain": net.chain, "Compensation": next(iter(net.compensations.values()))}
    cheaper = vitrim.compress(model, pixels, macs=0.7, using=("tokens",), trials=1, **QUIET)
    found |= {"Compressed": cheaper, "Certificate": cheaper.certificate, "Cost": vitrim.cost(model)}
    with vitrim.attach(model, "TopK(fuse=mean, score=norm) @ KeepRate(0.6)") as handle:
        model(pixels[:2])
        trace = handle.last_trace()
        found |= {"Handle": handle, "TokenState": handle.states[0], "Trace": trace}
        found |= {"Assignment": trace.assignments[0][1], "Plan": handle.plan(), "Reduction": handle.reduction}
        texts = {name: repr(each) for name, each in found.items()}
    return texts | {"removed": repr(handle)}


def test_every_public_object_is_shown_in_a_line_or_two(shown: dict[str, str]) -> None:
    for name, text in shown.items():
        assert "\n" not in text, name
        assert "tensor(" not in text, name
        assert len(text) < (1000 if name in ("Trace", "Plan") else 400), name
        assert name in text, name


def test_what_is_shown_says_what_matters(shown: dict[str, str]) -> None:
    model = build("timm-vit", "vit")
    assert f"to {vitrim.cost(model).macs:,} MACs" in shown["SuperNet"]
    assert "VisionTransformer, Chain(" in shown["SuperNet"]
    assert "3 attn, 3 mlp" in shown["SuperNet"]
    assert "compensations of 6" in shown["SuperNet"]
    assert "asked: at most 0.7 of the MACs" in shown["Compressed"]
    assert "strength 1, tokens 17 12 9" in shown["Handle"]
    assert "KeepRate(rate=0.6)" in shown["Handle"]
    assert shown["removed"].endswith("removed)")
    assert "origin=int64[2, 25]" in shown["TokenState"]


def test_long_collections_are_shown_by_their_length() -> None:
    assert outline(list(range(9))) == "9 items"
    assert outline("a" * 500).startswith("'aaa")
    assert len(outline("a" * 500)) <= 200
    assert outline(torch.zeros(2, 3)) == "float32[2, 3]"
