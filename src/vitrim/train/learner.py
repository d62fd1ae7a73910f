"""What a recipe builds to learn with: network, loss, mixing, optimiser and learning-rate schedule, all timm's."""

from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import VitrimError
from ..models import attach, attached, build_model
from ..tokens import Reduction
from .recipe import AugmentSpec, ModelSpec, OptimSpec, Recipe


class Learnt(NamedTuple):
    """loss: a scalar with its graph. terms: its parts, detached. logits: (B, classes), detached, None without head."""

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None


class Learner(nn.Module):
    """Network and loss in one module, so that a step is one forward call whatever wraps it."""

    def __init__(self, student: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.student, self.smoothing = student, smoothing

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Learnt:
        """The loss of a batch.

        Args:
            images: (B, C, H, W).
            targets: classes (B,), or their shares (B, classes) where images are mixed.
            progress: fraction of training that has passed, for losses that change.
        """
        logits = self.student(images)
        soft = targets.ndim == 2  # Mixup has smoothed already.
        loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if soft else self.smoothing)
        return Learnt(loss, {}, logits.detach())


def prepare_model(spec: ModelSpec, num_classes: int | None, image_size: int | None = None) -> nn.Module:
    """Build the network of a recipe; its classifier and input size fit the data unless the recipe says otherwise."""
    args = {"num_classes": num_classes} | ({"img_size": image_size} if image_size else {}) | spec.args
    return build_model(
        spec.name, checkpoint=spec.checkpoint, pretrained=spec.pretrained, reset_head=spec.reset_head, **args
    )


def prepare_student(recipe: Recipe, num_classes: int) -> nn.Module:
    """The network to train, with the recipe's reduction in place of one it brought along."""
    student = prepare_model(recipe.model, num_classes, recipe.data.image_size)
    if recipe.reduction is not None:
        if (brought := attached(student)) is not None:
            brought.remove()
        attach(student, Reduction.parse(recipe.reduction, recipe.phase))
    if recipe.checkpointing:
        student.set_grad_checkpointing()
    if recipe.optim.freeze:
        student.requires_grad_(False)
        head = student.get_classifier()
        for module in head if isinstance(head, tuple) else (head,):
            module.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise VitrimError("optim.freeze trains the classifier alone, but this model has none")
    return student


def make_mixup(spec: AugmentSpec, num_classes: int) -> Mixup | None:
    """Mixup and CutMix of whole batches; None where both are off."""
    if spec.mixup == 0 and spec.cutmix == 0:
        return None
    return Mixup(
        spec.mixup, spec.cutmix, prob=spec.mix_prob, label_smoothing=spec.smoothing, num_classes=num_classes
    )  # fmt: skip


def make_optimizer(student: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """timm's optimiser over what is not frozen, with its rules for weight decay and layer decay."""
    try:
        return create_optimizer_v2(
            student, spec.name, lr=spec.lr, weight_decay=spec.weight_decay, layer_decay=spec.layer_decay
        )
    except (ValueError, AssertionError) as error:
        raise VitrimError(f"cannot make optimiser {spec.name!r}: {error}") from None


def make_scheduler(
    optimizer: torch.optim.Optimizer, spec: OptimSpec, epochs: int, updates_per_epoch: int
) -> CosineLRScheduler:
    """Per update: a straight line from lr / 100 over the warm-up epochs, then half a cosine to min_lr at the end."""
    return CosineLRScheduler(
        optimizer, t_initial=epochs * updates_per_epoch, lr_min=spec.min_lr, t_in_epochs=False,
        warmup_t=round(spec.warmup_epochs * updates_per_epoch), warmup_lr_init=spec.lr / 100,
    )  # fmt: skip
