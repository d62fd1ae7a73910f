"""All that a run computes with, made from its recipe: images, student, objective, optimiser, parts of a checkpoint."""

import math

from accelerate.utils import DataLoaderConfiguration
from timm.utils import ModelEmaV3
from torch import nn

from ..data.data_sets import open_both
from ..data.seeding import seed_everything
from ..data.splits import make_splits
from ..data.streams import make_loader
from ..measure.accelerator import fast_precision, make_accelerator
from ..models import attached
from ..models.compiling import check_compiler
from .checkpoint import RunFolder
from .learner import make_mixup, prepare_student
from .meter import Meter
from .optimizer import make_optimizer, make_scheduler
from .recipe import Recipe
from .single_network import SingleNetwork
from .state import Report, RunState, SameImages, Stateful
from .stratification import Stratification
from .task import Task


class PreparedRun:
    """A run before its first step, in one of its processes."""

    def __init__(self, recipe: Recipe, folder: RunFolder, command: str, report: Report) -> None:
        self.recipe, self.folder, self.command, self.report = recipe, folder, command, report
        optim = recipe.optim
        self.accelerator = make_accelerator(
            mixed_precision=fast_precision() if optim.precision == "auto" else optim.precision,
            gradient_accumulation_steps=optim.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            log_with=recipe.track,
            project_dir=str(folder.path) if recipe.track else None,
        )
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if recipe.compile:
            check_compiler(self.device)
        recipe.check_processes(self.accelerator.num_processes)
        seed_everything("weights", recipe.seed)
        with self.accelerator.local_main_process_first():  # So that one process downloads.
            train_images, test_images = open_both(recipe.data)
        self.student = prepare_student(recipe, train_images.classes)
        self.splits = make_splits(train_images, test_images, self.student, recipe.data, recipe.augment, recipe.seed)
        batch = recipe.batch_size // optim.accumulate
        loader, self.sampler = make_loader(
            self.splits.train, batch, recipe.data.workers, recipe.seed, shuffle=True,
            drop_last=len(self.splits.train) >= batch,
        )  # fmt: skip
        self.steps = len(loader)
        self.mixup = make_mixup(recipe.augment, len(self.splits.classes))
        self.task: Task = self._make_task()
        optimizer = make_optimizer(self.student, optim, self.task.extra)
        self.updates = math.ceil(self.steps / optim.accumulate)  # Of one epoch.
        self.scheduler = make_scheduler(optimizer, optim, recipe.epochs, self.updates)
        if recipe.compile:
            self.task.learner.compile()
        self.learner, self.optimizer, self.loader = self.accelerator.prepare(self.task.learner, optimizer, loader)
        self.ema = ModelEmaV3(self.student, decay=optim.ema) if optim.ema > 0 else None
        self.evaluated: nn.Module = self.ema.module if self.ema else self.student
        self.task.start(self.learner, self.evaluated)
        self.state, self.meter = RunState(), Meter(self.accelerator)
        self.parts: dict[str, Stateful | None] = {
            "learner": self.task.learner,
            "optimizer": self.optimizer,
            "ema": self.ema.module if self.ema else None,
            "scaler": self.accelerator.scaler,
            "gradients": handle.gradients if (handle := attached(self.student)) else None,
            "task": self.task.part,
            "images": SameImages(*filter(None, (self.splits.train, self.splits.select))),
        }

    def _make_task(self) -> Task:
        parts = self.recipe, self.student, self.splits, self.accelerator
        if self.recipe.elastic is None:
            return SingleNetwork(*parts, self.report)
        return Stratification(*parts, fresh=not self.folder.state_path.exists())
