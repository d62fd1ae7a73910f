"""How much an error in each token counts, and which images are held out."""

import torch
from torch import Tensor

from ..models.widths.compensation import Moments
from ..tokens.precision import wide


def add_weighted(moments: Moments, held_out: Moments, f_BNA: Tensor, g_BNA: Tensor) -> None:
    """Add activations of images, each token with its weight, see `token_weights`; every fourth image is held out."""
    device = moments.weight.device
    f_BNA, weight_BN = wide(f_BNA.to(device)), token_weights(g_BNA.to(device))
    apart = held_out_images(len(f_BNA), device)
    for sums, images in ((moments, ~apart), (held_out, apart)):
        sums.add(f_BNA[images].flatten(0, 1), weight_BN[images].flatten())


def held_out_images(number: int, device: torch.device) -> Tensor:
    """Which images of a batch are held out (B,): every fourth."""
    return torch.arange(number, device=device) % 4 == 3


def token_weights(g_BNA: Tensor) -> Tensor:
    """How much an error in each token counts (B, N): 1, plus its squared gradient over the mean of its image.

    To first order an error counts by its squared gradient; with equal weights alone, patch tokens would dominate, which
    hardly matter to a head that reads CLS. But few tokens have a large gradient, too few for a regression of many units
    on few images, and the others steer later attention: hence the 1. Gradients are compared within one image, so that
    confident images count like the others and batches of any size give the same sums.
    """
    size = wide(g_BNA).square().sum(-1)
    return 1 + size / size.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
