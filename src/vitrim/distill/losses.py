"""Distances between outputs of a student and a teacher, each a pure function of tensors.

Shapes: B images, K classes, k of them kept by a cache, C channels. `...` is any number of leading dimensions.
To add a feature loss, write the function under `@feature_loss`; it appears in the table and in every term.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tables import Table
from ..tokens.precision import wide

FeatureLoss = Callable[[Tensor, Tensor], Tensor]
LOSSES: Table[str, FeatureLoss] = Table("feature loss")


def feature_loss(function: FeatureLoss) -> FeatureLoss:
    """Enter a function of (student (..., C), target (..., C)) -> (...) in the table under its own name."""
    return LOSSES.enter(function.__name__, function)


@feature_loss
def mse(student: Tensor, target: Tensor) -> Tensor:
    """Mean over channels of the squared difference."""
    return (student - target).square().mean(-1)


@feature_loss
def cosine(student: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine of the angle."""
    return 1 - F.cosine_similarity(student, target, dim=-1)


@feature_loss
def smooth_l1(student: Tensor, target: Tensor) -> Tensor:
    """Mean over channels of the Huber loss with threshold 1."""
    return F.smooth_l1_loss(student, target, reduction="none").mean(-1)


def distance(student: Tensor, target: Tensor, loss: str, normalise: bool) -> Tensor:
    """A feature loss of vectors (..., C), of their directions only if `normalise`; returns (...)."""
    student, target = wide(student), wide(target)
    if normalise:
        student, target = F.normalize(student, dim=-1), F.normalize(target, dim=-1)
    return LOSSES.find(loss)(student, target)


def mean_where(value_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """Mean over the marked tokens of each image, then over images; an image without any counts as 0.

    All images have the same weight, however many of their tokens are marked, so that processes can share a batch.
    """
    number_B = mask_BM.sum(1).clamp(min=1)
    return ((value_BM * mask_BM).sum(1) / number_B).mean()


def soft_kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened predictions: sum over classes, mean over images (Hinton et al. 2015)."""
    log_q = F.log_softmax(wide(student_BK) / temperature, dim=1)
    log_p = F.log_softmax(wide(teacher_BK) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def coarse_kl(student_BK: Tensor, top_Bk: Tensor, index_Bk: Tensor, rest_B: Tensor, temperature: float) -> Tensor:
    """`soft_kl` where only the teacher's k largest logits are known; all other classes count as one event.

    `rest_B` is the logsumexp of the other logits divided by the temperature, so that no probability is lost or
    invented: this is the exact divergence of the coarser distributions, never above the full one.
    """
    log_q = F.log_softmax(wide(student_BK) / temperature, dim=1)
    others_B = log_q.scatter(1, index_Bk, float("-inf")).logsumexp(1)
    log_q = torch.cat([log_q.gather(1, index_Bk), others_B.unsqueeze(1)], dim=1)
    log_p = F.log_softmax(torch.cat([wide(top_Bk) / temperature, wide(rest_B).unsqueeze(1)], dim=1), dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
