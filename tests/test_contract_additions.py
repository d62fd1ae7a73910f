"""A reducer that the contract suite does not know is tested with its default options, without an entry anywhere."""

from dataclasses import dataclass

import pytest
import torch

import test_contract as contract
import vitrim
from vitrim.tokens import Assignment, Evidence, KeepRate, Reducer, Reduction
from zoo import build

MODELS_SEEN = ("vit", "gap", "removed")


pytestmark = pytest.mark.usefixtures("entries_stay")


def first_tokens() -> type[Reducer]:
    """A reducer that needs nothing; a class of its own each time, since the table forgets it after a test."""

    @dataclass(frozen=True)
    class FirstTokens(Reducer):
        """Keep the first tokens."""

        needs = "nothing"
        drops_queries = True

        def assign(self, evidence: Evidence, keep: int) -> Assignment:
            rows = torch.arange(keep, device=evidence.hidden_BTC.device)
            return Assignment.drop(evidence.num_patches, rows.expand(evidence.hidden_BTC.shape[0], -1))

    return FirstTokens


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> contract.Case:
    kind = first_tokens()
    # Pickle finds a class by its name in a module.
    kind.__qualname__ = "FirstTokens"
    monkeypatch.setitem(globals(), "FirstTokens", kind)
    return contract.Case(kind())


@pytest.mark.parametrize("name", MODELS_SEEN)
def test_a_reducer_that_needs_nothing_obeys_the_laws(name: str, case: contract.Case) -> None:
    contract.test_law_1_nothing_to_drop_is_bit_equal("timm-vit", name, case)
    contract.test_laws_2_3_4_prefix_counts_and_sizes("timm-vit", name, case)
    contract.test_laws_5_and_6_remove_deepcopy_pickle("timm-vit", name, case)
    contract.test_law_9_an_image_does_not_depend_on_its_batch("timm-vit", name, case)


def test_a_reducer_that_needs_nothing_cuts_where_attention_was_removed(case: contract.Case) -> None:
    model = build("timm-vit", "removed")
    for reducer in (case.reducer, vitrim.TopK("random")):
        assert not contract.refused(model, reducer, vitrim.KeepRate(0.6, at=(1,)))
        with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(1,))) as handle:
            assert [cut.block for cut in handle.plan().cuts] == [1]
    assert contract.refused(model, vitrim.ToMe(), vitrim.KeepRate(0.6, at=(1,)))


def test_it_is_read_written_and_named_like_any_other(case: contract.Case) -> None:
    @dataclass(frozen=True)
    class Third(KeepRate):
        """Keep a third."""

        rate: float = 1 / 3

    made = Reduction.parse("FirstTokens() @ Third(at=1)")
    assert made == Reduction(case.reducer, Third(at=(1,)))
    assert Reduction.parse(str(made)) == made
    assert vitrim.FirstTokens is type(case.reducer)
    assert not contract.own(vitrim.FirstTokens)
