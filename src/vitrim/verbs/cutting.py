"""Verbs that make smaller networks: a super-network of a model, and what is cut out of it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from ..errors import DataError, RecipeError, VitrimError
from ..heartbeat import heartbeat
from ..options import Range
from ..train.recipe import Recipe
from ..train.specs import ElasticSpec, OptimSpec
from .delivery import TEST_ONLY, Count, DataOptions, Device, TrainingImages, check_used, command_line, say
from .images import check_dense, images_of, override_data

PUBLISHED = Recipe(optim=OptimSpec(lr=2.5e-4, min_lr=1e-5), elastic=ElasticSpec(), epochs=300)
"""What `stratify --epochs` does without a recipe: published rates and growth, without augmentation."""


def stratify(
    model: str,
    data: DataOptions,
    out: str,
    epochs: Annotated[int, Range(0, 1_000_000)] = 0,
    recipe: str | None = None,
    num_images: Count | None = None,
    width_multiple: Count | None = None,
    labels: bool | None = None,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Turn a trained model into a super-network from which smaller ones are cut; trains it if epochs are given.

    Args:
        model: a timm name with weights (NAME@FILE), a folder written by vitrim or transformers, hf:NAME, or a run
            folder.
        data: the images; the training split is used. Test images and held-out ones (test_split, holdout) are used by
            training only.
        out: folder for the super-network; with training, a run folder, which the same command continues.
        epochs: train all sizes together for so many epochs; 0 trains nothing, or takes the epochs of --recipe.
        recipe: recipe file with the section `elastic`, for the training; its model is replaced by this one.
        num_images: number of images by which units are ordered and, in training, importance is judged; by default
            1024, or as the recipe says.
        width_multiple: every width but the full one is a multiple of it; by default 8, or as the recipe says.
        labels: use the labels of the images, which must be classes of the model; training always uses them.
        overwrite: replace an existing model; a run is continued instead.
        device: where to run.
    """
    if epochs or recipe:
        if overwrite:
            raise VitrimError("a training run is continued, never overwritten; leave --overwrite out or change --out")
        if labels is not None:
            raise VitrimError(
                "training takes the labels of its images wherever the model has classes; leave --labels out"
            )
        _train(_recipe_for(model, data, recipe, epochs, num_images, width_multiple), out, device)
        return
    from ..data.splits import plain_stream
    from ..data.streams import shuffled_batches
    from ..elastic.supernet import stratify as run
    from ..measure.accelerator import make_accelerator
    from ..models import check_place, has_weights, open_model
    from ..models.files.classes import kept_classes, other_classes

    check_place(out, overwrite=overwrite)
    check_used("stratify", data, TEST_ONLY, "training images only, unless it trains (--epochs)")
    spec = images_of([model], data)
    network = open_model(model, spec.image_size).to(make_accelerator(cpu=device == "cpu").device)
    check_dense(network, model, "stratify")
    if not has_weights(model):
        raise VitrimError(f"weights are random; write {model}@pretrained or {model}@FILE, or train it with --epochs")
    stream = plain_stream(network, spec, train=True)
    if labels and (fault := other_classes(model, stream.images.classes)):
        raise DataError(fault)
    number = ElasticSpec().images if num_images is None else num_images
    multiple = ElasticSpec().width_multiple if width_multiple is None else width_multiple
    batches = shuffled_batches(stream, spec.workers)
    with heartbeat("ordering the widths and measuring what each costs", say):
        supernet = run(network, batches, num_images=number, labels=bool(labels), width_multiple=multiple)
    supernet.save(out, overwrite=overwrite, **kept_classes(model))
    chain = supernet.chain
    say(_summary(len(chain), chain.macs_at(-1) / chain.macs, min(number, batches.seen), out))


