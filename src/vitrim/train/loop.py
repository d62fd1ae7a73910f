"""The training loop: one recipe in, one run folder out, on one process or many, resumable to the same numbers."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import skip_first_batches
from torch import Tensor, nn

from ..data.seeding import restored_generators, seed_everything
from ..data.streams import Stream
from ..distill import Outputs
from ..elastic.probing import output_of
from ..errors import DivergedError
from ..measure.accuracy import Figures, evaluate_all
from ..measure.cost import cost
from ..measure.environment import environment
from ..models import attached, load
from ..models.evaluating import evaluating
from .checkpoint import RunFolder
from .prepared import PreparedRun
from .recipe import Recipe
from .state import Report
from .stopping import Stopped, StopSignals

CHECK_EVERY = 20
"""Steps between two checks of the figures on an accelerator, which must be waited for, or up to the next update of
weights; on a CPU every step is checked."""
SLOWER = "lower optim.lr or set optim.clip, and start in another folder"
"""What to do about a run that diverges."""


def train(recipe: Recipe, out: str | Path, *, command: str = "", report: Report | None = None) -> dict[str, Any]:
    """Train as the recipe says into the folder `out`; continue where an earlier call was interrupted.

    Returns the final figures, which are in `result.json` too.

    Raises:
        VitrimError: the recipe, the data or the folder is not what it should be, or the loss became NaN.
        BusyError: another process is writing to the folder.
        Stopped: SIGTERM or Ctrl-C arrived; the state is saved, the same call continues.
    """
    recipe.check()
    folder = RunFolder(out)
    folder.check(recipe)
    finished = folder.result
    if finished:
        return finished
    with restored_generators():
        return _Run(recipe, folder, command, report or (lambda event, figures: None)).run()


class _Run(PreparedRun):
    """One run at work; everything random in it is a function of (seed, epoch, step)."""

    def run(self) -> dict[str, Any]:
        with self.folder.locked() if self.main else nullcontext(), StopSignals() as self.signals:
            if self.main:
                self.folder.start(
                    self.recipe, self.command, {**environment(), "precision": self.accelerator.mixed_precision}
                )
            self.accelerator.wait_for_everyone()
            self.state.restore(self.folder, self.meter, self.parts)
            self.scheduler.step_update(self.state.update)
            if self.recipe.track:
                self.accelerator.init_trackers("vitrim", config=self.recipe.flat())
            self._report_start()
            try:
                while self.state.epoch < self.recipe.epochs:
                    self._train_epoch()
                    self._close_epoch()
                return self._finish()
            finally:
                for tracker in self.accelerator.trackers:
                    tracker.finish()

    def _report_start(self) -> None:
        held_out = self.splits.select
        self.report("start", {
            "images": len(self.splits.train), "held_out": 0 if held_out is None else len(held_out),
            "epochs": self.recipe.epochs, "steps": self.steps, "epoch": self.state.epoch, "step": self.state.step,
            "device": str(self.device), "processes": self.accelerator.num_processes, "folder": str(self.folder.path),
        })  # fmt: skip

    def _train_epoch(self) -> None:
        state = self.state
        self.sampler.epoch = state.epoch
        self.task.start_epoch(state.epoch)
        self.task.follow(state.epoch, 0.0, state.history)
        start = time.perf_counter()
        batches = skip_first_batches(self.loader, state.step) if state.step else self.loader
        for images, targets, index, *known in batches:
            self.task.follow(state.epoch, state.step / self.steps, state.history)
            self._train_step(images, targets, *known)
            state.step += 1
            self.meter.close_step(index, time.perf_counter() - start)
            start = time.perf_counter()
            due = self.accelerator.sync_gradients and state.step % CHECK_EVERY < self.recipe.optim.accumulate
            if due or self.device.type == "cpu" or state.step == self.steps:
                self._check_step()
        self.meter.spend(time.perf_counter() - start)  # The last check waits for an accelerator to get there.

    def _train_step(self, images: Tensor, labels: Tensor, known: Outputs | None = None) -> None:
        recipe, accelerator, state, targets = self.recipe, self.accelerator, self.state, labels
        self.task.train_mode()
        seed_everything("step", recipe.seed, state.epoch, state.step, accelerator.process_index)
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        with accelerator.accumulate(self.learner):
            progress = state.epoch / max(1, recipe.epochs - 1)
            for learnt in self.task.losses(images, targets, known, progress=progress, update=state.update):
                accelerator.backward(learnt.loss)
                self.meter.add(learnt, labels)
            if accelerator.sync_gradients and recipe.optim.clip > 0:
                accelerator.clip_grad_norm_(self.learner.parameters(), recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            state.update += 1
            self.scheduler.step_update(state.update)
            if self.ema is not None:
                self.ema.update(self.student)

    def _check_step(self) -> None:
        """Check the loss, report the figures of the step, and stop where a signal has arrived."""
        self.meter.note(self.splits.train.images.name(-1 - i) for i in self.meter.take_indices() if i < 0)
        means = self.meter.means()
        if not math.isfinite(means["loss"]):
            self._refuse(f"the loss is {means['loss']}")
        handle = attached(self.student)
        self.report("step", {
            "epoch": self.state.epoch, "epochs": self.recipe.epochs, "step": self.state.step, "steps": self.steps,
            "loss": means["loss"],
            "accuracy": means.get("accuracy"), "terms": {name: means[name] for name in self.task.terms},
            "images_per_second": self.meter.images_per_second,
            "tokens": min(handle.token_counts) if handle else None,
        })  # fmt: skip
        if self.accelerator.sync_gradients:  # Gradients that are being accumulated are in no checkpoint.
            self._stop_if_asked()

    def _check_weights(self) -> None:
        """Refuse weights of which nothing can be computed before they are kept; the loss is that before an update."""
        learnt = (weight for weight in self.task.learner.parameters() if weight.requires_grad)
        finite = [weight.detach().isfinite().all() for weight in {*learnt, *self.evaluated.parameters()}]
        if not bool(torch.stack(finite).all()):
            self._refuse("weights are not finite")
        images = self.splits.train.sample(2).to(self.device)
        for network in {self.student, self.evaluated}:
            with torch.inference_mode(), evaluating(network), self.accelerator.autocast():
                if not bool(output_of(network, images).isfinite().all()):
                    self._refuse("weights are so large that outputs are not finite")

    def _refuse(self, what: str) -> NoReturn:
        kept = "the last good checkpoint is kept" if self.folder.state_path.exists() else "nothing was saved yet"
        raise DivergedError(f"{what} at epoch {self.state.epoch + 1}, step {self.state.step}; {kept}; {SLOWER}")

    def _close_epoch(self) -> None:
        state = self.state
        self._check_weights()
        figures = self._figures()
        if not all(math.isfinite(value) for value in figures.values() if isinstance(value, float)):
            self._refuse("a figure is not finite")
        better = not state.best or not self.splits.select or self.task.rank(figures) > self.task.rank(state.best)
        if better:
            state.best = figures
        state.history.append(figures)
        if self.main:
            if better:
                self.task.keep(self.folder, self.splits.classes)
            self.folder.write_metrics(state.history)
            self.task.record(self.folder, state.epoch, range(state.epoch * self.updates, state.update))
        state.epoch, state.step = state.epoch + 1, 0
        self.meter.clear()
        self.state.save(self.folder, self.meter, self.parts)
        self.accelerator.log({k: v for k, v in figures.items() if isinstance(v, int | float)}, step=state.epoch)
        more = {"epochs": self.recipe.epochs, "terms": {name: figures[f"train_{name}"] for name in self.task.terms}}
        self.report("epoch", figures | more)

    def _figures(self) -> dict[str, Any]:
        """All that is known of the epoch that has just ended."""
        lr = self.optimizer.param_groups[-1]["lr"]
        figures: dict[str, Any] = {"epoch": self.state.epoch, "lr": lr, **self.meter.epoch()}
        self.task.follow(self.state.epoch, (self.steps - 1) / self.steps, self.state.history)
        figures |= self.task.strength()
        if self.splits.select is not None:
            figures |= self.task.hold_out(self.splits.select, self._evaluate, self._report_evaluation)
        return figures

    def _evaluate(self, networks: Mapping[str, nn.Module], stream: Stream) -> dict[str, Figures]:
        found = evaluate_all(
            networks, stream, batch_size=self.recipe.batch_size, workers=self.recipe.data.workers,
            accelerator=self.accelerator, tick=self._report_evaluation,
        )  # fmt: skip
        self.meter.note(name for figures in found.values() for name in figures.unreadable)
        return found

    def _report_evaluation(self, done: int, batches: int) -> None:
        self.report("evaluation", {"done": done, "batches": batches})

    def _finish(self) -> dict[str, Any]:
        model, best = load(self.folder.model_path).to(self.device), self.state.best
        spent = cost(model)
        result: dict[str, Any] = {
            "best_epoch": best["epoch"],
            **self.task.result(model, best, self.splits.test, self._evaluate),
            "train_seconds": sum(figures["seconds"] for figures in self.state.history),
            "train_images": len(self.splits.train),
            "epochs": self.recipe.epochs,
            "seed": self.recipe.seed,
            "macs": spent.macs,
            "macs_linear_only": spent.macs_linear_only,
            "params": spent.params,
            "tokens": list(spent.token_counts),
            "unreadable": self.meter.all_unreadable(),
            "not_read": self.splits.notes,
        }
        if not math.isfinite(result.get("test_loss", 0.0)):
            raise DivergedError(f"the loss on the test images is {result['test_loss']}; {SLOWER}")
        if self.main:
            self.folder.write_result(result)
        self.accelerator.wait_for_everyone()
        self.report("done", result)
        return result

    def _stop_if_asked(self) -> None:
        asked = torch.tensor(self.signals.number, device=self.device)
        if number := int(self.accelerator.gather(asked).max()):  # All must save at the same step.
            self._check_weights()
            self.state.save(self.folder, self.meter, self.parts)
            raise Stopped(number, f"epoch {self.state.epoch + 1}, step {self.state.step} of {self.steps}")
