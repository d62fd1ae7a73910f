"""One recipe describes a run completely. Plain data: this module imports no torch, so that the command starts fast."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.specs import AugmentSpec, DataSpec
from ..errors import RecipeError, UnknownNameError, VitrimError
from ..options import Range, check_options, flatten, from_dict, plain
from ..places import PLACES, located, read_recipe
from ..yaml_text import dump_yaml, parse_yaml
from .specs import CacheSpec, ElasticSpec, ModelSpec, OptimSpec

WITHOUT_EFFECT = ("data.workers", "data.download", "cache.folder", "shard_teacher", "checkpointing", "track")
"""Options that change how a run is carried out, but none of its numbers."""
NOTATION = ("reduction", "distill")
"""Options that may be written in several ways: with other spaces, with or without an option that has its default."""


@dataclass
class Recipe:
    """Everything that determines a run.

    The same recipe gives the same numbers, interrupted or not. On CUDA it does so up to rounding, since kernels there
    add up in no fixed order.

    Args:
        model: the network.
        data: the images.
        augment: how training images are varied.
        optim: how weights are changed.
        reduction: `reducer @ schedule [@ curriculum]`, for example `TopK() @ PowerLaw(0.6, 2.0) @ Delayed(4)`.
        phase: when tokens are reduced: in training ("train"), in evaluation ("eval") or in both.
        distill: the objective, for example `Labels(0.3) + Logits(Linear(0.7, 0.5)) + ClsStages(0.3)`; without it,
            cross-entropy with the labels. Terms on features alone train no classifier: `model.args` may leave it out by
            {num_classes: 0}, and the epoch with the lowest held-out objective is kept.
        labels: whether the labels of the images are classes of the network. False: nothing reads them, the network
            keeps its own classifier and learns from the teacher alone, and the epoch with the lowest held-out objective
            is kept.
        elastic: train a super-network instead, whose widths are cut afterwards; without it, one network.
        teacher: the teacher of the objective, or of the super-network; it is frozen and reduces no tokens, and gets the
            same images as the student, in its own input format.
        shard_teacher: with several processes, each holds only its share of the teacher's weights (FSDP); for teachers
            that fill a device.
        cache: keep the teacher's outputs on disk instead of computing them in every epoch; needs augment.views.
        epochs: passes over the training images.
        batch_size: images per update, of all processes together.
        seed: seed of the initial weights, the order of the images, augmentation and dropout.
        compile: use torch.compile.
        checkpointing: recompute activations in the backward pass, to save memory.
        track: name of an experiment tracker that accelerate knows, such as tensorboard or wandb.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    reduction: str | None = None
    phase: Literal["both", "train", "eval"] = "both"
    distill: str | None = None
    labels: bool = True
    elastic: ElasticSpec | None = None
    teacher: ModelSpec | None = None
    shard_teacher: bool = False
    cache: CacheSpec | None = None
    epochs: Annotated[int, Range(1, 1_000_000)] = 10
    batch_size: Annotated[int, Range(1, 1_000_000)] = 128
    seed: Annotated[int, Range(0, 10**15)] = 0
    compile: bool = False
    checkpointing: bool = False
    track: str | None = None

    def check(self) -> None:
        """Raise `RecipeError` for values of a wrong type, out of range, or that contradict each other."""
        check_options(self)
        for part in (self.data, self.augment, self.optim):
            part.check()
        self.model.check("model")
        if self.teacher is not None:
            self.teacher.check("teacher")
        if self.batch_size % self.optim.accumulate:
            raise RecipeError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.optim.accumulate}")
        if self.optim.warmup_epochs > self.epochs:
            raise RecipeError(f"optim.warmup_epochs is {self.optim.warmup_epochs}, but epochs is {self.epochs}")
        self.check_processes(1)
        if self.elastic is not None:
            self._check_elastic(self.elastic)
        elif self.distill is None and self.teacher is not None:
            raise RecipeError("a teacher needs terms to teach by; set distill, or leave teacher out")
        if self.optim.freeze and self.reduction is not None and self.phase == "train":
            raise RecipeError(
                "optim.freeze runs the network as in evaluation, where a reduction of phase train does not act; set "
                "phase to both, or leave freeze out"
            )
        if not self.labels and (self.distill is None or self.elastic is not None):
            raise RecipeError("without labels a network learns by terms of distill alone; set distill and teacher")
        if self.cache is not None:
            self._check_cache()
        if self.track is not None:
            from accelerate.tracking import (  # Here, since it imports torch.
                LOGGER_TYPE_TO_CLASS,
                get_available_trackers,
            )

            if self.track not in LOGGER_TYPE_TO_CLASS:
                raise UnknownNameError("tracker", self.track, LOGGER_TYPE_TO_CLASS)
            if self.track not in map(str, get_available_trackers()):
                raise RecipeError(f"the tracker {self.track} is not installed here; install it, or leave track out")

    def _check_elastic(self, spec: ElasticSpec) -> None:
        if spec.grow_epochs > self.epochs:
            raise RecipeError(f"elastic.grow_epochs is {spec.grow_epochs}; it must be 1 to {self.epochs} (epochs)")
        for given, what in (
            (self.reduction, "reduction changes tokens, elastic widths; reduce the tokens of what is extracted"),
            (self.distill, "distill has terms for one network; elastic.distill and teacher are for all of them"),
            (self.cache is not None, "cache serves the terms of distill; leave it out with elastic"),
            (self.shard_teacher, "shard_teacher serves the terms of distill; leave it out with elastic"),
            (self.optim.freeze, "optim.freeze trains the classifier alone, elastic what lies before it"),
            (self.compile, "compile would compile again for every width; leave it out with elastic"),
        ):
            if given:
                raise RecipeError(what)
        if self.teacher is not None and not spec.distill:
            raise RecipeError("a teacher needs elastic.distill to teach a super-network; set it, or leave teacher out")
        if spec.distill and self.teacher is None and spec.rule != "sandwich":
            raise RecipeError(
                f"elastic.rule {spec.rule} never runs the full network, so it cannot teach; set elastic.distill to "
                "false, or a teacher"
            )

    def _check_cache(self) -> None:
        for wrong, advice in (
            (self.teacher is None, "needs a teacher; set teacher"),
            (
                self.augment.mixup > 0 or self.augment.cutmix > 0,
                "cannot know mixed images; set augment.mixup and augment.cutmix to 0",
            ),
            (
                self.augment.views is None,
                "holds a fixed number of forms of each image; set augment.views, for example to 10",
            ),
        ):
            if wrong:
                raise RecipeError(f"a teacher cache {advice}, or leave cache out")

    def check_processes(self, number: int) -> None:
        """Raise `RecipeError` where a batch cannot be shared evenly among so many processes, or leaves none to mix."""
        batch = self.batch_size // self.optim.accumulate
        if batch % number:
            raise RecipeError(f"a batch of {batch} images cannot be shared evenly among {number} processes")
        if self.elastic is not None and self.elastic.images < number:
            raise RecipeError(
                f"elastic.images is {self.elastic.images}, too few for {number} processes; set it to {number} or more"
            )
        if batch == number and (self.augment.mixup > 0 or self.augment.cutmix > 0):
            raise RecipeError(
                "images are mixed in pairs, but one comes at a time (batch_size / optim.accumulate / processes); "
                "choose a larger batch_size, or set augment.mixup and augment.cutmix to 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain data."""
        return plain(asdict(self))

    def flat(self) -> dict[str, int | float | str]:
        """All options as `group.option`, for experiment trackers: numbers and text alone."""
        options = flatten(self.to_dict())
        return {name: value if isinstance(value, int | float) else str(value) for name, value in options.items()}

    def to_yaml(self) -> str:
        """The recipe as a complete file, options in the order of their definition."""
        return dump_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """A recipe from nested plain data; unknown names are errors with the nearest known one."""
        return from_dict(cls, data, "recipe", prefix="")

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file; that of a run names its files and folders so that it is right anywhere."""
        data = read_recipe(path)
        try:
            return cls.from_dict(data)
        except VitrimError as error:
            raise RecipeError(f"{path}: {error}") from None

    def located(self, base: Path) -> "Recipe":
        """The same with what it names relative to this place as absolute paths."""
        return self.from_dict(located(self.to_dict(), base))

    def differences(self, other: "Recipe") -> list[str]:
        """Options by which two recipes describe different runs, as `name: this -> other`.

        Options without effect on the result (`WITHOUT_EFFECT`) may differ, and a place may be written in two ways.
        """
        mine, theirs = (flatten(parse_yaml(recipe.to_yaml(), "the recipe")) for recipe in (self, other))
        # An empty mapping is an option of its own only where the other recipe has no entries in it.
        filled = {name.rpartition(".")[0] for name in (*mine, *theirs)}
        names = [name for name in {**mine, **theirs} if name not in WITHOUT_EFFECT and name not in filled]
        changed = [name for name in names if not _same(name, mine.get(name), theirs.get(name))]
        return [f"{name}: {mine.get(name)!r} -> {theirs.get(name)!r}" for name in changed]


def _same(name: str, one: Any, other: Any) -> bool:
    if not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    if name in PLACES:
        return one == other or Path(one).resolve() == Path(other).resolve()
    return one == other or (name in NOTATION and _parsed(name, one) == _parsed(name, other))


def _parsed(name: str, text: str) -> object:
    """What a text in the notation means; a text that means nothing stands for itself."""
    from ..distill import Terms  # Here, since both import torch.
    from ..tokens import Reduction

    try:
        return Terms.parse(text) if name == "distill" else str(Reduction.parse(text))
    except VitrimError:
        return text
