"""Curricula in the training loops of Lightning and transformers: moved, fed with figures, saved and resumed."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import vitrim
from vitrim.errors import VitrimError
from vitrim.train.callbacks import Mover, lightning_callback, transformers_callback
from zoo import build, images

pytestmark = pytest.mark.usefixtures("few_test_digits")

REDUCTION = "TopK() @ KeepRate(0.6, at=(0, 1)) @ "
DELAYED, PER_STEP = REDUCTION + "Delayed(1)", REDUCTION + "Polynomial(0, 2, gamma=1, per_step=True)"
ADAPTIVE = REDUCTION + "Adaptive(step=0.5)"
HALF = "TopK() @ KeepRate(0.5)"


class Pairs(torch.utils.data.Dataset):
    """Eight images with labels, as a dict."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5}


class Classifier(nn.Module):
    """What the Trainer of transformers expects around a timm model; notes the strength at every training step."""

    def __init__(self, text: str | None) -> None:
        super().__init__()
        self.vit = build("timm-vit", "vit")
        if text is not None:
            vitrim.attach(self.vit, text)
        self.strengths: list[float] = []

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training and (handle := vitrim.attached(self)) is not None:
            self.strengths.append(handle.strength)
        logits = self.vit(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(autouse=True)
def _libraries_warn_about_themselves():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def lightning_fit(
    text: str | None, folder: Path, epochs: int, *copies: nn.Module, log: str = "val_loss", resume: str | None = None
) -> tuple[Classifier, Any]:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier(text)

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.net(**batch)["loss"]

        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            self.log(log, 1.0 / (1 + self.current_epoch), batch_size=4)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    loader, module = torch.utils.data.DataLoader(Pairs(), 4), Module()
    callback = lightning_callback(*copies)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=folder, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.net, callback


def transformers_fit(
    text: str | None, folder: Path, epochs: int, *copies: nn.Module, evaluate: str = "epoch",
    resume: bool | str = False, **options: Any,
) -> tuple[Classifier, Any]:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    model, callback = Classifier(text), transformers_callback(*copies)
    args = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, eval_strategy=evaluate, use_cpu=True,
        save_strategy="epoch", report_to=[], disable_tqdm=True, learning_rate=1e-2, remove_unused_columns=False,
        **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=Pairs(), eval_dataset=Pairs(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model, callback


FITS = {"lightning": lightning_fit, "transformers": transformers_fit}
each_library = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)


@each_library
def test_the_curriculum_of_a_model_and_its_copies_moves_with_training(fit: Any, tmp_path: Path) -> None:
    average = AveragedModel(Classifier(PER_STEP))
    model, _ = fit(PER_STEP, tmp_path, 2, average)
    assert model.strengths == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert vitrim.attached(average).strength == pytest.approx(0.75)
    model, _ = fit(DELAYED, tmp_path / "delayed", 2)
    assert model.strengths == [0, 0, 1, 1]


@each_library
def test_a_resumed_run_continues_at_the_strength_of_the_whole_run(fit: Any, tmp_path: Path) -> None:
    whole, uninterrupted = fit(ADAPTIVE, tmp_path / "whole", 4)
    fit(ADAPTIVE, tmp_path / "parts", 2)
    rest, resumed = fit(
        ADAPTIVE, tmp_path / "parts", 4, resume=str(tmp_path / "parts/last.ckpt") if fit is lightning_fit else True
    )
    assert rest.strengths == whole.strengths[4:]
    assert max(whole.strengths) > 0
    assert sorted(resumed.figures) == sorted(uninterrupted.figures) == [0, 1, 2, 3]


def test_a_checkpoint_of_lightning_is_tested_at_its_strength(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Classifier(REDUCTION + "Polynomial(0, 4, gamma=1)")

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.net(**batch)["loss"]

        def test_step(self, batch: dict[str, Tensor]) -> None:
            self.net(**batch)

        validation_step = predict_step = test_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def trainer() -> Any:
        return lightning.Trainer(
            max_epochs=3, callbacks=[lightning_callback()], default_root_dir=tmp_path, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip

    loader = torch.utils.data.DataLoader(Pairs(), 4)
    (trained := trainer()).fit(Module(), loader)
    trained.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["state_dict"] = dict(content["state_dict"])  # As callbacks of Lightning that average weights write it.
    torch.save(content, tmp_path / "plain.ckpt")
    for use in ("test", "validate", "predict"):
        getattr(trainer(), use)(module := Module(), loader, ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
        assert vitrim.attached(module).strength == 0.5


def test_the_best_model_of_transformers_comes_with_its_strength(tmp_path: Path) -> None:
    average = AveragedModel(Classifier(PER_STEP))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    model, _ = transformers_fit(REDUCTION + "Polynomial(0, 4, gamma=1)", tmp_path, 3, average, **best)
    assert model.strengths[-1] == 0.5
    assert vitrim.attached(model).strength == 0.0  # The loss falls, so that the largest is that of epoch 0.
    assert vitrim.attached(average).strength > 0.5


def test_a_checkpoint_elsewhere_is_not_resumed_without_what_was_learnt(tmp_path: Path) -> None:
    transformers_fit(ADAPTIVE, tmp_path / "one", 1)
    with pytest.raises(VitrimError, match=r"resumes at step 2, but .*two/checkpoint-2/vitrim.pt is missing"):
        transformers_fit(ADAPTIVE, tmp_path / "two", 2, resume=f"{tmp_path}/one/checkpoint-2")
    model, _ = transformers_fit(DELAYED, tmp_path / "three", 2, resume=f"{tmp_path}/one/checkpoint-2")
    assert model.strengths == [1, 1]  # It follows the epoch alone.


def test_a_figure_that_no_validation_reports_is_named(tmp_path: Path) -> None:
    with pytest.raises(VitrimError, match="reads val_loss, which was not reported in epoch 0"):
        lightning_fit(ADAPTIVE, tmp_path, 2, log="loss_of_validation")
    with pytest.raises(VitrimError, match="reads val_loss, which was not reported in epoch 0"):
        transformers_fit(ADAPTIVE, tmp_path, 2, evaluate="no")


@each_library
def test_a_model_without_a_reduction_is_refused(fit: Any, tmp_path: Path) -> None:
    with pytest.raises(VitrimError, match=r"no reduction is attached inside this \w+; call vitrim.attach first"):
        fit(None, tmp_path, 1)


def test_a_checkpoint_of_another_number_of_reductions_is_refused() -> None:
    one, two = build("timm-vit", "vit"), build("timm-vit", "vit")
    vitrim.attach(one, DELAYED), vitrim.attach(two, DELAYED)
    with pytest.raises(VitrimError, match="holds 2 reductions, this run 1"):
        Mover().restore(one, Mover([two]).saved(one))


@pytest.mark.parametrize("make", [lightning_callback, transformers_callback])
def test_callbacks_can_be_pickled(make: Any) -> None:
    pytest.importorskip("lightning" if make is lightning_callback else "transformers")
    callback = make()
    callback.figures[0] = {"val_loss": 1.0}
    again = pickle.loads(pickle.dumps(callback))
    assert type(again) is type(callback)
    assert again.figures == callback.figures


@pytest.mark.parametrize(
    ("make", "library"), [(lightning_callback, "lightning"), (transformers_callback, "vitrim[hf]")]
)
def test_a_missing_library_is_named(make: Any, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import vitrim.train.callbacks as module

    for name in ("lightning.pytorch", "transformers"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for cached in (module._lightning_class, module._transformers_class):
        cached.cache_clear()
    with pytest.raises(VitrimError, match="pip install") as caught:
        make()
    assert library in str(caught.value)
    for cached in (module._lightning_class, module._transformers_class):
        cached.cache_clear()


@pytest.mark.parametrize(("depth", "text"), [(1, HALF), (-1, ""), (-1, HALF)])
def test_the_summary_of_lightning_counts_a_model(depth: int, text: str) -> None:
    """A deep one puts a hook on every module, also on an attention that a block which cuts computes in parts."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.utilities.model_summary import ModelSummary

    module = lightning.LightningModule()
    module.model = build("timm-vit", "vit")
    if text:
        vitrim.attach(module.model, text)
    module.forward, module.example_input_array = module.model.forward, images(2)
    expected = module.model(images(2))
    found = ModelSummary(module, max_depth=depth)
    assert torch.equal(module.model(images(2)), expected)
    assert found.total_parameters == sum(weight.numel() for weight in module.model.parameters())
    assert ("model.blocks.1.attn" in found.layer_names) == (depth == -1)
