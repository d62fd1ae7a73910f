"""The port through which foreign models come: everything that other rooms may ask about a model of any family.

To add a family, write one file with a subclass of `Adapter` (and a `ReducedBlock`, and elastic layers where widths can
change), and import it in `families/__init__.py`, or give the file to `vitrim --import`. The command, the contract tests
and `vitrim list` find it in the table. A family registered later is tried first.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..errors import (
    CheckpointError,
    DuplicateNameError,
    ScoreError,
    UnsupportedModelError,
)
from ..tables import Table, home_of
from ..tokens import Plan, Reducer
from .input_format import InputFormat
from .macs import Macs, needed
from .outputs import Features, ModelInfo, Wanted, as_tensor
from .removed_branch import RemovedBranch

Head = Literal["prefix", "tokens"]
State = dict[str, Tensor]
ADAPTERS: Table[str, "Adapter"] = Table("model family")
"""Families whose tokens can be reduced."""
OTHERS: Table[str, "Adapter"] = Table("model family")
"""Families that only give outputs: teachers, or models to measure."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that a plan depends on. `head` says what the head reads: only prefix tokens, or patch tokens too."""

    depth: int
    num_patches: int
    num_prefix: int
    has_cls: bool
    head: Head
    input_size: tuple[int, int, int]
    fixed_size: bool = True
    """Whether all images have that size, so that the number of patch tokens is always the same."""
    rotary: bool = False
    """Whether the blocks rotate queries and keys by the place of their token."""
    relative: bool = False
    """Whether attention adds a bias by the places of both tokens."""


@dataclass(frozen=True)
class Classifier:
    """The classifier of a model.

    names: of the modules that give class logits, in the model.
    classes: how many there are, 0 without a classifier.
    published: classes that the published weights of the architecture know; None where none are published.
    """

    names: tuple[str, ...]
    classes: int
    published: int | None = None


@dataclass(frozen=True)
class Description:
    """What builds a model again, its weights aside: an architecture, its arguments, and what its images are like.

    All values are plain JSON. `images`: entries that differ from the architecture's own, such as mean and std.
    """

    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)


