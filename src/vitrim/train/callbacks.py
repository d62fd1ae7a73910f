"""Curricula in other people's training loops: a callback for Lightning, and one for the Trainer of transformers.

Both move the curriculum of the model, and of copies such as an EMA, at the start of every epoch (of every step with
`per_step=True`), give adaptive curricula their validation figures, and keep in the checkpoint what a resumed run needs.
Neither library is imported before its callback is made.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import VitrimError
from ..models import Handle, handles_inside
from ..tokens import render

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from transformers import TrainerCallback

STATE_FILE = "vitrim.pt"
"""What the callback for transformers adds to a checkpoint folder."""


def lightning_callback(*copies: nn.Module) -> "Callback":
    """A callback for `lightning.pytorch.Trainer(callbacks=[...])` that moves the curriculum.

    Attach the reduction inside the `LightningModule`, for example in its `__init__`. Adaptive curricula read the
    figures that validation logs, under the names "val_loss" and "attention_entropy".

    Args:
        copies: further models to move, such as an EMA that is not part of the module.

    Raises:
        VitrimError: Lightning is not installed.
    """
    return _lightning_class()(copies)


def transformers_callback(*copies: nn.Module) -> "TrainerCallback":
    """A callback for `transformers.Trainer(callbacks=[...])` that moves the curriculum.

    The model of the Trainer is, or contains, a model with a reduction attached. Adaptive curricula read "eval_loss" of
    the Trainer's evaluations. Each checkpoint folder gets a file `vitrim.pt`. `resume_from_checkpoint` reads it
    from checkpoints in `output_dir`; `load_best_model_at_end` takes the strength of the best model from it.

    Args:
        copies: further models to move, such as an EMA.

    Raises:
        VitrimError: transformers is not installed.
    """
    return _transformers_class()(copies)


class Mover:
    """What both callbacks share: the models to move, and the validation figures of each epoch.

    Args:
        copies: models to move besides the one that is trained.
    """

    def __init__(self, copies: Sequence[nn.Module] = ()) -> None:
        self.copies = tuple(copies)
        self.figures: dict[int, dict[str, float]] = {}

    def move(self, model: nn.Module, epoch: float, *, within: bool = False) -> None:
        """Move every curriculum to `epoch`; `within` an epoch, only those that change at every step."""
        whole = math.floor(epoch + 1e-6)
        history = [self.figures[at] for at in sorted(self.figures) if at < whole]
        for handle in self._handles(model):
            if handle.reduction is None or (within and not handle.reduction.curriculum.per_step):
                continue
            curriculum = handle.reduction.curriculum
            for figure in curriculum.reads:
                if whole > 0 and figure.name not in self.figures.get(whole - 1, {}):
                    raise VitrimError(
                        f"{render(curriculum)} reads {figure.name}, which was not reported in epoch {whole - 1}; "
                        "validate in every epoch and log it under that name"
                    )
            handle.set_epoch(epoch if curriculum.per_step else whole, history)

    def saved(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"figures": self.figures, "handles": [handle.state_dict() for handle in self._handles(model)]}

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Continue from what `saved` returned."""
        handles = self._handles(model)
        if len(handles) != len(state["handles"]):
            raise VitrimError(
                f"the checkpoint holds {len(state['handles'])} reductions, this run {len(handles)}; attach the same "
                "reductions, and give the callback the same copies, as in the run that is resumed"
            )
        self.figures = dict(state["figures"])
        for handle, own in zip(handles, state["handles"], strict=True):
            handle.load_state_dict(own)

    def restore_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Give the model, not its copies, the strength that it had when `saved` returned this."""
        for handle, own in zip(handles_inside(model), state["handles"], strict=False):
            handle.load_state_dict(own)

    def learns(self, model: nn.Module) -> bool:
        """Whether the strength depends on figures, or the score on gradients, of the epochs so far."""
        pairs = [(handle, found) for handle in self._handles(model) if (found := handle.reduction) is not None]
        return any(handle.gradients is not None or reduction.curriculum.reads for handle, reduction in pairs)

    def _handles(self, model: nn.Module) -> list[Handle]:
        handles = [handle for one in (model, *self.copies) for handle in handles_inside(one)]
        if not handles:
            raise VitrimError(f"no reduction is attached inside this {type(model).__name__}; call vitrim.attach first")
        return handles


@cache
def _lightning_class() -> Any:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise VitrimError("Lightning is not installed; run: pip install lightning") from None

    class LightningCurriculum(Mover, Callback):
        """Moves curricula in a `lightning.pytorch.Trainer`."""

        _model: nn.Module | None = None
        _loaded: Mapping[str, Any] | None = None

        def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            self._model = pl_module

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            if self._loaded is not None:
                self.restore(pl_module, self._loaded)
                self._loaded = None

        # A checkpoint may also be validated, tested or used to predict without training.
        on_validation_start = on_test_start = on_predict_start = on_train_start

        def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
            self.move(pl_module, trainer.current_epoch)

        def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
            self.move(pl_module, trainer.current_epoch + batch_idx / trainer.num_training_batches, within=True)

        def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
            if not trainer.sanity_checking:
                figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
                self.figures[trainer.current_epoch] = figures

        def state_dict(self) -> dict[str, Any]:
            return {} if self._model is None else self.saved(self._model)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._loaded = state_dict or None

        def __reduce__(self) -> Any:
            return lightning_callback, self.copies, {"figures": self.figures}

    return LightningCurriculum


@cache
def _transformers_class() -> Any:
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise VitrimError("transformers is not installed; run: pip install 'vitrim[hf]'") from None

    class TransformersCurriculum(Mover, TrainerCallback):
        """Moves curricula in a `transformers.Trainer`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                return
            file = _folder(args, state) / STATE_FILE
            if file.exists():
                self.restore(kwargs["model"], torch.load(file, weights_only=True, map_location="cpu"))
            elif self.learns(kwargs["model"]):
                raise VitrimError(
                    f"training resumes at step {state.global_step}, but {file} is missing, which holds what the "
                    "reduction has learnt; resume with the output_dir of that run, or copy its checkpoint there"
                )

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not args.load_best_model_at_end or state.best_model_checkpoint is None:
                return
            file = Path(state.best_model_checkpoint) / STATE_FILE
            if file.exists():
                self.restore_model(kwargs["model"], torch.load(file, weights_only=True, map_location="cpu"))

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.move(kwargs["model"], state.epoch or 0.0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.move(kwargs["model"], state.epoch or 0.0, within=True)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = {name.removeprefix("eval_"): value for name, value in kwargs["metrics"].items()}
            figures = {name: float(value) for name, value in named.items() if isinstance(value, int | float)}
            if "loss" in figures:
                figures["val_loss"] = figures["loss"]
            self.figures[max(math.ceil((state.epoch or 0.0) - 1e-6) - 1, 0)] = figures

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = self.saved(kwargs["model"])  # In every process, since learnt gradients are averaged over them.
            if args.should_save and (folder := _folder(args, state)).is_dir():
                torch.save(saved, folder / STATE_FILE)

        def __reduce__(self) -> Any:
            return transformers_callback, self.copies, {"figures": self.figures}

    return TransformersCurriculum


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
