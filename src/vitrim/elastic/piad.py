"""PIAD (SKD): train all networks of a chain together while the chain still grows.

At the start of each of the first epochs, importance is measured on the smallest network and the chain is extended.
Every step trains networks drawn from the chain: by default the full, the smallest and a random one, where the full one
teaches the others (sandwich rule with in-place distillation, Yu & Huang 2019); rule="original" is SKD as published.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, UnknownNameError, VitrimError
from ..models.widths.sublayers import Kind, elastic
from .chain import GROUPS, Chain, give_rules, hash_of, start_chain
from .growth import grow
from .importance import rise_curves, taylor_curves
from .probing import Batch, check_counts, is_headless, output_of
from .sampler import RULES, draw, narrowed
from .supernet import SuperNet


@dataclass(frozen=True)
class Piad:
    """How a super-network is trained.

    grow_epochs: epochs during which the chain grows; the saving rises linearly to max_saving.
    max_saving: fraction of the MACs that the smallest network saves at the end, in (0, 1).
    rule: a name in `sampler.RULES`.
    distill: whether smaller networks learn from the full one, or all from an external teacher if there is one.
    temperature: of that distillation, above 0; its loss is scaled by the temperature squared.
    num_images, probe_images: for importance and for sensitivities, at every growth.
    labels: whether growth reads the labels of its loader.
    """

    grow_epochs: int = 50
    max_saving: float = 0.875
    rule: str = "sandwich"
    distill: bool = True
    temperature: float = 1.0
    num_images: int = 1024
    probe_images: int = 256
    labels: bool = True
    seed: int = 0
    groups: Mapping[Kind, int] = field(default_factory=lambda: dict(GROUPS))
    width_multiple: int = 8

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UnknownNameError("sampling rule", self.rule, RULES)
        check_counts(grow_epochs=self.grow_epochs, num_images=self.num_images, probe_images=self.probe_images)
        if not 0 < self.max_saving < 1 or not self.temperature > 0:
            raise VitrimError("max_saving must be between 0 and 1, and temperature above 0")


@dataclass(frozen=True)
class SubnetLoss:
    """The loss of one network of the chain in one step, ready for `backward`.

    part: the part of the network in this step, see `sampler.RULES`.
    network: its index in the chain.
    out: its output, detached.
    """

    part: str
    network: int
    loss: Tensor
    out: Tensor


class Stratifier:
    """What a training loop calls. Use it as a context manager around training, in which the model can be narrowed.

    Args:
        model: the network to train, unwrapped, its units already ordered by `wpac`.
        config: how to train it.
        chain: to continue with; default: only the full network.
        teacher: an external teacher, frozen and in eval mode; default: the full network itself.
        criterion: the loss on labels.

    Raises:
        CheckpointError: the chain was made for another model or input size.
        VitrimError: the rule never runs the full network, and there is no other teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Piad,
        chain: Chain | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        self.model, self.config, self.teacher, self.criterion = model, config, teacher, criterion
        self.chain = start_chain(model, groups=config.groups, width_multiple=config.width_multiple)
        if chain is not None:
            self.chain = self._checked(chain)
        self.epoch = -1
        if config.rule != "sandwich" and config.distill and teacher is None:
            raise VitrimError(f"rule {config.rule!r} never runs the full network; give a teacher or distill=False")
        self._stack = ExitStack()

    def __enter__(self) -> "Stratifier":
        self._stack.enter_context(elastic(self.model))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start_epoch(self, epoch: int, loader: Iterable[Batch]) -> Chain:
        """Extend the chain to the length for this epoch; does nothing if that was done before, as in a resumed epoch.

        Args:
            epoch: from 0.
            loader: batches of images, or of (images, integer labels), not mixed; each process has its own share.
        """
        c = self.config
        while self.epoch < min(epoch, c.grow_epochs - 1):
            self.epoch += 1
            widths = self.chain.widths(-1)
            if not any(widths.values()):
                break
            expected = taylor_curves(self.model, loader, widths, num_images=c.num_images, labels=c.labels)
            curves = rise_curves(self.model, loader, self.chain, expected, num_images=c.probe_images, labels=c.labels)
            self.chain = grow(self.chain, curves, c.max_saving * (self.epoch + 1) / c.grow_epochs)
        return self.chain

    def drawn(self, step: int) -> dict[str, int]:
        """Which networks of the present chain a step trains, by part, see `sampler.draw`."""
        return draw(self.config.rule, len(self.chain), self.config.seed, step)

    def losses(
        self,
        images: Tensor,
        targets: Tensor | None,
        step: int,
        model: nn.Module | None = None,
        hold: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[SubnetLoss]:
        """The losses of one step, one network at a time; call `backward` on each before taking the next.

        Args:
            images: (B, channels, height, width).
            targets: class indices (B,) or probabilities (B, classes); None: distillation only.
            step: number of the step in the whole run; with the seed it decides which networks are drawn.
            model: the wrapped model to call (DistributedDataParallel, compiled); default: the model itself.
            hold: entered around every network but the last, so that processes exchange gradients once a step.
        """
        c = self.config
        drawn = self.drawn(step)
        target_of_students = None
        if c.distill and self.teacher is not None:
            with torch.no_grad():
                target_of_students = output_of(self.teacher, images)
        for position, (part, index) in enumerate(drawn.items()):
            last = position == len(drawn) - 1
            with narrowed(self.model, self.chain.widths(index)), nullcontext() if last else hold():
                out = output_of(model or self.model, images)
                if target_of_students is not None and (self.teacher is not None or position > 0):
                    loss = imitation_loss(out, target_of_students, c.temperature, is_headless(self.model))
                elif targets is not None:
                    loss = self.criterion(out, targets)
                else:
                    raise VitrimError("without labels the full network needs a teacher of its own; give one")
                if c.distill and target_of_students is None:
                    target_of_students = out.detach()
                # Inside the context, since activation checkpointing repeats the forward pass during backward.
                yield SubnetLoss(part, index, loss, out.detach())

    @contextmanager
    def network(self, index: int) -> Iterator[nn.Module]:
        """The model as one network of the chain, for evaluation."""
        with narrowed(self.model, self.chain.widths(index)):
            yield self.model

    def finish(self) -> SuperNet:
        """The trained super-network; call it after the context has ended."""
        return SuperNet(self.model, replace(self.chain, weights=hash_of(self.model)))

    def state_dict(self) -> dict[str, Any]:
        """Everything except the weights that resuming needs."""
        return {"epoch": self.epoch, "chain": self.chain.to_json(), "config": asdict(self.config)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was called.

        Raises:
            CheckpointError: it belongs to another configuration or model, or it is not such a state.
        """
        if not {"epoch", "chain", "config"} <= state.keys():
            raise CheckpointError("this is not a state of a Stratifier; give what its state_dict returned")
        mine = asdict(self.config)
        changed = [name for name, value in state["config"].items() if mine.get(name) != value]
        if changed:
            raise CheckpointError(f"the checkpoint has another {', '.join(changed)}; resume with the same")
        self.epoch, self.chain = state["epoch"], self._checked(Chain.from_json(state["chain"]))

    def _checked(self, chain: Chain) -> Chain:
        if not chain.is_of_model(self.chain):
            raise CheckpointError("the chain was made for another model or input size")
        give_rules(self.model, chain)
        return chain


def imitation_loss(out: Tensor, taught: Tensor, temperature: float, features: bool) -> Tensor:
    """KL(teacher || student) at a temperature, times its square, mean over images; for features one minus cosine."""
    if features:
        return (1 - F.cosine_similarity(out, taught, dim=1)).mean()
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (out, taught))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
