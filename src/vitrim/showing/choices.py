"""What the playground offers: models, and methods from the tables, so that a user's own appear by themselves."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ..compression.candidates import named_options
from ..errors import VitrimError
from ..models.files.store import saved_folder
from ..models.variants import OWN
from ..notation import render
from ..tokens import REDUCERS, SCHEDULES, SCORES, Budget, Reducer, Reduction

MOST_FOLDERS = 50
"""Run folders that are offered."""


@dataclass(frozen=True)
class Choice:
    """What a person has chosen. `macs` is the share of the MACs that is kept. The reducer OWN has no other parts."""

    reducer: str
    score: str | None
    shape: str
    macs: float

    def reduction(self, depth: int, num_patches: int) -> Reduction:
        """The reduction for a model of that size.

        Raises:
            VitrimError: names that do not go together.
        """
        reducer = _read(self.reducer)
        if (score := fitting(self.reducer, self.score)) is not None:
            reducer = _with_score(reducer, score)
        shape = SCHEDULES[self.shape].strongest(depth, num_patches)
        if shape is None:
            raise VitrimError(f"{self.shape} cannot be scaled to a strength; choose another schedule")
        return Reduction(reducer, Budget(self.macs, shape=shape))


def models(first: str) -> list[str]:
    """The first one, and the run folders in `runs/`."""
    found = sorted(str(folder) for folder in Path("runs").glob("*") if saved_folder(folder) is not None)
    return list(dict.fromkeys([first, *found[:MOST_FOLDERS]]))


def reducers() -> list[str]:
    """What the model was saved with, and every registered reducer with each of its named options but the score."""
    found: list[str] = []
    for kind in REDUCERS.values():
        values = named_options(kind)
        given = [{}, *({"score": name} for name in values.pop("score", ()))]  # Where the score has no default.
        for options in product(*values.values()):
            made = (_made(kind, {**dict(zip(values, options, strict=True)), **score}) for score in given)
            found += [render(one) for one in made if one is not None and not one.training_only][:1]
    return [OWN, *dict.fromkeys(found)]


def scores(reducer: str) -> list[str]:
    """The scores that this reducer takes at test time; none if it takes no score."""
    if reducer == OWN:
        return []
    made = _read(reducer)
    known = [name for name, score in SCORES.items() if not score.training_only]
    return [name for name in known * ("score" in named_options(type(made))) if _takes(made, name)]


def fitting(reducer: str, score: str | None) -> str | None:
    """The score, or the first that this reducer takes if it does not take that one; None if it takes none.

    Raises:
        UnknownNameError: there is no such score.
    """
    if score:
        SCORES.find(score)
    known = scores(reducer)
    return score if score in known else next(iter(known), None)


def shapes() -> list[str]:
    """The schedules that can be scaled to any strength."""
    return [name for name, kind in SCHEDULES.items() if kind.strongest(12, 196) is not None]


def _made(kind: type[Reducer], options: dict[str, object]) -> Reducer | None:
    try:
        return kind(**options)
    except (VitrimError, TypeError):  # Options that do not go together, or one without a default.
        return None


def _read(reducer: str) -> Reducer:
    return Reduction.parse(f"{reducer} @ KeepRate()").reducer


def _with_score(reducer: Reducer, score: str) -> Reducer:
    return replace(reducer, **{"score": score})


def _takes(reducer: Reducer, score: str) -> bool:
    try:
        return _with_score(reducer, score) is not None
    except VitrimError:
        return False
