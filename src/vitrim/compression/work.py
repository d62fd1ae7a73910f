"""How much work a search is, in images of the given model: one unit is a forward pass of one image."""

from ..elastic.measured_chain import BUDGETS
from ..elastic.supernet import default_rounds, images_probed
from ..models.adapter import Geometry
from .candidates import first_shapes, method_shapes
from .goal import Goal
from .images import Sizes
from .request import Request
from .rounds import LAST, METHODS, PURE, ROUNDS, images_of_round
from .sampler_space import FIRST_STEPS, METHOD_STEPS
from .timing import WORK as TIMING

ORDERING, PROBING, CHAINS = 6.5, 0.5 * 3 * 2 * 0.9, 3
"""Ordering the units, for each image; measuring the sub-layers of one block at three widths each, where half of the
network is run again; and chains that are compared with each other at several sizes."""


def ordering_units(goal: Goal, depth: int, images: int) -> float:
    """Work of ordering the widths and of measuring a chain."""
    saving = goal.largest_saving
    probed = images_probed(images)
    compared = CHAINS * BUDGETS * (1 - saving / 2)
    return ORDERING * images + (default_rounds(saving) * PROBING * depth + compared) * probed


def fit_units(images: int) -> float:
    """Work of fitting one cut network."""
    return 5.0 * images


def search_units(request: Request, parts: Sizes, geometry: Geometry, methods: int) -> float:
    """Work of a whole search, somewhat more than it will be; without what measures times of blocks.

    Args:
        request: what is asked for.
        parts: numbers of images.
        geometry: of the given model.
        methods: reducers that are tried.
    """
    width = "width" in request.using
    left = min(1.0, request.goal.most) if request.goal.fraction else 0.5
    units = parts.judge + (1 + 3 * left) * parts.unseen + TIMING * (1 + left) * request.batch_size
    units += judging_units(first_candidates(methods, geometry.depth, width), left, parts.judge)
    if methods:
        units += request.trials * images_of_round(parts.judge, ROUNDS[-1][0]) * left
    if width:
        units += ordering_units(request.goal, geometry.depth, parts.fit)
        units += (len(FIRST_STEPS) - 1 + bool(methods)) * fit_units(parts.fit)
    return units


def first_candidates(methods: int, depth: int, width: bool) -> int:
    """How many candidates the first round has at most: a few of every reducer, many of the best, and width alone."""
    steps, early = (len(FIRST_STEPS) - 1, len(METHOD_STEPS)) if width else (1, 1)
    every = 0 if methods <= METHODS else methods * early * len(method_shapes(depth))
    return every + min(methods, METHODS) * steps * len(first_shapes(depth)) + int(width)


def judging_units(number: int, each: float, images: int) -> float:
    """Work of comparing candidates in all rounds.

    Args:
        number: candidates of the first round.
        each: work of one image in the mean candidate.
        images: that the last round sees.
    """
    seen, total = 0, 0.0
    for part, stay in ROUNDS:
        if number <= LAST:
            break
        now = images_of_round(images, part)
        total += number * (now - seen) * each
        number, seen = max(LAST, number // stay), now
    return total + min(number, LAST + PURE + 1) * (images - seen) * each
