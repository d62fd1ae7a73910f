"""Tools that put hooks on every module, to summarise a model or to count its work: they run, and change no output."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from zoo import build, images

TEXTS = (
    "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 2))",
    "ToMe() @ ConstantR(3)",
    "TopK(norm) @ KeepRate(0.6, at=(1,))",
    "",
)
FORMS = [("vit", text) for text in TEXTS] + [("removed", TEXTS[0]), ("removed", "")]


def torchinfo_summary(model: torch.nn.Module) -> tuple[int, str]:
    torchinfo = pytest.importorskip("torchinfo")
    found = torchinfo.summary(model, input_size=(2, 3, 40, 40), depth=9, verbose=0)
    return found.total_params, str(found)


def ptflops_summary(model: torch.nn.Module, backend: str) -> tuple[int, str]:
    ptflops = pytest.importorskip("ptflops")
    text: Any = io.StringIO()
    macs, params = ptflops.get_model_complexity_info(model, (3, 40, 40), as_strings=False, backend=backend, ost=text)
    assert macs is not None, "ptflops prints an exception and returns nothing"
    return params, text.getvalue()


TOOLS = {
    "torchinfo": torchinfo_summary,
    "ptflops": lambda model: ptflops_summary(model, "pytorch"),
    "ptflops_aten": lambda model: ptflops_summary(model, "aten"),
}


@pytest.mark.parametrize(("name", "text"), FORMS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_is_summarised_and_left_as_it_was(tool: str, name: str, text: str, tmp_path: Path) -> None:
    model, x = build("timm-vit", name), images(2)
    if text:
        vitrim.attach(model, text)
    expected, cost = model(x), vitrim.cost(model)
    params, printed = TOOLS[tool](model)
    assert params == sum(weight.numel() for weight in model.parameters())
    assert "Attention" in printed or tool == "ptflops_aten"
    assert torch.equal(model(x), expected)
    assert vitrim.cost(model) == cost
    if name == "vit":  # Which timm.create_model made, so that it can be saved.
        vitrim.save(model, tmp_path / "model")
        assert torch.equal(vitrim.load(tmp_path / "model")(x), expected)
