"""A linear segmentation head on the frozen features of patches: one layer from a patch's token to its pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.measure.intervals import LEVEL, RESAMPLES, Interval, of_mean

CLASSES = 11
"""The background, and ten digits."""
EPOCHS, BATCH, RATE = 16, 64, 0.1


@dataclass(frozen=True)
class Scores:
    """What a head gets right of each image.

    intersection, union: of what is found and what is there, in pixels by class, (images, CLASSES).
    right: share of all pixels, (images,).
    """

    intersection: np.ndarray
    union: np.ndarray
    right: np.ndarray

    @property
    def mean_iou(self) -> float:
        """Intersection over union, each added up over all images, on average over the classes."""
        return float((self.intersection.sum(0) / self.union.sum(0)).mean())

    @property
    def accuracy(self) -> float:
        """The share of all pixels."""
        return float(self.right.mean())

    def iou_lost(self, other: "Scores", seed: int = 0) -> Interval:
        """By how much the mean IoU of `other` is lower on the same images: percentile bootstrap over images."""
        number = len(self.right)
        rows = np.random.default_rng(seed).integers(number, size=(RESAMPLES, number))
        times = np.stack([np.bincount(row, minlength=number) for row in rows])

        def resampled(one: Scores) -> np.ndarray:
            return ((times @ one.intersection) / (times @ one.union)).mean(1)

        low, high = np.quantile(resampled(self) - resampled(other), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(self.mean_iou - other.mean_iou, float(low), float(high))

    def accuracy_lost(self, other: "Scores") -> Interval:
        """By how much the share of right pixels of `other` is lower, paired by image."""
        return of_mean(self.right - other.right)


def patches_of(masks: np.ndarray, side: int) -> Tensor:
    """Pixels of masks (images, height, width) by patch: (images, patches, side * side), of int64."""
    rows = torch.from_numpy(masks).long().unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return rows.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def trained(features: Tensor, pixels: Tensor, seed: int = 0) -> nn.Linear:
    """A head for features (images, patches, C) and the classes of their pixels (images, patches, S).

    It learns on features without correlation, where gradient descent comes to its end in few epochs; what makes them so
    is linear too and becomes part of the head.
    """
    torch.manual_seed(seed)
    mean, apart = _decorrelation(features.flatten(0, 1))
    learner, rows_of = nn.Linear(features.shape[2], pixels.shape[2] * CLASSES), (features - mean) @ apart
    steps = EPOCHS * (len(features) // BATCH)
    optimizer = torch.optim.Adam(learner.parameters(), lr=RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features)).split(BATCH)[: len(features) // BATCH]:
            logits = learner(rows_of[rows]).unflatten(2, (-1, CLASSES))
            loss = F.cross_entropy(logits.flatten(0, 2), pixels[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    head = nn.Linear(features.shape[2], learner.out_features).requires_grad_(False)
    head.weight.copy_(learner.weight @ apart.T)
    head.bias.copy_(learner.bias - head.weight @ mean)
    return head


def _decorrelation(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,), and a matrix (C, C) after which rows without their mean have the covariance of noise."""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    return mean, vectors / values.clamp(min=1e-4 * values.max()).sqrt()


def scored(head: nn.Linear, features: Tensor, pixels: Tensor) -> Scores:
    """What the head gets right of these images."""
    found = head(features).unflatten(2, (-1, CLASSES)).argmax(3).flatten(1)
    target = pixels.flatten(1)
    seen, there = F.one_hot(found, CLASSES).bool(), F.one_hot(target, CLASSES).bool()
    both, either = (seen & there).sum(1), (seen | there).sum(1)
    return Scores(both.numpy(), either.numpy(), (found == target).double().mean(1).numpy())