class Adapter:
    """Base of all families. Instances hold no state."""

    name: ClassVar[str]
    covers: ClassVar[str]
    """One line for `vitrim list`: which models the family covers."""
    branches: ClassVar[Mapping[str, str]] = {}
    """Names within a block of its attention and its MLP branch, and of the norm that feeds only that branch."""
    speed_settings: ClassVar[frozenset[str]] = frozenset({"training"})
    """Attributes of modules that change how an output in eval mode is computed, but not its value.

    What `recompute` sets is one. No description of a model holds them.
    """

    def __init_subclass__(cls, *, cuts: bool = True) -> None:
        if cls.__name__.startswith("_"):  # A shared base.
            return
        table, other = (ADAPTERS, OTHERS) if cuts else (OTHERS, ADAPTERS)
        if cls.name in other:
            raise DuplicateNameError(f"there is a model family named {cls.name!r} already; rename {home_of(cls)}")
        table.enter(cls.name, cls())

    # Which models, and what they are made of.

    def claims(self, model: nn.Module) -> bool:
        """Whether the model belongs to this family."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` that names the part which cannot be changed."""

    def geometry(self, model: nn.Module) -> Geometry:
        """Depth, tokens and head of the model."""
        raise UnsupportedModelError(f"the tokens of this {type(model).__name__} cannot be reduced")

    def patches_entering(self, model: nn.Module, *, training: bool) -> int:
        """Patch tokens that reach the first block at the model's own input size: fewer where training drops some."""
        return self.geometry(model).num_patches

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks in order; none where the family does not know any."""
        return ()

    def branches_of(self, model: nn.Module) -> Mapping[str, str]:
        """As `branches`, for families whose blocks name their branches in several ways."""
        return self.branches

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules besides the blocks and the model that a reduction changes: a tower inside it, a pooling layer."""
        return ()

    def check_widths(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` where no width can change; else each sub-layer decides."""

    def keeps_attention(self, model: nn.Module) -> str:
        """Why attention stays as it is where widths change; "" where its width changes too.

        Families whose blocks rotate queries and keys by place may cut values and whole pairs, see `elastic_values`.
        """
        return "its rotary positions need all dims of its heads" if self.geometry(model).rotary else ""

    def narrowable(self, model: nn.Module) -> Mapping[str, str]:
        """Those of `branches_of` whose width can change."""
        branches = dict(self.branches_of(model))
        if self.keeps_attention(model):
            branches.pop(next(iter(branches), ""), None)
        return branches

    def grid(self, model: nn.Module, image_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of (height, width)."""
        raise UnsupportedModelError(f"the patches of this {type(model).__name__} are not known")

    # Reducing tokens.

    def reduced_class(self, module: nn.Module) -> type[nn.Module]:
        """The module-level subclass that replaces the class of this block, of this one of `parts`, or of the model."""
        raise NotImplementedError

    def dense_owner(self, model: nn.Module, among: Iterable[object] | None = None) -> nn.Module | None:
        """The network that holds this model and reads the tokens of all patches by their places, if there is one.

        Args:
            model: the model.
            among: where to look for it; by default among all objects that exist.
        """
        return None

    def final_norm(self, model: nn.Module) -> nn.Module | None:
        """The norm of all tokens after the last block; None where there is none."""
        raise UnsupportedModelError(f"the tokens of this {type(model).__name__} cannot be restored")

    def check_plan(self, model: nn.Module, plan: Plan, reducer: Reducer) -> None:
        """Raise `ScoreError` if a block where the plan cuts cannot supply what the reducer reads."""
        attention, blocks = next(iter(self.branches_of(model)), ""), self.blocks(model)
        for cut in plan.cuts:
            reads = needed(reducer, cut)
            removed = isinstance(getattr(blocks[cut.block], attention, None), RemovedBranch)
            if removed and reads not in ("nothing", "hidden"):
                raise ScoreError(
                    f"the attention of block {cut.block} was removed, so it gives no {reads} to choose tokens by; cut "
                    "at another block or use TopK(score='norm')"
                )

    def macs(self, model: nn.Module, plan: Plan, reducer: Reducer | None) -> Macs:
        """MACs of one image under the plan, as the reduced model executes it."""
        raise NotImplementedError

    # What a model gives.

    def info(self, model: nn.Module) -> ModelInfo:
        """Sizes that outputs depend on."""
        return ModelInfo(type(model).__name__, self.classifier(model).classes)

    def outputs(self, model: nn.Module, images: Tensor, wanted: Wanted) -> dict[str, Tensor]:
        """Run the model once on images (B, channels, H, W), in its present mode; the outputs wanted, by key."""
        if not wanted.inside:
            logits = self.predict(model, images)
            return dict.fromkeys(wanted.keys, logits)
        info = self.info(model)
        blocks = sorted({block for output in wanted.outputs for block in output.blocks(info)})
        with self.one_pass(model, images):
            final, after = self.features(model, images, blocks)
            features = Features(self, model, info, wanted, final, after)
            return {output.key: output.compute(features) for output in wanted.outputs}

    def one_pass(self, model: nn.Module, images: Tensor) -> AbstractContextManager[object]:
        """Inside, a head knows the only pass from this call, as in the model's own forward."""
        open_call = getattr(model, "open_call", None)
        return nullcontext() if open_call is None else open_call(images)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, K) as the model gives them, or pooled features (B, C) where it has no classifier."""
        return as_tensor(model(*self.inputs(model, images)))

    def inputs(self, model: nn.Module, images: Tensor) -> tuple[Any, ...]:
        """The arguments of the model for images (B, channels, H, W) of one size."""
        return (images,)

    def exporting(self) -> AbstractContextManager[None]:
        """The context in which a model is exported, so that the graph holds no more than its forward pass computes."""
        return nullcontext()

    def output_width(self, model: nn.Module) -> int:
        """Columns of what `predict` returns; 0 where that is not known."""
        return self.classifier(model).classes

    def features(
        self, model: nn.Module, images: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Final tokens (B, T, C) after the last norm, and (prefix, patch tokens) that leave each of these blocks.

        Without hooks, and with the reduction that is attached: under activation checkpointing the tokens are those
        that the checkpoint returns.
        """
        raise UnsupportedModelError(f"this {type(model).__name__} gives logits only")

    def head(self, model: nn.Module, final_BTC: Tensor) -> Tensor:
        """Logits (B, K) of final tokens."""
        raise NotImplementedError

    def heads(self, model: nn.Module, final_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) on CLS and on the distillation token, for models that have one (`ModelInfo.has_dist`)."""
        raise NotImplementedError

    def input_format(self, model: nn.Module) -> InputFormat:
        """What this very model expects of its images."""
        raise UnsupportedModelError(
            f"what images this {type(model).__name__} expects is not known; give their size, mean and std"
        )

    def resize(self, model: nn.Module, size: int | tuple[int, int]) -> None:
        """Make the model take images of (height, width), or square ones, in place; positions are resampled."""
        raise UnsupportedModelError(f"the image size of this {type(model).__name__} is fixed")

    def classifier(self, model: nn.Module) -> Classifier:
        """Its classifier."""
        config = getattr(model, "config", None)
        return Classifier((), int(getattr(model, "num_classes", getattr(config, "num_labels", 0))))

    def reset_classifier(self, model: nn.Module, classes: int) -> None:
        """Put a fresh classifier for so many classes in its place; 0 removes it."""
        raise UnsupportedModelError(f"the classifier of this {type(model).__name__} cannot be replaced")

    def class_names(self, model: nn.Module) -> list[str] | None:
        """The names of its classes, in the order of the classifier, where the model itself holds them."""
        return None

    def name_classes(self, model: nn.Module, names: Sequence[str]) -> None:
        """Keep the names of its classes in the model, where such models hold them."""

    # Training.

    def recompute(self, model: nn.Module, on: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them (activation checkpointing), or stop."""
        raise UnsupportedModelError(f"this {type(model).__name__} cannot recompute activations; set no checkpointing")

    # Building, saving and loading.

    def architectures(self) -> Collection[str]:
        """The names that `build` takes."""
        return ()

    def builds(self, name: str) -> bool:
        """Whether `build` takes this name."""
        return name in self.architectures()

    def build(self, name: str, args: Mapping[str, Any], *, pretrained: bool, images: Mapping[str, Any]) -> nn.Module:
        """A new model.

        Args:
            name: one of `architectures`.
            args: of the architecture. `num_classes`, `img_size` and `in_chans` mean the same in every family.
            pretrained: with its published weights.
            images: replaces entries of what its images are like, see `Description`.

        Raises:
            CheckpointError: published weights that cannot be had.
            VitrimError: arguments that the architecture does not take.
        """
        raise NotImplementedError

    def describe(self, model: nn.Module) -> Description:
        """What `build` needs to make this model again; `CheckpointError` where that is not known."""
        name = type(model).__name__.removeprefix("Reduced")
        raise CheckpointError(
            f"this {name} was not made by timm.create_model, so it cannot be rebuilt; make it with timm.create_model "
            "or vitrim.build_model, or write model.state_dict() with safetensors yourself"
        )

    def classifiers_of(self, name: str) -> tuple[str, ...]:
        """Names of the modules that give class logits in an architecture, before there is a model."""
        return ("head",)

    def trained_size(
        self, model: nn.Module, state: State, trained_at: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        """(height, width) of the images that weights were trained on; None where it is the model's own, or unknown.

        Args:
            model: of the same architecture.
            state: the weights.
            trained_at: the size, if it is known from elsewhere.

        Raises:
            CheckpointError: the weights leave open which size it was.
        """
        return None

    def fit_weights(
        self,
        model: nn.Module,
        state: State,
        trained_at: tuple[int, int] | None = None,
        *,
        resample_patches: bool = False,
    ) -> State:
        """Weights of the same architecture, possibly of another input size, in the names and shapes of this model.

        Args:
            model: the model.
            state: the weights; they stay as they are.
            trained_at: (height, width) of the images that they were trained on, where it is known.
            resample_patches: change the size of the patches too, if it differs.

        Raises:
            CheckpointError: they do not fit, or it is not known how their positions lie.
        """
        return state
