"""The compensations of a super-network as a file: means, and the lower triangles of the factors, in float32."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.files.checkpoints import read_header, read_tensors
from ..models.widths.compensation import Compensation
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.sublayers import elastic
from .chain import hash_tensors


def write_compensations(compensations: Mapping[str, Compensation], path: Path, weights: str) -> None:
    """Write them for the super-network of weights with this hash."""
    tensors: dict[str, Tensor] = {}
    for name, each in compensations.items():
        tensors[f"{name}.mean"] = each.mean.float().cpu().contiguous()
        if each.factor is not None:
            tensors[f"{name}.factor"] = each.factor.float().cpu()[_lower(each.mean.numel())]
        if each.pairs is not None:
            tensors[f"{name}.pairs"] = each.pairs.float().cpu()[:, *_lower(each.pairs.shape[-1])].contiguous()
    save_file(tensors, path, metadata={"weights": weights, "digest": hash_tensors(tensors)})


def read_compensations(path: Path, model: nn.Module, weights: str) -> dict[str, Compensation]:
    """Read what `write_compensations` wrote for this model, whose weights have this hash.

    Raises:
        CheckpointError: a damaged file, or one of other weights.
    """
    try:
        metadata, tensors = read_header(path)[0], read_tensors(path)
    except CheckpointError:
        raise CheckpointError(f"{path} is damaged or cut short; stratify again") from None
    with elastic(model) as layers:
        sizes = {name: layer.last.in_features for name, layer in layers.items()}
        rotary = {name: layer for name, layer in layers.items() if isinstance(layer, ElasticValues)}
        heads = {name: (layer.num_heads, layer.pairs) for name, layer in rotary.items() if layer.vitrim_rule}
    wanted = {f"{name}.mean": n for name, n in sizes.items()}
    wanted |= {f"{name}.factor": n * (n + 1) // 2 for name, n in sizes.items()}
    wanted |= {f"{name}.pairs": number * n * (n + 1) // 2 for name, (number, n) in heads.items()}
    if metadata.get("weights") != weights or {name: tensor.numel() for name, tensor in tensors.items()} != wanted:
        raise CheckpointError(f"{path} belongs to other weights than those in its folder; stratify again")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds numbers that are not finite; stratify again")
    if metadata.get("digest") != hash_tensors(tensors):  # A flipped bit may leave numbers that are finite, and wrong.
        raise CheckpointError(f"{path} is damaged; stratify again")
    compensations: dict[str, Compensation] = {}
    for name, n in sizes.items():
        factor, pairs = torch.zeros(n, n), None
        factor[_lower(n)] = tensors[f"{name}.factor"]
        if name in heads:
            number, size = heads[name]
            pairs = torch.zeros(number, size, size)
            pairs[:, *_lower(size)] = tensors[f"{name}.pairs"].view(number, -1)
        compensations[name] = Compensation(tensors[f"{name}.mean"], factor, pairs)
    return compensations


def _lower(n: int) -> tuple[Tensor, Tensor]:
    """Indices of the lower triangle of an (n, n) matrix, row by row."""
    rows, columns = torch.tril_indices(n, n)
    return rows, columns
