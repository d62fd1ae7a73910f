"""One budget in, a cheaper model and a certificate out: `vitrim.compress`."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..data.batches import Images
from ..elastic.probing import check_pixels
from ..errors import VitrimError
from ..models import num_classes
from .compressed import Compressed
from .goal import Goal, Part, check_using
from .images import MOST_UNSEEN, divide, gather
from .job import Job
from .networks import device_of
from .request import MOST_IMAGES, Request, check_model, device_named


def compress(
    model: nn.Module,
    images: Images,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    val: Images | None = None,
    max_drop: float | None = None,
    using: Sequence[Part] = ("tokens", "width"),
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    compile: bool = False,
    num_images: int = MOST_IMAGES,
    trials: int = 12,
    say: Callable[[str], None] = print,
) -> Compressed:
    """The cheaper model within one budget that stays closest to the given one; needs neither labels nor training.

    Args:
        model: any model that an adapter supports, without a reduction attached; it is not changed.
        images: images as the model takes them: a tensor, a `Dataset`, a shuffled `DataLoader`, or batches; 512 or more
            if possible. Half of them fit narrower networks, the others compare candidates and measure the answer.
        macs: most multiply-accumulates per image, attention products included.
        params: most parameters; width alone is cut then.
        latency: longest time of one batch in milliseconds; write "0.5ms" for half a millisecond.
        val: images with their classes, on which the certificate states the loss of accuracy; used for nothing else, and
            at most 5,000 of them.
        max_drop: largest loss of accuracy, such as 0.01; only the certificate depends on it.
        using: what may be reduced.
        batch_size, device, dtype, compile: for which times are measured. The search runs on `device` too; by default
            where the model is.
        num_images: how many of the images to use at most.
        trials: candidates that the sampler proposes after the first rounds.
        say: called with lines for the user.

    A number in (0, 1] is a fraction of what the given model needs. A budget that cannot be reached gives the nearest
    model that can be, and a certificate that says so.

    Raises:
        VitrimError: not exactly one budget, one that the model meets as it is, an impossible option, or a model in
            which nothing can be reduced.
        UnsupportedModelError: no adapter knows the model.
        DataError: too few images, of another size than the model takes, or with labels that are not classes of it.
    """
    goal = Goal.of(macs, params, latency)
    request = Request(goal, check_using(using, goal), batch_size, dtype, compile, num_images, trials)
    if max_drop is not None and (val is None or not 0 <= max_drop <= 1):
        raise VitrimError("max_drop is a fraction in [0, 1], such as 0.01, and needs val, images with their classes")
    size = check_model(model, goal)
    place = device_of(model) if device is None else device_named(device)
    request.check_device(place)
    if val is not None and num_classes(model) < 2:
        raise VitrimError("this model has no classifier, so it has no accuracy; leave val out")
    labelled = None if val is None else gather(val, size, MOST_UNSEEN, "val", num_classes(model))
    pictures = gather(images, size, num_images)
    check_pixels(model, pictures.images)
    parts = divide(pictures, "width" in request.using, labelled)
    return Job(model, request, parts, place, say).run(max_drop, labelled=labelled is not None)
