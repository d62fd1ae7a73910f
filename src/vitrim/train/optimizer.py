"""The optimiser of a recipe, and its learning rate."""

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ..data.quiet import quiet
from ..errors import VitrimError
from .specs import OptimSpec


def make_optimizer(student: nn.Module, spec: OptimSpec, projections: nn.Module | None = None) -> torch.optim.Optimizer:
    """timm's optimiser over what is not frozen, with its rules for weight decay and layer decay.

    Projections of a distillation are not layers of the student: they learn at the full rate.
    """
    try:
        optimizer = create_optimizer_v2(
            student, spec.name, lr=spec.lr, weight_decay=spec.weight_decay, layer_decay=spec.layer_decay
        )
    except (ValueError, AssertionError) as error:
        raise VitrimError(f"cannot make optimiser {spec.name!r}: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        raise VitrimError(f"the optimiser {spec.name!r} needs second derivatives, which training does not take")
    for group in param_groups_weight_decay(projections or nn.Identity(), spec.weight_decay):
        if group["params"]:
            optimizer.add_param_group(group)
    return optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer, spec: OptimSpec, epochs: int, updates_per_epoch: int
) -> CosineLRScheduler:
    """Per update: a straight line from lr / 100 to lr over the warm-up epochs, then half a cosine from lr to min_lr.

    The cosine begins where the warm-up ends. Without `warmup_prefix`, timm lets it begin with the run: after a warm-up
    over half of the epochs the rate would fall at once to half of lr.
    """
    total, warmup = epochs * updates_per_epoch, round(spec.warmup_epochs * updates_per_epoch)
    with quiet("timm.scheduler"):  # timm warns of a cosine of a single update, which stays at lr.
        return CosineLRScheduler(
            optimizer, t_initial=max(1, total - warmup), lr_min=spec.min_lr, t_in_epochs=False,
            warmup_t=warmup, warmup_lr_init=spec.lr / 100, warmup_prefix=True,
        )  # fmt: skip
