"""What each verb of the command does: plain functions, whose signature and docstring are the options and the help.

torch is imported inside them, so that help is instant.
"""

import os
import sys
from typing import Any, Literal

from .train.recipe import DataSpec, Recipe

Device = Literal["auto", "cpu", "cuda"]


def train(recipe: Recipe, out: str) -> None:
    """Train a model as a recipe says; repeat the same command to continue an interrupted run.

    Args:
        recipe: options of the run; --config reads them from a file.
        out: run folder to create or to continue.
    """
    from .show.progress import live
    from .train.loop import train as run

    with live() as report:
        result = run(recipe, out, command=command_line(), report=report)
    figure = f"test accuracy {result['test_accuracy']:.2%}" if "test_accuracy" in result else "finished"
    print(f"{figure} (epoch {result['best_epoch'] + 1}); see {out}/result.json")


def evaluate(
    model: list[str],
    data: DataSpec,
    method: list[str] | None = None,
    batch_size: int = 128,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Evaluate models, each dense and under every method, side by side.

    Args:
        model: timm names, folders written by vitrim, or run folders.
        data: the images; what is not given is taken from the recipe of the first run.
        method: reductions to put in at test time, such as "TopK() @ KeepRate(0.7)"; "dense" takes any out.
        batch_size: images at a time.
        device: where to run.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    check_table(out)
    from .search.compare import compare, data_of

    deliver(compare(model, data_of(model, data), method or ["dense"], batch_size=batch_size, device=device), out)


def bench(
    model: list[str],
    method: list[str] | None = None,
    batch_size: list[int] = [32],  # noqa: B006 (jsonargparse shows the default; never changed)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    threads: int | None = None,
    rounds: int = 10,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Time models and methods side by side, in interleaved rounds, as ratios to the first.

    Args:
        model: timm names, folders written by vitrim, or run folders.
        method: "dense", or reductions such as "ToMe() @ ConstantR(13)".
        batch_size: one or several.
        dtype: of weights and images.
        compile: time torch.compile'd models.
        threads: CPU threads.
        rounds: rounds in which every model runs once.
        device: where to run.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    check_table(out)
    from .measure.speed import bench_methods

    table = bench_methods(
        model, method or ["dense", "TopK() @ KeepRate(0.7)"], batch_sizes=tuple(batch_size), dtype=dtype,
        compile=compile, threads=threads, rounds=rounds, device=None if device == "auto" else device,
    )  # fmt: skip
    deliver(table, out)


def sweep(
    model: list[str],
    data: DataSpec,
    method: str,
    vary: dict[str, list[float]],
    search: Literal["grid", "tpe"] = "grid",
    trials: int = 20,
    batch_size: int = 128,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Evaluate one method at many settings, at test time only.

    Args:
        model: timm names, folders written by vitrim, or run folders.
        data: the images; what is not given is taken from the recipe of the first run.
        method: a reduction with names in braces, such as "TopK() @ PowerLaw({r_max}, {alpha})".
        vary: values for each name ({"alpha": [1.0, 1.5, 2.0]}); with tpe, the lowest and highest value.
        search: "grid" tries all, "tpe" (Bayesian) looks for the frontier of accuracy and MACs in so many trials.
        trials: number of settings that tpe tries.
        batch_size: images at a time.
        device: where to run.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    check_table(out)
    from .search.compare import data_of
    from .search.sweep import sweep as run

    options = {"search": search, "trials": trials, "batch_size": batch_size, "device": device}
    deliver(run(model, data_of(model, data), method, vary, **options), out)


def study(
    file: str,
    out: str,
    scale: str = "full",
    root: str | None = None,
) -> None:
    """Run the rows of a study under one recipe and tabulate them; finished rows are not run again.

    Args:
        file: study file (YAML).
        out: folder of the study.
        scale: one of the file's; in vitrim's own studies "smoke" takes seconds and "small" is for a CPU. "full" is the
            file as it is.
        root: folder of the images, in place of the one in the file.
    """
    from .search.run_study import run_study
    from .show.progress import live
    from .show.report import write_report

    with live() as report:
        table = run_study(file, out, scale=scale, root=root, command=command_line(), report=report)
    print(table.text())
    print(f"written to {out}/table.md and {write_report(out)}")


def show(
    model: str,
    images: str,
    out: str,
    method: str | None = None,
    montage: bool = False,
    scores: bool = False,
    limit: int = 16,
    blocks: list[int] | None = None,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Draw which patches survive, or merge, at each cut.

    Args:
        model: a timm name, a folder written by vitrim, or a run folder.
        images: folder of images, or one image.
        out: folder for the pictures.
        method: reduction to show, such as "TopK() @ KeepRate(0.7)"; by default the model's own.
        montage: one picture for all images.
        scores: add a heat map of the scores on which each cut was decided.
        limit: images at most.
        blocks: show these blocks instead of every cut.
        overwrite: replace pictures that exist.
        device: where to run.
    """
    from .models import has_weights, open_model, variant
    from .show.pictures import show as draw

    if not has_weights(model):
        print(f"vitrim show: weights are random; write {model}@pretrained or {model}@FILE", file=sys.stderr)
    drawn = draw(
        variant(open_model(model), method), images, out, montage=montage, scores=scores, limit=limit, blocks=blocks,
        overwrite=overwrite, device=None if device == "auto" else device,
    )  # fmt: skip
    for line in (*drawn, *drawn.skipped):
        print(line)


def stratify(
    model: str,
    data: DataSpec,
    out: str,
    num_images: int = 1024,
    labels: bool = False,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Turn a trained model into a super-network from which smaller ones are cut; needs images, no labels, no training.

    Args:
        model: a timm name with weights (NAME@FILE), a folder written by vitrim, or a run folder.
        data: the images; those of the training split are looked at.
        out: folder for the super-network.
        num_images: images to look at.
        labels: the labels are classes of this model's head.
        overwrite: replace a model that is there already.
        device: where to run.
    """
    from .elastic.supernet import stratify as run
    from .models import check_place, open_model
    from .search.compare import data_of
    from .train.data import make_loader, plain_stream
    from .train.evaluate import make_accelerator

    check_place(out, overwrite=overwrite)
    network = open_model(model).to(make_accelerator(cpu=device == "cpu").device)
    data = data_of([model], data)
    loader, _ = make_loader(plain_stream(network, data, train=True), 64, data.workers, shuffle=True)
    supernet = run(network, ((images, classes) for images, classes, _ in loader), num_images=num_images, labels=labels)
    supernet.save(out, overwrite=overwrite)
    least = supernet.chain.macs_at(-1) / supernet.chain.macs
    print(f"{len(supernet.chain)} networks, down to {least:.1%} of the MACs, in {out}; cut one with vitrim extract")


def extract(
    supernet: str,
    out: str,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    overwrite: bool = False,
) -> None:
    """Cut the largest network that fits a budget out of a super-network, in about a second.

    Args:
        supernet: folder written by vitrim stratify.
        out: folder for the network.
        macs: budget of MACs per image; up to 1 it is a fraction, as in the other budgets.
        params: budget of parameters.
        latency: budget of milliseconds at batch size 1, measured here.
        overwrite: replace a model that is there already.
    """
    from .elastic.supernet import SuperNet
    from .measure.cost import cost
    from .models import check_place, save

    check_place(out, overwrite=overwrite)
    network = SuperNet.load(supernet).extract(macs=macs, params=params, latency=latency)
    save(network, out, overwrite=overwrite)
    print(f"{cost(network)}; written to {out}")


def report(folder: list[str], out: str | None = None) -> None:
    """Gather run, study or demo folders into one self-contained HTML page.

    Args:
        folder: run, study or demo folders.
        out: file to write; report.html in the folder by default.
    """
    from .show.report import write_report

    print(write_report(folder if len(folder) > 1 else folder[0], out))


def demo(out: str = "runs/demo", epochs: int | None = None) -> None:
    """Everything in miniature on real images, offline, in under four minutes on two cores.

    Args:
        out: folder for the runs, pictures and the report; a finished demo there is shown again, not repeated.
        epochs: passes over the digits per training; by default enough to reach 98 %.
    """
    from .demo import run_demo

    run_demo(out, epochs, command=command_line())


def list_names(
    kind: Literal[
        "all", "reducers", "scores", "schedules", "curricula", "terms", "weights", "losses", "adapters", "models"
    ] = "all",
) -> None:
    """List what can be named: reducers, scores, schedules, curricula, distillation terms, adapters, models.

    Args:
        kind: which table.
    """
    from .show.listing import listing

    print(listing(kind))


VERBS = {
    "demo": demo, "show": show, "bench": bench, "eval": evaluate, "train": train, "sweep": sweep, "study": study,
    "stratify": stratify, "extract": extract, "report": report, "list": list_names,
}  # fmt: skip


def command_line() -> str:
    """The command as the user typed it."""
    import shlex

    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def check_table(out: str | None) -> None:
    """Refuse a file that `deliver` could not write, before the work."""
    from .measure.table import FORMS
    from .output import check_file

    if out is not None:
        check_file(out, FORMS)


def deliver(table: Any, out: str | None) -> None:
    """Print a table, and write it where asked; an existing file is not overwritten."""
    print(table.text())
    if out is not None:
        table.write(out)
        print(f"written to {out}")
