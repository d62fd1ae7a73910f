"""timm's `Eva`: the rotation of queries and keys follows the tokens that are left."""

import pytest
from torch import nn

import vitrim
from eva_models import EVA, MORE
from test_contract import Case, agrees_with_reference
from vitrim.tokens import Reducer
from zoo import redrawn

each_model = pytest.mark.parametrize("name", sorted(MORE))
REDUCERS = [vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.ToMe()]


def _model(name: str) -> nn.Module:
    return redrawn({**EVA, **MORE}[name]()).double()


@pytest.mark.parametrize("place", ["inside", "before"])
@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@each_model
def test_reduced_tokens_keep_their_own_rotation(name: str, reducer: Reducer, place: str) -> None:
    model = _model(name)
    case = Case(reducer)
    agrees_with_reference(model, case.suited(model), case.cuts(0, 1, place=place))
