"""Parts of reduced models: a tower or a block inside one is not a model without a reduction."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from hf_models import MORE
from vitrim.errors import VitrimError

CUT = "TopK(norm) @ KeepRate(0.6, at=(0, 1))"
CALLS: dict[str, Callable[[Any, Path], object]] = {
    "attached": lambda tower, folder: vitrim.attached(tower),
    "attach": lambda tower, folder: vitrim.attach(tower, CUT),
    "set_epoch": lambda tower, folder: vitrim.set_epoch(tower, epoch=1),
    "cost": lambda tower, folder: vitrim.cost(tower),
    "save": lambda tower, folder: vitrim.save(tower, folder),
    "convert": lambda tower, folder: vitrim.convert(tower, "timm"),
    "stratify": lambda tower, folder: vitrim.stratify(tower, torch.randn(40, 3, 40, 40)),
    "compress": lambda tower, folder: vitrim.compress(tower, torch.randn(64, 3, 40, 40), macs=0.5),
}


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize("call", CALLS)
def test_the_tower_inside_a_reduced_model_is_refused(call: str, copied: bool, tmp_path: Path) -> None:
    whole: Any = MORE["dinov2"]().eval()
    with vitrim.attach(whole, CUT) as handle:
        tower = copy.deepcopy(whole.dinov2) if copied else whole.dinov2
        with pytest.raises(VitrimError, match=r"attached to the Dinov2ForImageClassification around this Dinov2Model"):
            CALLS[call](tower, tmp_path / "new")
        assert vitrim.attached(whole) is handle
    assert vitrim.attached(whole.dinov2) is None


def test_a_copy_of_a_reduced_model_and_its_owner_have_its_handle() -> None:
    whole: Any = MORE["dinov2"]().eval()
    vitrim.attach(whole, CUT)
    twin = copy.deepcopy(whole)
    owner = torch.nn.ModuleDict({"inside": twin})
    assert vitrim.attached(owner) is vitrim.attached(twin) is not None
