"""The training loop: one recipe in, one run folder out, on one process or many, resumable to the same numbers."""

import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import VitrimError
from ..measure.cost import cost
from ..measure.environment import environment
from ..models import attach, attached, build_model, save
from ..tokens import Adaptive, Reduction
from .checkpoint import RunFolder
from .data import make_loader, make_splits, open_both
from .evaluate import attention_entropy, evaluate
from .recipe import ModelSpec, OptimSpec, Recipe
from .seeding import seed_everything

Figures = dict[str, Any]
Report = Callable[[str, Mapping[str, Any]], None]
"""Called with ("step" | "epoch" | "eval" | "done", figures) as the run goes on."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; the exit code is that of the signal."""


class Learner(nn.Module):
    """Model and loss in one module, so that a step is one forward call whatever wraps it."""

    def __init__(self, student: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.student, self.smoothing = student, smoothing

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Loss terms of a batch, their sum as `loss`, and the detached `logits`."""
        logits = self.student(images)
        soft = targets.ndim == 2  # Mixup has smoothed already.
        loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if soft else self.smoothing)
        return {"loss": loss, "logits": logits.detach()}


def prepare_model(spec: ModelSpec, num_classes: int | None) -> nn.Module:
    """Build the network of a recipe; its classifier fits the data unless the recipe says otherwise."""
    args = dict(spec.args)
    classes = args.pop("num_classes", num_classes)
    return build_model(
        spec.name, num_classes=classes, checkpoint=spec.checkpoint, pretrained=spec.pretrained,
        reset_head=spec.reset_head, **args,
    )  # fmt: skip


def train(recipe: Recipe, out: str | Path, *, command: str = "", report: Report | None = None) -> Figures:
    """Train as the recipe says into the folder `out`; continue where an earlier call was interrupted.

    Returns the final figures, which are in `result.json` too.

    Raises:
        VitrimError: the recipe, the data or the folder is not what it should be, or the loss became NaN.
        Stopped: SIGTERM or Ctrl-C arrived; the state is saved, the same call continues.
    """
    recipe.check()
    return _Run(recipe, Path(out), command, report or (lambda event, figures: None)).run()


class _Run:
    """State of one run; everything random in it is a function of (seed, epoch, step)."""

    def __init__(self, recipe: Recipe, out: Path, command: str, report: Report) -> None:
        self.recipe, self.report = recipe, report
        self.accelerator = Accelerator(
            mixed_precision=recipe.optim.precision,
            gradient_accumulation_steps=recipe.optim.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            log_with=recipe.track,
            project_dir=str(out) if recipe.track else None,
        )
        self.main = self.accelerator.is_main_process
        self.folder = RunFolder(out)
        seed_everything(recipe.seed)
        train_images, test_images = open_both(recipe.data)
        self.student = prepare_model(recipe.model, len(train_images.classes))
        self.handle = attached(self.student)
        if recipe.reduction is not None:
            if self.handle is not None:
                self.handle.remove()
            self.handle = attach(self.student, Reduction.parse(recipe.reduction, recipe.phase))
        if recipe.checkpointing:
            self.student.set_grad_checkpointing()
        self.splits = make_splits(train_images, test_images, self.student, recipe.data, recipe.augment, recipe.seed)
        if self.main:
            self.folder.open(recipe, command, environment())
        self.accelerator.wait_for_everyone()
        batch = max(1, recipe.batch_size // recipe.optim.accumulate)
        drop_last = len(self.splits.train) >= batch
        loader, self.sampler = make_loader(
            self.splits.train, batch, recipe.data.workers, recipe.seed, shuffle=True, drop_last=drop_last
        )
        self.mixup = self._make_mixup()
        optimizer = make_optimizer(self.student, recipe.optim)
        self.steps = len(loader)
        updates = math.ceil(self.steps / recipe.optim.accumulate)
        self.scheduler, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=recipe.epochs, min_lr=recipe.optim.min_lr,
            warmup_lr=recipe.optim.lr / 100, warmup_epochs=recipe.optim.warmup_epochs,
            step_on_epochs=False, updates_per_epoch=updates,
        )  # fmt: skip
        learner = Learner(self.student, recipe.augment.smoothing)
        if recipe.compile:
            self.student.compile()
        self.learner, self.optimizer, self.loader = self.accelerator.prepare(learner, optimizer, loader)
        self.ema = ModelEmaV3(self.student, decay=recipe.optim.ema) if recipe.optim.ema > 0 else None
        self.epoch = self.step = self.update = 0
        self.history: list[Figures] = []
        self.best: Figures = {}
        self.epoch_sums: dict[str, float] = {}
        self.unreadable: set[int] = set()
        self._signal: int | None = None

    def run(self) -> Figures:
        finished = self.folder.result
        if finished is not None:
            return finished
        self._restore()
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.recipe.track:
                self.accelerator.init_trackers("vitrim", config={})
            while self.epoch < self.recipe.epochs:
                self._train_epoch()
                self._close_epoch()
            return self._finish()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self.recipe.track:
                self.accelerator.end_training()

    def _train_epoch(self) -> None:
        self.sampler.epoch = self.epoch
        self._move_curriculum(0)
        batches = skip_first_batches(self.loader, self.step) if self.step else self.loader
        start = time.perf_counter()
        for images, targets, index in batches:
            self._move_curriculum(self.step)
            self._train_step(images, targets, index)
            self.step += 1
            self.epoch_sums["seconds"] = self.epoch_sums.get("seconds", 0.0) + time.perf_counter() - start
            start = time.perf_counter()
            self._stop_if_asked()

    def _train_step(self, images: Tensor, targets: Tensor, index: Tensor) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        self.learner.train()
        seed_everything(recipe.seed, self.epoch, self.step, accelerator.process_index)
        self.unreadable.update(int(-1 - i) for i in index[index < 0].tolist())
        labels = targets
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, targets)
        progress = (self.epoch + self.step / self.steps) / recipe.epochs
        with accelerator.accumulate(self.learner):
            out = self.learner(images, targets, progress)
            accelerator.backward(out["loss"])
            if accelerator.sync_gradients and recipe.optim.clip > 0:
                accelerator.clip_grad_norm_(self.learner.parameters(), recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.update += 1
            self.scheduler.step_update(self.update)
            if self.ema is not None:
                self.ema.update(self.student)
        self._count(out, labels)

    def _count(self, out: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add up figures on the device; look at them, and at NaN, only now and then where looking costs time."""
        sums = self.epoch_sums
        if self.accelerator.device.type != "cpu" and self.step % 20 and self.step + 1 < self.steps:
            sums["loss"] = sums.get("loss", 0) + out["loss"].detach() * len(labels)
            sums["hits"] = sums.get("hits", 0) + (out["logits"].argmax(1) == labels).sum()
            sums["images"] = sums.get("images", 0) + len(labels)
            return
        sums["loss"] = float(sums.get("loss", 0) + out["loss"].detach() * len(labels))
        sums["hits"] = int(sums.get("hits", 0) + (out["logits"].argmax(1) == labels).sum())
        sums["images"] = sums.get("images", 0) + len(labels)
        if not math.isfinite(sums["loss"]):
            kept = "the last good checkpoint is kept" if self.folder.state_path.exists() else "nothing was saved yet"
            raise VitrimError(
                f"the loss is {float(out['loss'])} at epoch {self.epoch + 1}, step {self.step + 1}; {kept}; "
                "lower optim.lr or set optim.clip"
            )
        self.report("step", {
            "epoch": self.epoch, "step": self.step + 1, "steps": self.steps,
            "loss": sums["loss"] / sums["images"], "accuracy": sums["hits"] / sums["images"],
            "images_per_second": sums["images"] * self.accelerator.num_processes / max(sums.get("seconds", 0), 1e-9),
            "tokens": self.handle.token_counts[-1] if self.handle else None,
        })  # fmt: skip

    def _close_epoch(self) -> None:
        sums = self.epoch_sums
        total = self.accelerator.reduce(
            torch.tensor([sums["loss"], sums["hits"], sums["images"]], device=self.accelerator.device)
        ).tolist()
        figures: Figures = {
            "epoch": self.epoch,
            "train_loss": total[0] / total[2],
            "train_accuracy": total[1] / total[2],
            "lr": self.optimizer.param_groups[-1]["lr"],
            "seconds": sums["seconds"],
            "images_per_second": total[2] / sums["seconds"],
            "unreadable": len(self.unreadable),
        }
        if self.handle is not None:
            self.learner.train()
            figures |= {"strength": self.handle.strength, "tokens": list(self.handle.token_counts)}
        if self.splits.select is not None:
            found = evaluate(
                self._evaluated, self.splits.select, batch_size=self.recipe.batch_size,
                workers=self.recipe.data.workers, accelerator=self.accelerator,
            )  # fmt: skip
            figures |= found.prefixed("val")
            if self._watches_entropy:
                figures["attention_entropy"] = self._entropy()
        better = not self.best or self.splits.select is None or figures["val_accuracy"] > self.best["val_accuracy"]
        self.history.append(figures)
        if better:
            self.best = {"epoch": self.epoch, "val_accuracy": figures.get("val_accuracy")}
        if self.main:
            if better:
                save(self._evaluated, self.folder.path / "model", overwrite=True)
            self.folder.write_metrics(self.history)
        self.epoch, self.step, self.epoch_sums = self.epoch + 1, 0, {}
        self._save()
        self.accelerator.log({k: v for k, v in figures.items() if isinstance(v, int | float)}, step=self.epoch)
        self.report("epoch", {**figures, "epochs": self.recipe.epochs})

    def _finish(self) -> Figures:
        from ..models import load

        model = load(self.folder.path / "model").to(self.accelerator.device)
        found = evaluate(
            model, self.splits.test, batch_size=self.recipe.batch_size, workers=self.recipe.data.workers,
            accelerator=self.accelerator,
        )  # fmt: skip
        spent = cost(model.eval())
        result: Figures = {
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "test_images": found.num_images,
            "best_epoch": self.best["epoch"],
            "val_accuracy": self.best["val_accuracy"],
            "train_seconds": sum(figures["seconds"] for figures in self.history),
            "train_images": len(self.splits.train),
            "epochs": self.recipe.epochs,
            "seed": self.recipe.seed,
            "macs": spent.macs,
            "macs_linear_only": spent.macs_linear_only,
            "params": spent.params,
            "tokens": list(spent.token_counts),
            "unreadable": sorted(self.splits.train.images.name(i) for i in self.unreadable),
        }
        if self.main:
            self.folder.write_result(result)
        self.accelerator.wait_for_everyone()
        self.report("done", result)
        return result

    @property
    def _evaluated(self) -> nn.Module:
        """The weights that count: the moving average where there is one."""
        return self.student if self.ema is None else self.ema.module

    @property
    def _watches_entropy(self) -> bool:
        curriculum = self.handle.reduction.curriculum if self.handle and self.handle.reduction else None
        return isinstance(curriculum, Adaptive) and curriculum.signal == "entropy"

    def _entropy(self) -> float:
        assert self.splits.select is not None
        few = min(64, len(self.splits.select))
        images = torch.stack([self.splits.select[i][0] for i in range(few)])
        return attention_entropy(self._evaluated, images.to(self.accelerator.device))

    def _move_curriculum(self, step: int) -> None:
        """Follow the curriculum between epochs, or between steps where it asks for that."""
        if self.handle is None or self.handle.reduction is None:
            return
        per_step = self.handle.reduction.curriculum.per_step
        if step == 0 or per_step:
            epoch = self.epoch + (step / self.steps if per_step else 0)
            handles = [self.handle, attached(self.ema.module) if self.ema else None]
            for handle in handles:
                if handle is not None:
                    handle.set_epoch(epoch, self.history)

    def _make_mixup(self) -> Mixup | None:
        a = self.recipe.augment
        if a.mixup == 0 and a.cutmix == 0:
            return None
        return Mixup(
            a.mixup, a.cutmix, prob=a.mix_prob, label_smoothing=a.smoothing, num_classes=len(self.splits.classes)
        )

    def _note(self, number: int, frame: object) -> None:
        self._signal = number

    def _stop_if_asked(self) -> None:
        asked = self._signal or 0
        if self.accelerator.num_processes > 1:  # All must save at the same step.
            flag = torch.tensor(float(asked), device=self.accelerator.device)
            asked = int(self.accelerator.gather(flag).max())
        if asked:
            self._save()
            raise Stopped(128 + asked)

    def _save(self) -> None:
        if self.main:
            sums = {name: float(value) for name, value in self.epoch_sums.items()}
            self.folder.save_state({
                "epoch": self.epoch, "step": self.step, "update": self.update, "history": self.history,
                "best": self.best, "sums": sums, "unreadable": sorted(self.unreadable),
                "learner": self.accelerator.unwrap_model(self.learner).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            })  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        state = self.folder.load_state()
        if state is None:
            return
        self.epoch, self.step, self.update = state["epoch"], state["step"], state["update"]
        self.history, self.best, self.epoch_sums = state["history"], state["best"], state["sums"]
        self.unreadable = set(state["unreadable"])
        self.accelerator.unwrap_model(self.learner).load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.scheduler.step_update(self.update)


def make_optimizer(student: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """timm's optimiser over the student, or over its classifier alone where the rest is frozen."""
    if spec.freeze:
        head = student.get_classifier()
        heads = head if isinstance(head, tuple) else (head,)
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for module in heads:
            module.requires_grad_(True)
    try:
        return create_optimizer_v2(
            student, spec.name, lr=spec.lr, weight_decay=spec.weight_decay, layer_decay=spec.layer_decay
        )
    except (ValueError, AssertionError) as error:
        raise VitrimError(f"cannot make optimiser {spec.name!r}: {error}") from None
