"""The command: verbs to plain functions, nothing else. torch is imported inside the verbs, so that help is instant."""

import os
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any, Literal, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser, Namespace

from .errors import VitrimError
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
    print(f"test accuracy {result['test_accuracy']:.2%} (epoch {result['best_epoch'] + 1}); see {out}/result.json")


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
        data: the images.
        method: reductions to put in at test time, such as "TopK() @ KeepRate(0.7)"; "dense" takes any out.
        batch_size: images at a time.
        device: where to run.
        out: file to write the table to (.md, .csv or .json).
    """
    from .search.compare import compare

    table = compare(model, data, method or ["dense"], batch_size=batch_size, device=device)
    deliver(table, out)


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
        model: timm names or folders written by vitrim.
        method: "dense", or reductions such as "ToMe() @ ConstantR(13)".
        batch_size: one or several.
        dtype: of weights and images.
        compile: time torch.compile'd models.
        threads: CPU threads.
        rounds: rounds in which every model runs once.
        device: where to run.
        out: file to write the table to (.md, .csv or .json).
    """
    from .measure.speed import bench_methods

    chosen = None if device == "auto" else device
    for name in model:
        table = bench_methods(
            name, method or ["dense", "TopK() @ KeepRate(0.7)"], batch_sizes=tuple(batch_size), dtype=dtype,
            compile=compile, threads=threads, rounds=rounds, device=chosen,
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
        data: the images.
        method: a reduction with names in braces, such as "TopK() @ PowerLaw({r_max}, {alpha})".
        vary: values for each name ({"alpha": [1.0, 1.5, 2.0]}); with tpe, the lowest and highest value.
        search: "grid" tries all, "tpe" (Bayesian) looks for the frontier of accuracy and MACs in so many trials.
        trials: number of settings that tpe tries.
        batch_size: images at a time.
        device: where to run.
        out: file to write the table to (.md, .csv or .json).
    """
    from .search.sweep import sweep as run

    deliver(run(model, data, method, vary, search=search, trials=trials, batch_size=batch_size, device=device), out)


def study(
    file: str,
    out: str,
    scale: Literal["smoke", "small", "full"] = "small",
    root: str | None = None,
) -> None:
    """Run the rows of a study under one recipe and tabulate them; finished rows are not run again.

    Args:
        file: study file (YAML).
        out: folder of the study.
        scale: "smoke" takes seconds, "small" is for a CPU, "full" are the published settings.
        root: folder of the images, in place of the one in the file.
    """
    from .search.study import run_study
    from .show.progress import live

    with live() as report:
        table = run_study(file, out, scale=scale, root=root, command=command_line(), report=report)
    print(table.text())
    print(f"written to {out}/table.md and {out}/report.html")


def show(
    model: str,
    images: str,
    out: str,
    method: str | None = None,
    montage: bool = False,
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
        limit: images at most.
        blocks: show these blocks instead of every cut.
        overwrite: replace pictures that exist.
        device: where to run.
    """
    from .search.compare import open_model, prepared
    from .show.pictures import show as draw

    with prepared(open_model(model, device), method) as network:
        written = draw(network, images, out, montage=montage, limit=limit, blocks=blocks, overwrite=overwrite)
    for path in written:
        print(path)


def report(folder: str, out: str | None = None) -> None:
    """Gather a run, study or demo folder into one self-contained HTML page.

    Args:
        folder: run, study or demo folder.
        out: file to write; report.html in the folder by default.
    """
    from .show.report import write_report

    print(write_report(folder, out))


def demo(out: str = "runs/demo", epochs: int | None = None) -> None:
    """Everything in miniature on real images, offline, in under four minutes on two cores.

    Args:
        out: folder for the runs, pictures and the report; a finished demo there is shown again, not repeated.
        epochs: passes over the digits per training; by default enough to reach 98 %.
    """
    from .demo import run_demo

    run_demo(out, epochs, command=command_line())


def list_names(
    kind: Literal["all", "reducers", "scores", "schedules", "curricula", "adapters", "models"] = "all",
) -> None:
    """List what can be named: reducers, scores, schedules, curricula, adapters, models.

    Args:
        kind: which table.
    """
    from .show.listing import listing

    print(listing(kind))


VERBS = {
    "demo": demo, "show": show, "bench": bench, "eval": evaluate, "train": train, "sweep": sweep, "study": study,
    "report": report, "list": list_names,
}  # fmt: skip


class _Parser(ArgumentParser):
    """One line per mistake, and where to read on."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore
        lines = [line.strip() for line in str(message).strip().splitlines() if line.strip()]
        print(f"{self.prog}: {' '.join(lines)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="vitrim",
        allow_abbrev=False,
        description="Make any Vision Transformer cheaper, and say exactly what it costs.",
    )
    verbs = parser.add_subcommands(required=True, dest="verb")
    for name, function in VERBS.items():
        help_line = (function.__doc__ or "").strip().splitlines()[0]
        verb = _Parser(prog=f"vitrim {name}", description=help_line, allow_abbrev=False)
        verb.add_argument("--config", action="config", help="read options from this YAML file")
        if function is train:  # A recipe file holds the options themselves, not a `recipe:` heading.
            verb.add_class_arguments(Recipe, None)
            verb.add_argument("--out", type=str, required=True, help="run folder to create or to continue")
        else:
            _add_options(verb, function)
        verbs.add_subcommand(name, verb, help=help_line)
    return parser


def _add_options(verb: ArgumentParser, function: Callable[..., None]) -> None:
    """Options from a signature; lists take several values (`--method A B`), which jsonargparse leaves to argparse."""
    parameters = signature(function, eval_str=True).parameters
    lists = {
        name: p for name, p in parameters.items() if "list[" in str(p.annotation) and "dict[" not in str(p.annotation)
    }
    verb.add_function_arguments(function, None, as_positional=False, skip=set(lists))
    told = {p.arg_name: p.description or "" for p in docstring_parser.parse(function.__doc__ or "").params}
    for name, p in lists.items():
        kind = int if "int" in str(p.annotation) else str
        required, default = p.default is p.empty, None if p.default is p.empty else p.default
        help_line = told[name] + (" (required)" if required else "")
        verb.add_argument(f"--{name}", type=kind, nargs="+", required=required, default=default, help=help_line)


def command_line() -> str:
    """The command as the user typed it."""
    import shlex

    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def deliver(table: Any, out: str | None) -> None:
    """Print a table, and write it where asked; an existing file is not overwritten."""
    print(table.text())
    if out is not None:
        table.write(out)
        print(f"written to {out}")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; user mistakes are one line and exit code 2."""
    warnings.filterwarnings("ignore", module="torch|timm|accelerate|PIL")
    parser = build_parser()
    options: Namespace = parser.parse_args(argv)
    chosen = options[options["verb"]]
    options = parser.instantiate_classes(options)
    chosen = dict(options[options["verb"]])
    chosen.pop("config", None)
    function = VERBS[options["verb"]]
    if function is train:
        chosen = {"recipe": Recipe(**{k: v for k, v in chosen.items() if k != "out"}), "out": chosen["out"]}
    try:
        function(**chosen)
    except VitrimError as error:
        line = str(error).strip().splitlines()[-1].removeprefix("vitrim.errors.")
        print(f"vitrim {options['verb']}: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