def _recipe_for(
    model: str, data: DataOptions, file: str | None, epochs: int, num_images: int | None, width_multiple: int | None
) -> Recipe:  # fmt: skip
    """The recipe of the training; where it is shortened, growth keeps its part of it."""
    from ..models.files.build import split_spec
    from ..models.files.store import saved_folder

    base = Recipe.read(file) if file else PUBLISHED
    if base.elastic is None:
        raise RecipeError(f"{file} trains one network; a super-network needs the option elastic, such as elastic: {{}}")
    folder = saved_folder(model)
    name, weights, size = split_spec(model) if folder is None else (str(folder), None, None)
    spec = replace(
        base.model, name=name, pretrained=weights == "pretrained",
        checkpoint=None if weights == "pretrained" else weights,
        checkpoint_size=None if size is None else [*size],
        args=base.model.args if base.model.name == name else {},
    )  # fmt: skip
    growth = max(1, round(base.elastic.grow_epochs * (epochs or base.epochs) / base.epochs))
    given = {"images": num_images, "width_multiple": width_multiple}
    elastic = replace(
        base.elastic, grow_epochs=growth, **{name: value for name, value in given.items() if value is not None}
    )
    images = override_data(base.data, data) if file else images_of([model], data)
    return replace(base, model=spec, data=images, elastic=elastic, epochs=epochs or base.epochs)


def _train(recipe: Recipe, out: str, device: Device) -> None:
    import torch

    from ..showing.progress import live
    from ..train.loop import train

    if device == "cpu" and torch.cuda.is_available():
        raise VitrimError(
            "training uses the CUDA device that it finds; to hide it, put CUDA_VISIBLE_DEVICES= before the command"
        )
    with live() as report:
        result = train(recipe, out, command=command_line(), report=report)
    assert recipe.elastic is not None
    seen = min(recipe.elastic.images, result["train_images"])
    say(_summary(result["networks"], 1 - result["saving"], seen, out))


def _summary(networks: int, least: float, seen: int, out: str) -> str:
    return (
        f"{networks} networks, down to {least:.1%} of the MACs, ordered by {seen:,} images, in {out}; cut one with "
        "vitrim extract"
    )


def extract(
    supernet: str,
    data: TrainingImages,
    out: str,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    compensate: Literal["regression", "means", "none"] = "regression",
    refit: bool = False,
    num_images: Count | None = None,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Cut the largest network that fits a budget out of a super-network, in about a second.

    Args:
        supernet: folder written by vitrim stratify, or a run that trained a super-network.
        data: the images for --refit; the training split is used.
        out: folder for the network.
        macs: budget of MACs per image; a number up to 1 is a fraction of those of the full network.
        params: budget of parameters; a number up to 1 is a fraction.
        latency: budget of milliseconds at batch size 1, measured on the device; a number up to 1 is a fraction, so
            write 0.5ms for half a millisecond.
        compensate: what makes up for removed units: the units that stay predict them ("regression"), or their means
            move into biases ("means"). It changes nothing in a super-network that was trained after its units were
            ordered.
        refit: fit the last projections of the network to the full one on training images, block after block; takes a
            few forward passes and keeps more of the accuracy, most where much is cut.
        num_images: number of images for --refit; by default 1024.
        overwrite: replace an existing model, but never a super-network.
        device: where latency is measured and the network is refitted.
    """
    from ..elastic.supernet import CHAIN, SuperNet
    from ..measure.accelerator import make_accelerator
    from ..measure.cost import cost
    from ..models import check_place, save
    from ..models.files.classes import kept_classes

    check_place(out, overwrite=overwrite)
    if (Path(out) / CHAIN).exists():
        raise VitrimError(f"{out} holds a super-network, which would be lost; choose another folder")
    if not refit and (data or num_images is not None):
        raise RecipeError("images are used by --refit true only; add it, or leave --data and --num_images out")
    check_used("extract", data, TEST_ONLY, "training images only")
    family = SuperNet.load(supernet)
    family.model.to(make_accelerator(cpu=device == "cpu").device)
    batches = None
    if refit:
        from ..data.splits import plain_stream
        from ..data.streams import shuffled_batches

        spec = images_of([supernet], data)
        batches = shuffled_batches(plain_stream(family.model, spec, train=True), spec.workers)
    network = family.extract(
        macs=macs, params=params, latency=latency, compensate=compensate, data=batches, num_images=num_images or 1024
    )
    save(network, out, overwrite=overwrite, **kept_classes(supernet))
    say(f"{cost(network)}; written to {out}")
