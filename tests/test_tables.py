"""Tables take each name once, skip private names, and let a module be read again."""

import types

import pytest

from vitrim.distill import LOSSES, TERMS, WEIGHTS
from vitrim.distill.losses import feature_loss
from vitrim.distill.objective import Term, Weight
from vitrim.errors import DuplicateNameError, UnknownNameError, VitrimError
from vitrim.models.adapter import ADAPTERS, Adapter
from vitrim.models.widths.sublayers import ELASTIC, Elastic
from vitrim.tables import Table
from vitrim.tokens import CURRICULA, REDUCERS, SCHEDULES, SCORES, Curriculum, Reducer, Schedule, score

BASES = [(Reducer, REDUCERS), (Schedule, SCHEDULES), (Curriculum, CURRICULA), (Term, TERMS), (Weight, WEIGHTS)]
TABLES = [table for _, table in BASES] + [SCORES, LOSSES, ADAPTERS, ELASTIC]


pytestmark = pytest.mark.usefixtures("entries_stay")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.kind)
def test_a_second_entry_of_the_same_name_is_refused(table: Table) -> None:
    name, entry = next(iter(table.items()))
    with pytest.raises(DuplicateNameError, match=f"there is a {table.kind} named .* already, vitrim.*; rename .*Other"):
        table.enter(name, type("Other", (), {}))
    assert table[name] is entry


@pytest.mark.parametrize(("base", "table"), BASES, ids=lambda one: getattr(one, "__name__", ""))
def test_a_second_class_of_the_same_name_is_refused_while_it_is_defined(base: type, table: Table) -> None:
    with pytest.raises(DuplicateNameError):
        type(next(iter(table)), (base,), {"__module__": "mine"})


def test_a_second_function_layer_or_family_of_the_same_name_is_refused() -> None:
    def norm(evidence: object) -> None: ...

    def mse(student: object, target: object) -> None: ...

    with pytest.raises(DuplicateNameError, match="score named 'norm'"):
        score(needs="nothing")(norm)
    with pytest.raises(DuplicateNameError, match="feature loss named 'mse'"):
        feature_loss(mse)
    replaced = next(iter(ELASTIC))
    with pytest.raises(DuplicateNameError, match=f"elastic layer named '{replaced.__qualname__}'"):
        type("Mine", (Elastic,), {}, replaces=replaced)
    with pytest.raises(DuplicateNameError, match="model family named"):
        type("Mine", (Adapter,), {"name": next(iter(ADAPTERS))})


def test_private_names_are_not_entered() -> None:
    for base, table in BASES:
        before = set(table)
        type("_Shared", (base,), {})
        assert set(table) == before

    def _draft(evidence: object) -> None:
        """Not ready."""

    score(needs="nothing")(_draft)
    assert "_draft" not in SCORES


def test_a_module_that_is_read_again_replaces_its_own_entries() -> None:
    first, second = (type("Mine", (Reducer,), {"__module__": "mine"}) for _ in range(2))
    assert first is not second
    assert REDUCERS["Mine"] is second


def test_names_are_found_or_the_nearest_are_named() -> None:
    table: Table[str, types.SimpleNamespace] = Table("shape")
    table.enter("circle", types.SimpleNamespace())
    with pytest.raises(UnknownNameError, match="unknown shape 'cirkle'; did you mean circle"):
        table.find("cirkle")
    assert issubclass(UnknownNameError, VitrimError)
