"""Check a study before anything is trained: names, options, folders, and every cut in every model.

Networks are built without weights (on the meta device), so that this is quick.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

from torch import nn

from ..data.data_sets import look_for
from ..distill import Terms
from ..errors import CheckpointError, RecipeError, UnknownNameError, VitrimError
from ..models import attach, attached, builder_of, find_adapter, num_classes
from ..models.files.build import check_name
from ..models.input_format import InputFormat
from ..models.shapes_only import shapes_only
from ..models.variants import put_under
from ..train.checkpoint import RunFolder
from ..train.learner import prepare_model, reduction_of
from ..train.recipe import Recipe
from ..train.specs import ModelSpec
from .database_url import file_url
from .study import Study, run_folder
from .sweep import methods_of

TRIALS = "sweep.trials.db"
"""The file in the folder of a study that keeps the trials of its sweep until all are done."""
MOST_BYTES = 120
"""Of the name of a row, which becomes part of the names of files."""


def check_study(study: Study, out: Path) -> None:
    """Check everything except images and weights, so that mistakes are reported before the first training.

    Raises:
        VitrimError: names the row, or the test and the row.
    """
    _check_folders(study, out)
    recipes: dict[str, Recipe] = {}
    networks: dict[str, nn.Module] = {}
    own = [str(RunFolder(run_folder(out, row, seed)).model_path) for row in study.rows for seed in study.seeds]
    specs: dict[str, ModelSpec] = {}
    for row, seed in product(study.order(), study.seeds):
        with _prefix_errors(f"row {row!r}"):
            recipe = study.recipe(row, seed, out)
            recipes.setdefault(row, recipe)
            _check_recipe(recipe, own)
            if row not in networks:
                spec = _without_weights(recipe, specs)
                networks[row] = _build(replace(recipe, model=spec))
                specs[str(RunFolder(run_folder(out, row, seed)).model_path)] = spec
        RunFolder(run_folder(out, row, seed)).check(recipe)
    tested = {row: networks[row] for row in study.rows if num_classes(networks[row])}
    if not tested:
        raise RecipeError("no row of the study learns classes, so there is nothing to test")
    if study.sweep is not None:
        study.sweep.check([*tested])
        file_url(out / TRIALS)
    _check_tests(study, tested)
    for row, recipe in recipes.items():
        finished = all(RunFolder(run_folder(out, row, seed)).result for seed in study.seeds)
        if row in tested or not finished:  # The images of a finished row that is not tested are not needed again.
            with _prefix_errors(f"row {row!r}"):
                look_for(recipe.data)
    known = [f"{row}, {test}" for row in tested for test in study.test]
    for name in study.published:
        if name not in known:
            raise UnknownNameError("row and test in published", str(name), known)
    for part in (study.curve, study.pictures):
        if part is not None:
            part.check(recipes)


@contextmanager
def _prefix_errors(where: str) -> Iterator[None]:
    """Put the place of a mistake in front of its message."""
    try:
        yield
    except VitrimError as error:
        raise RecipeError(f"{where}: {error}") from None


def _check_folders(study: Study, out: Path) -> None:
    folders: dict[Path, str] = {}
    for row in study.rows:
        if row.startswith(".") or {"/", "\\"} & set(row) or not row.isprintable() or len(row.encode()) > MOST_BYTES:
            raise RecipeError(
                f"row {row!r} cannot be a folder; names have at most {MOST_BYTES} bytes, no slash, no control "
                "character and no dot in front"
            )
        if (other := folders.setdefault(run_folder(out, row, 0), row)) != row:
            raise RecipeError(f"rows {other!r} and {row!r} would share a folder; name them differently")


def _check_recipe(recipe: Recipe, own: list[str]) -> None:
    """Check the options of a row; `own` are the models that the study itself makes."""
    recipe.check()
    reduction_of(recipe)
    if recipe.distill is not None:
        Terms.parse(recipe.distill)
    for spec in filter(None, (recipe.model, recipe.teacher)):
        if spec.name not in own:
            check_name(spec.name)
        if spec.checkpoint is not None and spec.checkpoint not in own and not Path(spec.checkpoint).exists():
            raise CheckpointError(f"no weights at {spec.checkpoint}")


def _without_weights(recipe: Recipe, specs: Mapping[str, ModelSpec]) -> ModelSpec:
    """The architecture of a row's network; where it is the model of another row, that row's."""
    spec, size = recipe.model, recipe.data.image_size
    if (base := specs.get(spec.name)) is not None:
        spec = replace(base, args=base.args | spec.args)
    args = ({"img_size": size} if size else {}) | spec.args
    return replace(spec, checkpoint=None, checkpoint_size=None, pretrained=False, args=args)


def _build(recipe: Recipe) -> nn.Module:
    """The network of a recipe with its reduction attached, which plans every cut."""
    named = builder_of(recipe.model.name) is not None
    with shapes_only() if named else nullcontext():
        # How many classes the images have is not known yet, but an architecture without a head of its own gets one.
        model = prepare_model(recipe.model, 2 if named else None)
    find_adapter(model)
    InputFormat.of(model, recipe.data.image_size)
    if (reduction := reduction_of(recipe)) is not None:
        if (brought := attached(model)) is not None:
            brought.remove()
        attach(model, reduction)
    return model


def _check_tests(study: Study, networks: Mapping[str, nn.Module]) -> None:
    """Plan all tests and the sweep in all networks, equal ones once; the networks are left under the last of them."""
    tests = [(f"test {name!r}", method) for name, method in study.test.items()]
    if study.sweep is not None:
        tests += [("sweep", method) for method in methods_of(study.sweep.method or "", study.sweep.vary)]
    for row, model in networks.items():
        for where, method in dict.fromkeys(tests):
            with _prefix_errors(f"{where}, row {row!r}"):
                put_under(model.eval(), method)
