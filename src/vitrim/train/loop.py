"""The training loop: one recipe in, one run folder out, on one process or many, resumable to the same numbers."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import DataLoaderConfiguration, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..distill import Distilled
from ..errors import VitrimError
from ..measure.cost import cost
from ..measure.environment import environment
from ..models import attached, load
from ..tokens import Adaptive
from .checkpoint import RunFolder
from .data import Stream, make_loader, make_splits
from .evaluate import Figures, attention_entropy, evaluate, make_accelerator, mean_loss
from .images import open_both
from .learner import make_mixup, make_optimizer, make_scheduler, prepare_learner, prepare_student, with_student
from .recipe import Recipe
from .seeding import seed_everything
from .stopping import Stopped, StopSignals

Report = Callable[[str, Mapping[str, Any]], None]
"""Called with ("step" | "epoch" | "done", figures) as the run goes on."""
LOOK_EVERY = 20
"""Steps between two looks at figures on an accelerator, which must be waited for; a CPU looks at every step."""

_COUNTS = ("images", "seconds")


def train(recipe: Recipe, out: str | Path, *, command: str = "", report: Report | None = None) -> dict[str, Any]:
    """Train as the recipe says into the folder `out`; continue where an earlier call was interrupted.

    Returns the final figures, which are in `result.json` too.

    Raises:
        VitrimError: the recipe, the data or the folder is not what it should be, or the loss became NaN.
        Stopped: SIGTERM or Ctrl-C arrived; the state is saved, the same call continues.
    """
    recipe.check()
    folder = RunFolder(out)
    folder.check(recipe)
    finished = folder.result
    return finished or _Run(recipe, folder, command, report or (lambda event, figures: None)).run()


class _Run:
    """State of one run; everything random in it is a function of (seed, epoch, step)."""

    def __init__(self, recipe: Recipe, folder: RunFolder, command: str, report: Report) -> None:
        self.recipe, self.folder, self.report = recipe, folder, report
        optim = recipe.optim
        self.accelerator = make_accelerator(
            mixed_precision=optim.precision,
            gradient_accumulation_steps=optim.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            log_with=recipe.track,
            project_dir=str(folder.path) if recipe.track else None,
        )
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        recipe.check_processes(self.accelerator.num_processes)
        seed_everything(recipe.seed)
        train_images, test_images = open_both(recipe.data)
        self.student = prepare_student(recipe, len(train_images.classes))
        self.splits = make_splits(train_images, test_images, self.student, recipe.data, recipe.augment, recipe.seed)
        batch = recipe.batch_size // optim.accumulate
        loader, self.sampler = make_loader(
            self.splits.train, batch, recipe.data.workers, recipe.seed, shuffle=True,
            drop_last=len(self.splits.train) >= batch,
        )  # fmt: skip
        self.steps = len(loader)
        self.mixup = make_mixup(recipe.augment, len(self.splits.classes))
        learner = prepare_learner(recipe, self.student)
        self.terms = [term.name for term in learner.terms.terms] if recipe.distill else []
        self.classifies = learner.of_student.logits or learner.of_student.dist_logits
        optimizer = make_optimizer(self.student, optim, learner.projections)
        self.scheduler = make_scheduler(optimizer, optim, recipe.epochs, math.ceil(self.steps / optim.accumulate))
        if self.main:
            folder.start(recipe, command, environment())
        self.accelerator.wait_for_everyone()
        if recipe.compile:
            self.student.compile()
        self.learner, self.optimizer, self.loader = self.accelerator.prepare(learner, optimizer, loader)
        self.ema = ModelEmaV3(self.student, decay=optim.ema) if optim.ema > 0 else None
        self.evaluated: nn.Module = self.ema.module if self.ema else self.student
        self.judge = learner if self.classifies else with_student(learner, self.evaluated)
        self.epoch = self.step = self.update = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.sums: dict[str, Any] = {}
        self.unreadable: set[str] = set()

    def run(self) -> dict[str, Any]:
        self._restore()
        with StopSignals() as self.signals:
            if self.recipe.track:
                self.accelerator.init_trackers("vitrim", config={})
            try:
                while self.epoch < self.recipe.epochs:
                    self._train_epoch()
                    self._close_epoch()
                return self._finish()
            finally:
                if self.recipe.track:
                    self.accelerator.end_training()

    def _train_epoch(self) -> None:
        self.sampler.epoch = self.epoch
        self._follow_curriculum(0)
        start = time.perf_counter()
        for images, targets, index in skip_first_batches(self.loader, self.step) if self.step else self.loader:
            self._follow_curriculum(self.step)
            learnt = self._train_step(images, targets)
            self._count(learnt, targets, index)
            self.step += 1
            self.sums["seconds"] = self.sums.get("seconds", 0.0) + time.perf_counter() - start
            start = time.perf_counter()
            if self.device.type == "cpu" or self.step % LOOK_EVERY == 0 or self.step == self.steps:
                self._look()

    def _train_step(self, images: Tensor, targets: Tensor) -> Distilled:
        recipe, accelerator = self.recipe, self.accelerator
        self._train_mode()
        seed_everything(recipe.seed, self.epoch, self.step, accelerator.process_index)
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images.clone(), targets)
        with accelerator.accumulate(self.learner):
            learnt = self.learner(images, targets, progress=self.epoch / max(1, recipe.epochs - 1))
            accelerator.backward(learnt.loss)
            if accelerator.sync_gradients and recipe.optim.clip > 0:
                accelerator.clip_grad_norm_(self.learner.parameters(), recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.update += 1
            self.scheduler.step_update(self.update)
            if self.ema is not None:
                self.ema.update(self.student)
        return learnt

    def _train_mode(self) -> None:
        self.learner.train()
        if self.recipe.optim.freeze:  # A frozen network computes what it computes at evaluation.
            self.student.eval()

    def _count(self, learnt: Distilled, labels: Tensor, index: Tensor) -> None:
        """Add up the figures of a step on the device, without waiting for it."""
        found = {"loss": learnt.loss.detach(), **{name: learnt.terms[name] for name in self.terms}}
        if learnt.logits is not None:
            found["accuracy"] = (learnt.logits.argmax(1) == labels).float().mean()
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.float() * len(labels)
        self.sums["images"] = self.sums.get("images", 0) + len(labels)
        self.sums["indices"] = [*self.sums.get("indices", []), index]

    def _look(self) -> None:
        """See whether all is well, tell how it goes, and stop if asked to."""
        unread = torch.cat(self.sums.pop("indices"))
        self.unreadable |= {self.splits.train.images.name(-1 - i) for i in unread[unread < 0].tolist()}
        if not math.isfinite(self.sums["loss"]):
            self._refuse(f"the loss is {float(self.sums['loss'])}")
        handle, images = attached(self.student), self.sums["images"]
        means = {name: float(value) / images for name, value in self.sums.items() if name not in _COUNTS}
        self.report("step", {
            "epoch": self.epoch, "step": self.step, "steps": self.steps, "loss": means["loss"],
            "accuracy": means.get("accuracy"), "terms": {name: means[name] for name in self.terms},
            "images_per_second": images * self.accelerator.num_processes / self.sums["seconds"],
            "tokens": handle.token_counts[-1] if handle else None,
        })  # fmt: skip
        if self.accelerator.sync_gradients:  # Gradients that are being accumulated are in no checkpoint.
            self._stop_if_asked()

    def _refuse(self, what: str) -> None:
        kept = "the last good checkpoint is kept" if self.folder.state_path.exists() else "nothing was saved yet"
        raise VitrimError(
            f"{what} at epoch {self.epoch + 1}, step {self.step}; {kept}; lower optim.lr or set optim.clip, "
            "and start in another folder"
        )

    def _close_epoch(self) -> None:
        total = self._totals()
        seconds = total["seconds"] / self.accelerator.num_processes
        figures: dict[str, Any] = {
            "epoch": self.epoch,
            **{f"train_{name}": total[name] / total["images"] for name in total if name not in _COUNTS},
            "lr": self.optimizer.param_groups[-1]["lr"],
            "seconds": seconds,
            "images_per_second": total["images"] / seconds,
        }
        self._follow_curriculum(self.steps - 1)
        if (handle := attached(self.student)) is not None:
            self._train_mode()
            figures |= {"strength": handle.strength, "tokens": list(handle.token_counts)}
        if self.splits.select is not None:
            figures |= self._hold_out(self.splits.select)
            if self._watches_entropy:
                few = range(min(64, len(self.splits.select)))
                images = torch.stack([self.splits.select[i][0] for i in few]).to(self.device)
                figures["attention_entropy"] = attention_entropy(self.evaluated, images)
        if not all(math.isfinite(value) for value in figures.values() if isinstance(value, float)):
            self._refuse("a figure is not finite")
        better = not self.best or self._rank(figures) > self._rank(self.best)
        if better:
            self.best = figures
        self.history.append(figures)
        if self.main:
            if better:
                self.folder.save_model(self.evaluated, self.splits.classes)
            self.folder.write_metrics(self.history)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self._save()
        self.accelerator.log({k: v for k, v in figures.items() if isinstance(v, int | float)}, step=self.epoch)
        terms = {name: figures[f"train_{name}"] for name in self.terms}
        self.report("epoch", {**figures, "epochs": self.recipe.epochs, "terms": terms})

    def _rank(self, figures: Mapping[str, Any]) -> tuple[float, float]:
        """What makes an epoch better. One before the reduction has grown to its strength is another network."""
        if self.splits.select is None:
            return figures["epoch"], 0.0
        strength = figures.get("strength", 0.0) if self.recipe.phase != "train" else 0.0
        return strength, figures["val_accuracy"] if self.classifies else -figures["val_loss"]

    def _evaluate(self, model: nn.Module, stream: Stream) -> Figures:
        found = evaluate(
            model, stream, batch_size=self.recipe.batch_size, workers=self.recipe.data.workers,
            accelerator=self.accelerator,
        )  # fmt: skip
        self.unreadable |= set(found.unreadable)
        return found

    def _hold_out(self, stream: Stream) -> dict[str, Any]:
        """Figures by which the epoch is chosen: of the classes, or of the objective where no classes are learnt."""
        if self.classifies:
            found = self._evaluate(self.evaluated, stream)
            return {"val_accuracy": found.accuracy, "val_loss": found.loss}
        recipe = self.recipe
        means = mean_loss(
            self.judge, stream, batch_size=recipe.batch_size, workers=recipe.data.workers, accelerator=self.accelerator
        )
        return {f"val_{name}": value for name, value in means.items()}

    def _finish(self) -> dict[str, Any]:
        model = load(self.folder.model_path).to(self.device)
        result: dict[str, Any] = {"best_epoch": self.best["epoch"]}
        if self.classifies:
            found = self._evaluate(model, self.splits.test)
            result |= {
                "test_accuracy": found.accuracy,
                "test_loss": found.loss,
                "test_images": found.num_images,
                "val_accuracy": self.best.get("val_accuracy"),
            }
        else:
            result["val_loss"] = self.best.get("val_loss")
        spent = cost(model)
        result |= {
            "train_seconds": sum(figures["seconds"] for figures in self.history),
            "train_images": len(self.splits.train),
            "epochs": self.recipe.epochs,
            "seed": self.recipe.seed,
            "macs": spent.macs,
            "macs_linear_only": spent.macs_linear_only,
            "params": spent.params,
            "tokens": list(spent.token_counts),
            "unreadable": self._all_unreadable(),
        }
        if self.main:
            self.folder.write_result(result)
        self.accelerator.wait_for_everyone()
        self.report("done", result)
        return result

    @property
    def _watches_entropy(self) -> bool:
        handle = attached(self.student)
        curriculum = handle.reduction.curriculum if handle and handle.reduction else None
        return isinstance(curriculum, Adaptive) and curriculum.signal == "entropy"

    def _follow_curriculum(self, step: int) -> None:
        """Move the reductions to the strength of this moment: of this step where the curriculum asks for it."""
        for model in {self.student, self.evaluated}:
            handle = attached(model)
            if handle is not None and handle.reduction is not None:
                passed = step / self.steps if handle.reduction.curriculum.per_step else 0
                handle.set_epoch(self.epoch + passed, self.history)

    def _stop_if_asked(self) -> None:
        asked = torch.tensor(self.signals.number, device=self.device)
        if number := int(self.accelerator.gather(asked).max()):  # All must save at the same step.
            self._save()
            raise Stopped(number, f"epoch {self.epoch + 1}, step {self.step} of {self.steps}")

    def _totals(self) -> dict[str, float]:
        """Sums over the epoch so far and over all processes."""
        values = torch.tensor([float(value) for value in self.sums.values()], device=self.device)
        return dict(zip(self.sums, self.accelerator.reduce(values).tolist(), strict=True))

    def _all_unreadable(self) -> list[str]:
        return sorted(set(gather_object(sorted(self.unreadable))))

    def _save(self) -> None:
        state = {
            "epoch": self.epoch, "step": self.step, "update": self.update, "history": self.history,
            "best": self.best, "sums": self._totals(), "unreadable": self._all_unreadable(),
            "learner": self.accelerator.unwrap_model(self.learner).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }  # fmt: skip
        if self.main:
            self.folder.save_state(state)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        state = self.folder.load_state()
        if state is None:
            return
        self.epoch, self.step, self.update = state["epoch"], state["step"], state["update"]
        self.history, self.best, self.unreadable = state["history"], state["best"], set(state["unreadable"])
        self.sums = {name: value if self.main else 0.0 for name, value in state["sums"].items()}
        self.accelerator.unwrap_model(self.learner).load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.scheduler.step_update(self.update)
