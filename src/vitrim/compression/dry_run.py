"""What a search would try, and how long it would take, found from the sizes and one forward pass."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..measure.columns import columns
from ..measure.table import Table
from ..models import adapter_of, find_adapter
from ..models.evaluating import evaluating
from ..notation import render
from .candidates import first_shapes, reducers
from .fidelity import Fidelity
from .images import Parts, Pictures, Sizes
from .job import Job
from .networks import Networks
from .progress import duration
from .request import Request
from .sampler_space import FIRST_STEPS, SHARES
from .work import first_candidates, search_units

LESSON = 3
"""Work of learning from an image, in forward passes of the network that learns."""
_COLUMNS = columns("what", "number", "values")


@dataclass(frozen=True)
class Outlook:
    """What would be tried, as a table, and about how many seconds that would take."""

    table: Table
    seconds: float


@torch.inference_mode()
def dry_run(model: nn.Module, request: Request, parts: Sizes, images: Tensor, lessons: int = 0) -> Outlook:
    """List what `compress` would try for a model and images like these; searches nothing.

    Args:
        model: the given model, where the search would run.
        request: what is asked for.
        parts: numbers of images.
        images: some of them, to measure the time of a forward pass.
        lessons: images that the answer learns from afterwards, over all epochs.
    """
    geometry = find_adapter(model).geometry(model)
    tokens, width = "tokens" in request.using, "width" in request.using
    methods = reducers(geometry.has_cls) if tokens else []
    shapes = first_shapes(geometry.depth) if tokens else []
    widths = [step / SHARES for step in (FIRST_STEPS if tokens else FIRST_STEPS[-1:])] if width else [0.0]
    number = first_candidates(len(methods), geometry.depth, width)
    left = min(1.0, request.goal.most) if request.goal.fraction else 0.5
    units = search_units(request, parts, geometry, len(methods)) + lessons * (1 + LESSON * left)
    seconds = units * _seconds_per_image(model, images)
    rows = [
        {"what": "reducers", "number": len(methods), "values": ", ".join(map(render, methods)) or "-"},
        {"what": "shapes of schedules", "number": len(shapes), "values": ", ".join(map(str, shapes)) or "-"},
        {"what": "shares of the width", "number": len(widths), "values": ", ".join(f"{share:g}" for share in widths)},
        {
            "what": "candidates of the first round, at most",
            "number": number,
            "values": "without those that cannot meet the budget, or do the same as another",
        },
        {
            "what": "candidates of the sampler",
            "number": request.trials if tokens else 0,
            "values": "around the best ones",
        },
        {"what": "images to fit widths", "number": parts.fit, "values": "-"},
        {"what": "images to compare candidates", "number": parts.judge, "values": "-"},
        {"what": "images for the certificate", "number": parts.unseen, "values": "-"},
    ]
    rows += [{"what": "images to learn from afterwards", "number": lessons, "values": "-"}] if lessons else []
    notes = [f"About {duration(seconds)} here, at the speed of one forward pass."]
    return Outlook(Table(f"Dry run: {request.goal}", _COLUMNS, rows, notes=notes), seconds)


def out_of_reach(model: nn.Module, request: Request, images: Pictures) -> list[str]:
    """What a search would say before it begins, such as that no candidate meets the budget; nothing of times.

    Args:
        model, request: see `dry_run`.
        images: some, to order widths by.
    """
    if request.goal.kind == "latency":  # Times of blocks take minutes.
        return []
    job = Job(model, request, Parts(images, images, images), next(model.parameters()).device, lambda line: None)
    fidelity, before = Fidelity(job.original, images, job.device), len(job.notes)
    if "tokens" in request.using:
        job.search(Networks(job.original, None, []), fidelity)
        if len(job.notes) == before:
            return job.notes
        del job.notes[before:]
    job.search(Networks(job.original, job.supernet(), []), fidelity)
    return job.notes


def _seconds_per_image(model: nn.Module, images: Tensor) -> float:
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    times: list[float] = []
    with evaluating(model):
        for _ in range(3):
            start = time.perf_counter()
            float(adapter_of(model).predict(model, images).float().sum())  # Waits for the device.
            times.append(time.perf_counter() - start)
    return min(times) / len(images)
