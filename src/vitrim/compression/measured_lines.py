"""Lines of a certificate, made of what was measured: times, closeness to the given model, and accuracy."""

from ..errors import VitrimError
from ..measure.intervals import of_drop, of_mean, of_share
from .certificate import Line
from .fidelity import Closeness, Fidelity
from .goal import Goal
from .timing import milliseconds, time_ratio


def time_lines(times: list[tuple[float, float, float]], goal: Goal | None = None) -> list[Line]:
    """The ratio of times, and milliseconds, of these sessions, with what was asked of them."""
    ms, given = milliseconds(times)
    asked = goal.most if goal is not None and goal.kind == "latency" else None
    fraction = goal is not None and goal.fraction
    return [
        Line.of_interval("time", time_ratio(times), asked=asked if fraction else None, of=1.0, number=len(times)),
        Line.of_interval("ms", ms, asked=None if fraction else asked, of=given, number=len(times)),
    ]


def fidelity_lines(found: Closeness) -> list[Line]:
    """Divergence and agreement on some images, with intervals."""
    number = len(found.divergence)
    lines = [Line.of_interval("divergence", of_mean(found.divergence.numpy()), number=number)]
    if found.same is not None:
        share = of_share(int(found.same.sum()), number)
        lines.append(Line.of_interval("agreement", share, number=number))
    return lines


def compared_lines(fidelity: Fidelity, found: Closeness) -> list[Line]:
    """How close a model is to the given one, and its accuracy where the images have classes."""
    lines = fidelity_lines(found)
    return lines if fidelity.right(found.outputs) is None else [*lines, *accuracy_lines(fidelity, found, None)]


def accuracy_lines(fidelity: Fidelity, found: Closeness, max_drop: float | None) -> list[Line]:
    """Accuracy, and how much of it is lost, on images with classes."""
    before, after = fidelity.right(fidelity.reference), fidelity.right(found.outputs)
    if before is None or after is None:
        raise VitrimError("this model has no classifier, so it has no accuracy; leave val out")
    share = of_share(int(after.sum()), len(fidelity))
    drop = of_drop(before.numpy(), after.numpy())
    return [
        Line.of_interval("accuracy", share, of=before.double().mean().item(), number=len(fidelity)),
        Line.of_interval("drop", drop, asked=max_drop, number=len(fidelity)),
    ]
