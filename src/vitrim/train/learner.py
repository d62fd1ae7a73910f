"""What a recipe builds to learn with: networks, objective and mixing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.specs import AugmentSpec
from ..distill import Distiller, Labels, Teacher, Terms
from ..errors import ClassCountError, DistillError, RecipeError, VitrimError
from ..models import adapter_of, attach, attached, build_model, find_adapter
from ..models.files.build import check_name, is_architecture
from ..models.files.classes import classes_of, other_classes
from ..models.files.rebuild import describe
from ..models.input_format import InputFormat
from ..tokens import Constant, Reduction, render
from .figures import check_figures
from .recipe import Recipe
from .specs import ModelSpec

NEW_HEAD = "set model.reset_head to start a new classifier"


def prepare_model(
    spec: ModelSpec, num_classes: int | None, image_size: int | None = None, otherwise: str = NEW_HEAD,
) -> nn.Module:  # fmt: skip
    """Build the network of a recipe; its classifier and input size fit the data unless the recipe says otherwise.

    Raises:
        VitrimError: it cannot be built; `otherwise` is what to do where its weights are of other classes.
    """
    args = {"num_classes": num_classes} | ({"img_size": image_size} if image_size else {}) | spec.args
    size = spec.checkpoint_size
    try:
        return build_model(
            spec.name, checkpoint=spec.checkpoint, pretrained=spec.pretrained, reset_head=spec.reset_head,
            checkpoint_size=None if size is None else (size[0], size[1]), **args,
        )  # fmt: skip
    except ClassCountError as error:
        raise ClassCountError(error.fact, otherwise) from None


def reduction_of(recipe: Recipe) -> Reduction | None:
    """The reduction of a recipe, None where it has none.

    Raises:
        RecipeError: its curriculum starts after the last epoch, or waits for figures that no epoch will have.
    """
    if recipe.reduction is None:
        return None
    reduction = Reduction.parse(recipe.reduction, recipe.phase)
    if reduction.curriculum.reads and recipe.data.holdout == 0:
        raise RecipeError(
            f"{render(reduction.curriculum)} follows figures on held-out images, but data.holdout is 0; set it, for "
            "example to 0.1, or choose another curriculum"
        )
    if not reduction.curriculum.acts_within(recipe.epochs):
        raise RecipeError(
            f"{render(reduction.curriculum)} never acts within {recipe.epochs} epochs, which count from 0; "
            "let it start earlier, train for more epochs, or leave the reduction out"
        )
    return reduction


def terms_of(recipe: Recipe) -> Terms:
    """The objective of a recipe; where it distils nothing, the loss on labels."""
    return Terms.parse("Labels()" if recipe.distill is None else recipe.distill)


def learns_labels(recipe: Recipe) -> bool:
    """Whether the labels of the images are what a recipe learns, alone or among others."""
    return recipe.elastic is not None or any(isinstance(term, Labels) for term in terms_of(recipe).terms)


def prepare_student(recipe: Recipe, classes: Sequence[str]) -> nn.Module:
    """The network to train on images of these classes, with the recipe's reduction in place of a saved one.

    A reduction that was saved with the network, and that the recipe does not replace, acts in full from the start.

    Raises:
        RecipeError: labels of the images are not classes of the network, or its classifier was trained on others.
        UnsupportedModelError: no adapter knows such networks.
    """
    keeps = "" if learns_labels(recipe) else ", or labels to false to keep this one and learn from the teacher alone"
    otherwise = NEW_HEAD + keeps
    number = len(classes) if recipe.labels else None
    student = prepare_model(recipe.model, number, recipe.data.image_size, otherwise)
    adapter = find_adapter(student)
    head = adapter.classifier(student)
    if recipe.labels and head.classes:
        if head.classes != len(classes) and learns_labels(recipe):
            raise RecipeError(
                f"the network has {head.classes} classes, the images have {len(classes)}; leave num_classes out of "
                "model.args, and for weights of other classes set model.reset_head"
            )
        if fault := _other_classes(recipe.model, classes):
            raise RecipeError(f"{fault}; {otherwise}")
    reduction, brought = reduction_of(recipe), attached(student)
    if reduction is None and brought is not None and brought.reduction is not None:
        reduction = replace(brought.reduction, curriculum=Constant())
    if reduction is not None:
        if brought is not None:
            brought.remove()
        attach(student, reduction)
        check_figures(student, reduction.curriculum.reads)
    if recipe.checkpointing:
        adapter.recompute(student)
    describe(student)  # What could not be saved is refused now, and not after the first epoch.
    if recipe.optim.freeze:
        wanted = terms_of(recipe).wanted(of_teacher=False)
        if not wanted.predicts:
            raise RecipeError("optim.freeze trains the classifier alone, which no term of distill reads; leave it out")
        student.requires_grad_(False)
        for name in head.names:
            student.get_submodule(name).requires_grad_(True)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise VitrimError("optim.freeze trains the classifier alone, but this model has none")
    return student


def prepare_teacher(
    spec: ModelSpec, seen: InputFormat, classes: Sequence[str] | None = None, *, predicts: bool = True
) -> Teacher:
    """The teacher of a recipe, dense and frozen, for images that arrive in the student's format.

    Args:
        spec: which network.
        seen: the student's format.
        classes: what its logits must stand for; None where that is not known.
        predicts: whether its logits are read.

    Raises:
        DistillError: it cannot be built, has no weights to teach from, or a classifier that has learnt nothing; it
            takes other channels than arrive, or knows other classes.
    """
    if spec.reset_head and predicts:
        raise DistillError(
            "teacher.reset_head starts a classifier that has learnt nothing; leave it out, or teach by terms on "
            "features"
        )
    try:
        check_name(spec.name)
        bare = is_architecture(spec.name) and spec.checkpoint is None
        if bare and not spec.pretrained:
            raise DistillError(f"{spec.name} has learnt nothing; set teacher.checkpoint or teacher.pretrained")
        model = prepare_model(spec, None, otherwise="leave num_classes out of teacher.args")
    except VitrimError as error:
        raise DistillError(f"no teacher: {error}") from None
    head = adapter_of(model).classifier(model)
    if predicts and bare and head.classes not in (0, head.published):
        raise DistillError(
            f"the teacher {spec.name} has learnt {head.published} classes, so a classifier of {head.classes} has "
            "learnt nothing; leave num_classes out of teacher.args, or teach by terms on features"
        )
    if predicts and (fault := _other_classes(spec, classes)):
        raise DistillError(f"{fault}; teach by terms on features, or train the teacher on these images")
    if (brought := attached(model)) is not None:
        brought.remove()
    own = InputFormat.of(model)
    if seen.size[0] not in (1, own.size[0]):
        raise DistillError(f"the teacher {spec.name} takes images of {own.size[0]} channels, not of {seen.size[0]}")
    return Teacher(
        model, input_size=own.size[1:], mean=own.mean, std=own.std, images_mean=seen.mean, images_std=seen.std
    )


def prepare_learner(recipe: Recipe, student: nn.Module, classes: Sequence[str] | None = None) -> Distiller:
    """Student, teacher and objective in one module; `classes` of the images."""
    seen, terms, teacher = InputFormat.of(student, recipe.data.image_size), terms_of(recipe), None
    if recipe.teacher is not None:
        predicts = terms.wanted(of_teacher=True).predicts
        teacher = prepare_teacher(recipe.teacher, seen, classes_of_student(recipe, classes), predicts=predicts)
    criterion = partial(cross_entropy, smoothing=recipe.augment.smoothing)
    return Distiller(student, teacher, terms, criterion, recipe.labels)


def classes_of_student(recipe: Recipe, classes: Sequence[str] | None) -> Sequence[str] | None:
    """What the classifier of the student stands for: the classes of the images, or its own; None where not known."""
    if recipe.labels:
        return classes
    spec = recipe.model if not recipe.model.reset_head else recipe.teacher
    return None if spec is None else classes_of(spec.checkpoint or spec.name)


def _other_classes(spec: ModelSpec, classes: Sequence[str] | None) -> str:
    return "" if classes is None or spec.reset_head else other_classes(spec.checkpoint or spec.name, classes)


def with_student(learner: Distiller, student: nn.Module) -> Distiller:
    """The same objective, teacher and projections on another student, such as the average of its weights."""
    other = Distiller(student, learner.teacher or learner.known, learner.terms, learner.criterion, learner.labels)
    other.projections = learner.projections
    return other


def cross_entropy(logits_BK: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The loss on classes (B,), or on their shares (B, K) where images are mixed: Mixup has smoothed those already."""
    return F.cross_entropy(logits_BK, targets, label_smoothing=0.0 if targets.ndim == 2 else smoothing)


def make_mixup(spec: AugmentSpec, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup and CutMix of whole batches, in pairs; None where both are off.

    It makes images (B, channels, H, W) and shares of classes (B, K) out of images and classes (B,). Of an odd number
    of images, the first stays as it is.
    """
    if spec.mixup == 0 and spec.cutmix == 0:
        return None
    mixup = Mixup(spec.mixup, spec.cutmix, prob=spec.mix_prob, label_smoothing=spec.smoothing, num_classes=num_classes)

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        num = len(images)
        twice = num % 2  # timm mixes the first image with the last, and so on: here the first with itself.
        images, shares = mixup(torch.cat([images, images[:twice]]), torch.cat([labels, labels[:twice]]))
        return images[:num], shares[:num]

    return mixed
