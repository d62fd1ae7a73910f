"""A super-network: one set of ordered weights, and the chain of every smaller network inside it.

`stratify` makes one without training, from unlabelled images, in minutes; training it further (PIAD) is in `piad.py`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..data.batches import Images, batches_in, images_of
from ..errors import CheckpointError, DataError, UnknownNameError, VitrimError
from ..models import attached
from ..models.copying import copied
from ..models.files.store import load, save_with, saved_folder
from ..models.widths.compensation import Compensation
from ..models.widths.sublayers import Kind
from ..output import recover
from .chain import GROUPS, Chain, give_rules, hash_of, start_chain
from .compensation_file import read_compensations, write_compensations
from .extract import choose, cut
from .growth import grow_evenly
from .measured_chain import measured_chain
from .probing import all_alike, check_counts, first_batches, in_turn, portions
from .refit import refit
from .sampler import narrowed
from .wpac import wpac

CHAIN, COMPENSATION = "chain.json", "compensation.safetensors"
LEAST_PROBED = 32
SAVING_PER_ROUND = 0.22
Compensate = Literal["regression", "means", "none"]


@dataclass(frozen=True)
class SuperNet:
    """The full network with its units in order, its chain, and what makes up for removed units.

    compensations: None after training with PIAD, where sub-networks were trained without compensation.
    """

    model: nn.Module
    chain: Chain
    compensations: Mapping[str, Compensation] | None = None

    def __post_init__(self) -> None:
        give_rules(self.model, self.chain)

    def __repr__(self) -> str:
        made_up = "no compensations" if self.compensations is None else f"compensations of {len(self.compensations)}"
        return f"SuperNet({type(self.model).__name__}, {self.chain!r}, {made_up})"

    def extract(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        latency: float | str | None = None,
        compensate: Compensate = "regression",
        data: Images | None = None,
        num_images: int = 1024,
    ) -> nn.Module:
        """The largest sub-network within one budget, as an independent model in eval mode; needs no training.

        Args:
            macs: most multiply-accumulates per image, attention products included.
            params: most parameters.
            latency: longest forward pass at batch size 1, in milliseconds, measured where the model is; write
                "0.5ms" for half of one.
            compensate: what makes up for removed units, at no cost in the network: "regression" lets the units that
                stay predict them, "means" moves their mean into biases, "none" leaves them out. It changes nothing
                after training as a super-network.
            data: images from the training set, in any form that `stratify` takes. Where given, the last projections are
                then fitted to the full network on them, block after block, see `refit.refit`: takes a few forward
                passes, and keeps more of the accuracy, most where much is cut.
            num_images: number of images of `data` to use.

        Any number in (0, 1] is a fraction of the full network's cost.

        Raises:
            VitrimError: not exactly one budget, one that not even the smallest network meets, or another `compensate`.
        """
        index = choose(self.model, self.chain, macs=macs, params=params, latency=latency)
        network = self.cut(index, compensate)
        if data is not None:
            refit(network, self.model, data, num_images=num_images)
        return network

    def cut(self, index: int, compensate: Compensate = "regression") -> nn.Module:
        """Sub-network `index` of the chain as an independent model (0: full, -1: smallest), see `extract`."""
        if compensate not in get_args(Compensate):
            raise UnknownNameError("compensation", compensate, get_args(Compensate))
        compensations = self.compensations if compensate != "none" else None
        if compensations is not None and compensate == "means":
            compensations = {name: replace(each, factor=None, pairs=None) for name, each in compensations.items()}
        return cut(self.model, self.chain, index, compensations)

    @contextmanager
    def at(self, index: int) -> Iterator[nn.Module]:
        """Run the super-network itself as sub-network `index`, without compensation, within this context."""
        with narrowed(self.model, self.chain.widths(index)):
            yield self.model

    def save(self, folder: str | Path, *, overwrite: bool = False, **extra: Any) -> Path:
        """Write weights, chain and compensations into one folder; `vitrim.load` reads it as the full model.

        Args:
            folder: made if it does not exist.
            overwrite: replace a model that is there already.
            extra: kept with the model, see `vitrim.save`.
        """
        chain = replace(self.chain, weights=hash_of(self.model))

        def write(staged: Path) -> None:
            (staged / CHAIN).write_text(chain.to_json() + "\n", encoding="utf-8")
            if self.compensations is None:
                (staged / COMPENSATION).touch()  # Removes those of an earlier super-network.
            else:
                write_compensations(self.compensations, staged / COMPENSATION, chain.weights)

        return save_with(self.model, folder, write, overwrite=overwrite, **extra)

    @classmethod
    def load(cls, folder: str | Path) -> "SuperNet":
        """Read what `save` wrote.

        Args:
            folder: what `save` wrote, or a run that trained a super-network.

        Raises:
            CheckpointError: no super-network there, a damaged one, or a chain or compensations of other weights.
        """
        folder = saved_folder(folder) or Path(folder)
        recover(folder)
        if not (folder / CHAIN).is_file():
            raise CheckpointError(f"{folder} holds no {CHAIN}, so no super-network; make one with vitrim.stratify")
        chain = Chain.from_json((folder / CHAIN).read_text(encoding="utf-8", errors="replace"))
        model = load(folder)
        if hash_of(model) != chain.weights:
            raise CheckpointError(f"{folder / CHAIN} belongs to other weights than those in its folder; stratify again")
        give_rules(model, chain)
        if changed := _differences(chain, start_chain(model)):
            raise CheckpointError(
                f"{folder / CHAIN} differs from the model in {', '.join(changed[:3])}; stratify again"
            )
        path = folder / COMPENSATION
        return cls(model, chain, read_compensations(path, model, chain.weights) if path.is_file() else None)


def _differences(one: Chain, other: Chain) -> list[str]:
    """The names in which the full networks of two chains differ: sub-layers with their unit costs, and total costs."""
    ours, theirs = ({n: replace(unit, step=1) for n, unit in chain.units.items()} for chain in (one, other))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return names + [n for n in ("macs", "macs_linear_only", "params") if getattr(one, n) != getattr(other, n)]


def images_probed(num_images: int) -> int:
    """How many of the images measure what narrower sub-layers do, others in every round: a 16th, 32 or more."""
    return min(num_images, max(LEAST_PROBED, num_images // 16))


def default_rounds(max_saving: float) -> int:
    """How often sub-layers are measured for a chain that saves so much.

    >>> default_rounds(0.875), default_rounds(0.5)
    (4, 3)
    """
    return ceil(max_saving / SAVING_PER_ROUND)


def stratify(
    model: nn.Module,
    data: Images,
    *,
    labels: bool = False,
    num_images: int = 1024,
    groups: Mapping[Kind, int] = GROUPS,
    width_multiple: int = 8,
    max_saving: float = 0.875,
    rounds: int | None = None,
    ordering: str = "elimination",
    even: bool = False,
    say: Callable[[str], None] = print,
) -> SuperNet:
    """Turn a trained model into a super-network without training; the given model is not changed.

    Args:
        model: any model that an adapter supports, without a reduction, at the input size for which costs are counted.
        data: images as the model takes them: a tensor (N, channels, height, width), a `Dataset`, a shuffled
            `DataLoader` or batches; with or without labels.
        labels: use the labels, which must be classes of this model; otherwise its predictions are used.
        num_images: number of images to use. A sixteenth of them, but at least 32, also measures what narrower
            sub-layers do, others in every round. The whole costs about as much as 10 forward passes of 1,024 images.
        groups: into how many groups the widths of "attention" and "mlp" are cut.
        width_multiple: every width except the full one is a multiple of it.
        max_saving: fraction of the MACs that the smallest network of the chain saves, in (0, 1).
        rounds: how often sub-layers are measured at narrower widths, each time in the smallest network so far; by
            default once for each 22 % of the MACs that the smallest network of the chain saves.
        ordering: how units are ordered; see `orderings.ORDERINGS`.
        even: every sub-layer loses the same fraction of its units; nothing is measured.
        say: called with lines for the user.

    Raises:
        UnsupportedModelError: no adapter knows the model, or a part of it forbids changing widths.
        VitrimError: a reduction is attached, a number is out of its range, or the outputs have no gradient.
        DataError: no images, or all the same.
    """
    if attached(model) is not None:
        raise VitrimError("token reduction is attached to this model; stratify after handle.remove()")
    check_counts(num_images=num_images, **({} if rounds is None else {"rounds": rounds}))
    if not isinstance(max_saving, Real) or not 0 < max_saving < 1:
        raise VitrimError(f"max_saving must be between 0 and 1, not {max_saving!r}")
    rounds = rounds or default_rounds(max_saving)
    # Before the long pass over the images, since it needs no order and refuses what cannot be cut.
    start_chain(model, groups=groups, width_multiple=width_multiple)
    model = copied(model)
    probe_images = images_probed(num_images)
    # Kept, so that an iterator that can be read only once serves too; there are few of them.
    source = batches_in(data)
    kept = first_batches(source, min(num_images, (rounds + 1) * probe_images))
    if kept and all_alike([images_of(batch) for batch in kept]):
        raise DataError("the images are all the same, so nothing can be learnt from them; give different ones")
    ordered = wpac(
        model, itertools.chain(kept, source), num_images=num_images, labels=labels, ordering=ordering,
        width_multiple=width_multiple, say=say,
    )  # fmt: skip
    chain = start_chain(model, groups=groups, width_multiple=width_multiple)  # With the rules of rotary pairs.
    if even:
        chain = grow_evenly(chain, max_saving)
    else:
        chain = measured_chain(
            model, chain, in_turn(portions(kept, probe_images), rounds + 1), ordered.compensations,
            max_saving=max_saving, num_images=probe_images, labels=labels,
        )  # fmt: skip
    return SuperNet(model, replace(chain, weights=hash_of(model)), ordered.compensations)
