"""The file of a study: rows x seeds under one base recipe, and the methods under which every row is tested.

It holds `title`, `base` (recipe options), `rows` (name: changes), `test` (name: method), `seeds`, optionally `sweep`
(method, vary), `curve` (see `curve.py`), `pictures` (rows, images), `published` (published figures) and `scales`, each
of which changes any of these. `{row:NAME}` in an option is replaced by the model that the row of that name has learnt
with the same seed: a teacher, or initial weights. Rows without a classifier serve other rows in this way and are in no
table.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from ..errors import RecipeError, UnknownNameError
from ..models import OWN
from ..options import flatten, from_dict, merge, read_yaml
from ..train.checkpoint import RunFolder
from ..train.recipe import Recipe
from .curve import Curve
from .published import Published, mapping, read_published
from .sweep_spec import SweepSpec

_ROW = re.compile(r"\{row:([^{}]+)\}")
_PARTS = {"title", "base", "rows", "test", "seeds", "sweep", "curve", "pictures", "published"}


@dataclass(frozen=True)
class PictureSpec:
    """The part `pictures` of a study: which models' surviving tokens are drawn, on the same test images of the base.

    rows: rows whose models reduce tokens.
    images: how many test images, spread evenly.
    """

    rows: list[str] = field(default_factory=list)
    images: int = 4

    def check(self, recipes: Mapping[str, Recipe]) -> None:
        """Check all names before anything is trained.

        Args:
            recipes: of all rows of the study.

        Raises:
            UnknownNameError: a row that does not exist.
            RecipeError: a model that reduces no tokens, or no rows or images.
        """
        if not self.rows or self.images < 1:
            raise RecipeError("pictures needs one row or more, and one image or more")
        for row in self.rows:
            if row not in recipes:
                raise UnknownNameError("row", row, recipes)
            if recipes[row].reduction is None or recipes[row].phase == "train":
                raise RecipeError(f"pictures: the model of row {row!r} reduces no tokens; leave it out")


@dataclass(frozen=True)
class Study:
    """A study file at one scale."""

    title: str
    base: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    test: dict[str, str]
    seeds: list[int]
    sweep: SweepSpec | None
    curve: Curve | None
    pictures: PictureSpec | None
    published: dict[str, Published]

    @classmethod
    def read(cls, path: str | Path, scale: str, root: str | None = None) -> "Study":
        """Read a study file; `root` replaces its image folder.

        Raises:
            RecipeError: a part of the wrong kind.
            UnknownNameError: a part, a scale or an option that does not exist.
        """
        data = read_yaml(path)
        scales = {
            str(name): mapping(changes, f"{path}: scale {name}")
            for name, changes in mapping(data.pop("scales", None), f"{path}: scales").items()
        }
        for name in (*data, *(name for changes in scales.values() for name in changes)):
            if name not in _PARTS:
                raise UnknownNameError("part of a study", str(name), _PARTS)
        if scale not in scales and scale != "full":
            raise UnknownNameError("scale", scale, [*scales, "full"])
        data = merge(data, scales.get(scale) or {})
        for name in ("base", "rows"):
            if not isinstance(data.get(name), dict):
                raise RecipeError(f"{path} has no {name!r} with options in it")
        rows = {name: mapping(changes, f"{path}: row {name!r}") for name, changes in data["rows"].items()}
        test = mapping(data.get("test"), f"{path}: test") or {OWN: OWN}
        for name in (*rows, *test):
            if not isinstance(name, str):
                raise RecipeError(f"{path}: YAML reads a name as {name!r}; put names such as off, yes or 1 in quotes")
        for name, method in test.items():
            if not isinstance(method, str):
                raise RecipeError(f"{path}: test {name!r} is {method!r}; it must be a method, such as dense or own")
        for name in ("sweep", "curve", "pictures"):
            mapping(data.get(name), f"{path}: {name}")
        seeds = [0] if data.get("seeds") is None else data["seeds"]
        if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
            raise RecipeError(f"{path}: seeds is {seeds!r}; it must list whole numbers, such as [0, 1, 2]")
        if len(set(seeds)) < len(seeds):
            raise RecipeError(f"{path}: seeds {seeds} name a seed twice, which would count one run as two")
        if root is not None:
            data["base"] = merge(data["base"], {"data": {"root": root}})
        return cls(
            title=str(data.get("title") or Path(path).stem),
            base=data["base"],
            rows=rows,
            test=test,
            seeds=seeds,
            sweep=SweepSpec.parse(data["sweep"]) if data.get("sweep") is not None else None,
            curve=Curve.parse(data["curve"]) if data.get("curve") is not None else None,
            pictures=from_dict(PictureSpec, data["pictures"], "pictures") if data.get("pictures") is not None else None,
            published=read_published(data.get("published"), "published"),
        )

    def recipe(self, row: str, seed: int, out: Path) -> Recipe:
        """The recipe of one run of the study in folder `out`."""
        folder = lambda name: str(RunFolder(run_folder(out, name, seed)).model_path)  # noqa: E731
        return Recipe.from_dict(merge(_fill_references(self._options(row), folder, seed), {"seed": seed}))

    def needs(self, row: str) -> list[str]:
        """Rows whose models this one needs."""
        return [name for text in self._texts(row) for name in _ROW.findall(text)]

    def order(self) -> list[str]:
        """Rows in the order of training: each after those whose models it needs.

        Raises:
            UnknownNameError: a row needs one that does not exist.
            RecipeError: rows need each other in a circle.
        """
        needed = {row: self.needs(row) for row in self.rows}
        for names in needed.values():
            for name in names:
                if name not in self.rows:
                    raise UnknownNameError("row", name, self.rows)
        try:
            return list(TopologicalSorter(needed).static_order())
        except CycleError as error:
            raise RecipeError(f"rows of the study wait for each other: {' -> '.join(error.args[1])}") from None

    def _options(self, row: str) -> dict[str, Any]:
        return merge(self.base, self.rows[row])

    def _texts(self, row: str) -> list[str]:
        return [value for value in flatten(self._options(row)).values() if isinstance(value, str)]


def run_folder(out: Path, row: str, seed: int) -> Path:
    """The folder of the run of a row and seed."""
    return out / f"{row.replace(' ', '-')}-s{seed}"


def _fill_references(options: Any, folder: Callable[[str], str], seed: int) -> Any:
    """Options with each `{row:NAME}` replaced by a model folder, and `{seed}` by the seed."""
    if isinstance(options, dict):
        return {name: _fill_references(value, folder, seed) for name, value in options.items()}
    if not isinstance(options, str):
        return options
    return _ROW.sub(lambda found: folder(found[1]), options).replace("{seed}", str(seed))
