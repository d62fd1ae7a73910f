"""Order hidden units by backward elimination: each step removes those that the others can best replace.

This is Optimal Brain Surgeon (Hassibi & Stork 1993) for whole inputs of a linear projection: without unit j, and with
the best new weights of the others, the squared error grows by |w_j|^2 / [S^-1]_jj, where S is the covariance of the
units. An order by the size of each unit alone would keep several units that carry the same information.
"""

import torch
from torch import Tensor

from ..tokens.precision import exact

PARTS = 64
"""In how many rounds all units are eliminated; a round removes several at once, which costs little accuracy."""


def elimination_order(weight: Tensor, covariance: Tensor) -> Tensor:
    """Units (n,) in the order of their worth, best first.

    Args:
        weight: of the projection that follows the units (C, n).
        covariance: of the units (n, n), positive definite.
    """
    weight, inverse = exact(weight), torch.linalg.inv(exact(covariance))
    alive, lost = torch.arange(weight.shape[1], device=weight.device), []
    most = -(-len(alive) // PARTS)
    while len(alive):
        rise = weight.square().sum(0) / inverse.diagonal()
        order = rise.argsort(stable=True)
        gone, stay = order[:most], order[most:].sort().values
        lost.append(alive[gone])
        change = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        weight = weight[:, stay] - weight[:, gone] @ change
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ change
        alive = alive[stay]
    return torch.cat(lost).flip(0)
