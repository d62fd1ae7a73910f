"""Values of the wrong kind, each refused in one line that says what to give."""

from typing import Any

import pytest
import torch

import vitrim
from vitrim.errors import ScheduleError, UnknownNameError, VitrimError
from vitrim.tokens import Reduction
from zoo import build

CUT = "TopK(norm) @ KeepRate(0.6, at=(0, 1))"


@pytest.mark.parametrize("text", ["TopK() @ Stages({0: 0.5, 0: 0.4})", "TopK() @ Stages({1: 0.5, 2: 0.4, 1: 0.4})"])
def test_a_place_given_twice_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"[01] is given twice"):
        Reduction.parse(text)


@pytest.mark.parametrize("state", [None, {}, {"strength": None}, {"strength": "a"}, {"strength": 2}, [1]])
def test_a_handle_continues_only_from_its_own_state(state: Any) -> None:
    handle = vitrim.attach(build("timm-vit", "vit"), CUT)
    with pytest.raises(VitrimError, match=r"state_dict\(\) of a handle|strength is between"):
        handle.load_state_dict(state)
    assert handle.strength == 1


def test_the_class_of_a_reduced_model_makes_no_new_one() -> None:
    model: Any = build("timm-vit", "vit")
    vitrim.attach(model, CUT)
    with pytest.raises(VitrimError, match=r"reduced VisionTransformer, which makes no new models.*deepcopy"):
        type(model)(img_size=40)


def test_values_that_are_no_names_and_no_groups() -> None:
    model: Any = build("timm-vit", "vit")
    with pytest.raises(UnknownNameError, match="unknown ordering None"):
        vitrim.stratify(model, torch.randn(64, 1, 40, 40), ordering=None)
    with pytest.raises(VitrimError, match="groups is a number for each kind"):
        vitrim.stratify(model, torch.randn(64, 1, 40, 40), groups=0)
