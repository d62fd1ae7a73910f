"""A super-network: one set of ordered weights, and the chain of every smaller network inside it.

`stratify` makes one without training, from unlabelled images, in minutes (SKD's WPAC, with importance from the same
pass); training it further (PIAD) is in `piad.py`.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, VitrimError
from ..models import attached
from ..models.build import saved_folder
from ..models.store import load, save_with
from ..models.sublayers import Kind, elastic
from ..output import recover
from .chain import GROUPS, Chain, hash_of, start_chain
from .extract import choose, cut
from .growth import grow, grow_evenly
from .importance import sensitivities
from .probing import Batch, batches_in, check_counts, images_of
from .sampler import narrowed
from .wpac import wpac

CHAIN, MEANS = "chain.json", "means.safetensors"


@dataclass(frozen=True)
class SuperNet:
    """The full network with its units in order, its chain, and the means that compensate for removed units.

    means: None after training with PIAD, where sub-networks were trained without compensation.
    """

    model: nn.Module
    chain: Chain
    means: Mapping[str, Tensor] | None = None

    def extract(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        latency: float | str | None = None,
        compensate: bool = True,
    ) -> nn.Module:
        """The largest sub-network within one budget, as an independent model in eval mode; needs no training.

        Args:
            macs: most multiply-accumulates per image, attention products included.
            params: most parameters.
            latency: longest forward pass at batch size 1, in milliseconds, measured where the model is; "0.5ms" where
                that is not more than 1.
            compensate: add the mean contribution of removed units to the biases, where the means are known: not after
                training as a super-network.

        Any number in (0, 1] is a fraction of the full network's cost.

        Raises:
            VitrimError: not exactly one budget, or one that not even the smallest network meets.
        """
        index = choose(self.model, self.chain, macs=macs, params=params, latency=latency)
        return self.cut(index, compensate)

    def cut(self, index: int, compensate: bool = True) -> nn.Module:
        """Sub-network `index` of the chain as an independent model (0: full, -1: smallest), see `extract`."""
        return cut(self.model, self.chain, index, self.means if compensate else None)

    @contextmanager
    def at(self, index: int) -> Iterator[nn.Module]:
        """Run the super-network itself as sub-network `index`, without compensation, while this is entered."""
        with narrowed(self.model, self.chain.widths(index)):
            yield self.model

    def save(self, folder: str | Path, *, overwrite: bool = False, **extra: Any) -> Path:
        """Write weights, chain and means into one folder; `vitrim.load` reads it as the full model.

        Args:
            folder: made if it does not exist.
            overwrite: replace a model that is there already.
            extra: kept with the model, see `vitrim.save`.
        """
        chain = replace(self.chain, weights=hash_of(self.model))

        def write(staged: Path) -> None:
            (staged / CHAIN).write_text(chain.to_json() + "\n", encoding="utf-8")
            if self.means is None:
                (staged / MEANS).touch()  # Removes those of an earlier super-network.
                return
            means = {name: mean.cpu().contiguous() for name, mean in self.means.items()}
            save_file(means, staged / MEANS, metadata={"weights": chain.weights})

        return save_with(self.model, folder, write, overwrite=overwrite, **extra)

    @classmethod
    def load(cls, folder: str | Path) -> "SuperNet":
        """Read what `save` wrote.

        Args:
            folder: what `save` wrote, or a run that trained a super-network.

        Raises:
            CheckpointError: no super-network there, a damaged one, or a chain or means of other weights.
        """
        folder = saved_folder(str(folder)) or Path(folder)
        recover(folder)
        if not (folder / CHAIN).is_file():
            raise CheckpointError(f"{folder} holds no {CHAIN}, so no super-network; make one with vitrim.stratify")
        chain = Chain.from_json((folder / CHAIN).read_text(encoding="utf-8", errors="replace"))
        model = load(folder)
        if hash_of(model) != chain.weights:
            raise CheckpointError(f"{folder / CHAIN} belongs to other weights than those beside it; stratify again")
        if changed := _differences(chain, start_chain(model)):
            raise CheckpointError(
                f"{folder / CHAIN} differs from the model in {', '.join(changed[:3])}; stratify again"
            )
        return cls(model, chain, _read_means(folder / MEANS, model, chain) if (folder / MEANS).is_file() else None)


def _differences(one: Chain, other: Chain) -> list[str]:
    """The names in which the full networks of two chains differ: sub-layers with their unit costs, and total costs."""
    ours, theirs = ({n: replace(unit, step=1) for n, unit in chain.units.items()} for chain in (one, other))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return names + [n for n in ("macs", "macs_linear_only", "params") if getattr(one, n) != getattr(other, n)]


def _read_means(path: Path, model: nn.Module, chain: Chain) -> dict[str, Tensor]:
    """The means that `save` wrote for this model and chain."""
    try:
        with safe_open(path, "pt") as file:
            weights = (file.metadata() or {}).get("weights")
        means = load_file(path)
    except SafetensorError:
        raise CheckpointError(f"{path} is damaged or cut short; stratify again") from None
    with elastic(model) as layers:
        wanted = {name: layer.last.in_features for name, layer in layers.items()}
    if weights != chain.weights or {name: mean.numel() for name, mean in means.items()} != wanted:
        raise CheckpointError(f"{path} belongs to other weights than those beside it; stratify again")
    return means


def stratify(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    labels: bool = False,
    num_images: int = 1024,
    groups: Mapping[Kind, int] = GROUPS,
    width_multiple: int = 8,
    max_saving: float = 0.875,
    rounds: int = 4,
    ordering: str = "wpac",
    even: bool = False,
    say: Callable[[str], None] = print,
) -> SuperNet:
    """Turn a trained model into a super-network without training; the given model is not changed.

    Args:
        model: any model that an adapter supports, without a reduction, at the input size for which costs are counted.
        data: an iterable of batches of images (B, channels, height, width), or of (images, labels).
        labels: use the labels, which must be classes of this model; otherwise its predictions are used.
        num_images: number of images to use; a sixteenth of them also measures the importance of sub-layers.
        groups: into how many groups the widths of "attention" and "mlp" are cut.
        width_multiple: every width except the full one is a multiple of it.
        max_saving: fraction of the MACs that the smallest network of the chain saves, in (0, 1).
        rounds: how often the importance of sub-layers is measured, each time on the smallest network so far.
        ordering: how units are ordered; see `wpac.ORDERINGS`.
        even: every sub-layer loses the same fraction of its units; importance plays no role.
        say: called with lines for the user.

    Raises:
        UnsupportedModelError: no adapter knows the model, or a part of it forbids changing widths.
        VitrimError: a reduction is attached, or a number is out of its range.
    """
    if attached(model) is not None:
        raise VitrimError("token reduction is attached to this model; stratify after handle.remove()")
    check_counts(num_images=num_images, rounds=rounds)
    if not isinstance(max_saving, Real) or not 0 < max_saving < 1:
        raise VitrimError(f"max_saving must be between 0 and 1, not {max_saving!r}")
    # Before the long pass over the images, since it needs no order and refuses what cannot be cut.
    chain = start_chain(model, groups=groups, width_multiple=width_multiple)
    model = copy.deepcopy(model)
    # Kept, so that an iterator that can be read only once serves too; there are few of them.
    probe_images = min(num_images, max(32, num_images // 16))
    source = batches_in(data)
    probe: list[Batch] = []
    while probe_images > sum(len(images_of(batch)) for batch in probe) and (batch := next(source, None)) is not None:
        probe.append(batch)
    ordered = wpac(
        model, itertools.chain(probe, source), num_images=num_images, labels=labels, ordering=ordering, say=say
    )
    if even:
        chain, rounds = grow_evenly(chain, max_saving), 0
    for number in range(1, rounds + 1):
        widths = chain.widths(-1)
        rises = sensitivities(model, probe, widths, num_images=probe_images, labels=labels)
        shares = {name: ordered.shares[name][: widths[name]] for name in rises}
        chain = grow(chain, shares, rises, max_saving * number / rounds)
    return SuperNet(model, replace(chain, weights=hash_of(model)), ordered.means)
