"""Whether a file computes what the model computes, on images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.seeding import mix
from ..errors import DataError, VitrimError
from ..models import adapter_of, attached
from ..models.input_format import InputFormat
from ..tokens.precision import ROUNDING, rounding

BATCH = 32
"""Images per batch, after one that is alone."""
_NOT_FINITE = "the model gives values that are not finite, so that no file can be compared with it"
_NOISE, _DRAWS = 1e-5, 8
_MOST_UNDECIDED = 1 / 8


@dataclass(frozen=True)
class Agreement:
    """How closely a file follows the model.

    images, batch_sizes: what was compared.
    largest: largest difference of any output; `allowed` is the tolerance.
    undecided: images left out, since rounding decides which of their tokens stay, see `differing`.
    same_class: share of images with the same top class; None without classes.
    alike: whether the model gives all images the same output, so that agreement says little.
    """

    images: int
    batch_sizes: tuple[int, ...]
    largest: float
    allowed: float
    undecided: int = 0
    same_class: float | None = None
    alike: bool = False

    def text(self, quantised: bool = False) -> str:
        """One or two lines."""
        what = f"{self.images} image{'s' * (self.images > 1)} in batches of {' and '.join(map(str, self.batch_sizes))}"
        line = f"compared with PyTorch on {what}: "
        if quantised and self.same_class is not None:
            line += f"same top class for {self.same_class:.1%}, "
        line += f"largest difference {self.largest:.1e}"
        line += f" of outputs up to {self.scale:.1e}" if quantised else f", allowed {self.allowed:.1e}"
        if self.undecided:
            line += f"; {self.undecided} left out, where rounding decides which tokens stay"
        if self.alike:
            line += "\nthe model gives all these images the same output, so that equal outputs say little"
        return line

    @property
    def scale(self) -> float:
        """The largest output of the model, at least 1."""
        return self.allowed / ROUNDING


@torch.inference_mode()
def check_images(model: nn.Module, images: Tensor) -> None:
    """Before a file is made, raise where `compare` could not judge it.

    Raises:
        DataError: there are too few images, or they are not of the size that the file will take.
        VitrimError: the model gives values that are not finite.
    """
    _check_form(model, images)
    if not adapter_of(model).predict(model, images[:2]).isfinite().all():
        raise VitrimError(_NOT_FINITE)


def _check_form(model: nn.Module, images: Tensor) -> None:
    if len(images) < 2:
        raise DataError("two images are needed to compare a file at two batch sizes; give more")
    size = InputFormat.of(model).size
    if tuple(images.shape[1:]) != size:
        shapes = [" x ".join(map(str, one)) for one in (images.shape[1:], size)]
        raise DataError(f"the images are {shapes[0]}, but the file will take {shapes[1]}; give images of that size")


@torch.inference_mode()
def compare(model: nn.Module, served: nn.Module, images: Tensor, *, exact: bool = True) -> Agreement:
    """Run both on the first image alone, and on the others in batches.

    Args:
        model: in eval mode.
        served: the file, opened.
        images: (N, channels, height, width), N at least 2.
        exact: raise where they differ by more than the tolerance; else only say how closely they agree.

    Raises:
        DataError: there are too few images.
        VitrimError: the file does not compute what the model does.
    """
    _check_form(model, images)
    parts = [images[:1], *images[1:].split(BATCH)]
    predict = adapter_of(model).predict
    expected = torch.cat([predict(model, part) for part in parts])
    found = torch.cat([served(part.contiguous()) for part in parts])
    if not expected.isfinite().all():
        raise VitrimError(_NOT_FINITE)
    if found.shape != expected.shape:
        raise VitrimError(f"the file gives {tuple(found.shape)} where the model gives {tuple(expected.shape)}")
    allowed = rounding(expected)
    differences = (found - expected).abs().flatten(1).amax(1)
    differing = (~(differences <= allowed)).nonzero().flatten().tolist() if exact else []
    undecided = [row for row in differing if _undecided(model, images[row], expected[row], allowed)]
    if len(undecided) < len(differing) or len(undecided) > max(1, _MOST_UNDECIDED * len(images)):
        worst = float(differences[differing].max())
        raise VitrimError(
            f"the file differs from the model by {worst:.1e} on {len(differing)} of {len(images)} images, where "
            f"{allowed:.1e} is allowed; it was not kept"
        )
    rows = [row for row in range(len(images)) if row not in undecided]
    same = (found.argmax(1) == expected.argmax(1)).float().mean() if expected.shape[1] > 1 else None
    return Agreement(
        images=len(images),
        batch_sizes=(1, len(parts[1])),
        largest=float(differences[rows].max()) if rows else 0.0,
        allowed=allowed,
        undecided=len(undecided),
        same_class=None if same is None or not adapter_of(model).classifier(model).classes else float(same),
        alike=bool(((expected - expected[:1]).abs() <= allowed).all()),
    )


def _undecided(model: nn.Module, image: Tensor, expected: Tensor, allowed: float) -> bool:
    """Whether the model itself changes by more than the tolerance when the image changes by rounding.

    Two scores at the border of a cut can be so close that the order of a sum decides which token stays. No runtime can
    repeat such a choice, and none is wrong.
    """
    handle = attached(model)
    if handle is None or not handle.plan(training=False).cuts:
        return False
    noise = torch.randn(_DRAWS, *image.shape, generator=torch.Generator().manual_seed(mix("export", 0)))
    changed = adapter_of(model).predict(model, image + _NOISE * image.std() * noise)
    return bool(((changed - expected).abs() > allowed).any())
