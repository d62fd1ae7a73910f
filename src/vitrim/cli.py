"""The command: verbs to plain functions, nothing else. torch is imported inside the verbs, so that help is instant."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, Literal, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser, set_parsing_settings

from . import __version__
from .errors import VitrimError
from .train.recipe import DataSpec, Recipe
from .train.stopping import Stopped

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


POSITIONAL = ("model", "file", "folder", "kind", "supernet")
"""What a verb is about stands behind it without a name."""


class _Parser(ArgumentParser):
    """One line per mistake, with the nearest valid names, and where to read on."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # pyright: ignore
        parser = getattr(ex, "subcommand_parser", None) or self
        line, prog = " ".join(str(message).split()), parser.prog
        known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        if found := re.search(r"unrecognized arguments: --([^ =]+)|does not accept option '([^']+)'", line):
            line = _unknown("option", "--" + (found[1] or found[2]), known)
        elif found := re.search(r"argument verb: invalid choice: '([^']*)'", line):
            line = _unknown("verb", found[1], VERBS)
        elif found := re.search(
            r'"([\w.]+)": .*?(?:Expected a|Subtypes:) (.*?)\.? (?:Errors: .* value: |Got value: )(.*)', line
        ):
            line = f"{found[1]} is {found[3]!r}; it must be {_kinds(found[2])}"
        elif found := re.search(r"arguments are required: (?:(\w+)\.)?(.*)", line):
            line, prog = f"missing: {found[2]}", f"vitrim {found[1]}" if found[1] else prog
        elif 'expected "verb"' in line:
            line = f"missing: one of {', '.join(VERBS)}"
        print(f"{prog}: {line} (see {prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _kinds(types: str) -> str:
    if choices := re.search(r"Literal\[(.*?)\]", types):
        return f"one of {choices[1]}"
    said = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text", "NoneType": "null"}
    return " or ".join(said.get(name, name) for name in re.findall(r"<class '(?:[\w.]*\.)?(\w+)'>", types)) or types


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"unknown {kind} {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="vitrim",
        version=__version__,
        allow_abbrev=False,
        description="Make any Vision Transformer cheaper, and say exactly what it costs.",
    )
    verbs = parser.add_subcommands(required=True, dest="verb", metavar="verb")
    for name, function in VERBS.items():
        help_line = (function.__doc__ or "").strip().splitlines()[0]
        verb = _Parser(description=help_line)
        verb.add_argument("--config", action="config", help="read options from this YAML file")
        _add_options(verb, function)
        verbs.add_subcommand(name, verb, help=help_line)
        verb.prog = f"vitrim {name}"
    return parser


def _add_options(verb: ArgumentParser, function: Callable[..., None]) -> None:
    """Options from a signature and its docstring: classes give groups, lists take several values, booleans none."""
    told = {p.arg_name: p.description or "" for p in docstring_parser.parse(function.__doc__ or "").params}
    for name, parameter in signature(function, eval_str=True).parameters.items():
        kind, required = parameter.annotation, parameter.default is parameter.empty
        if is_dataclass(kind):  # A recipe file holds the options themselves, not a `recipe:` heading.
            verb.add_class_arguments(kind, None if kind is Recipe else name)
            continue
        options: dict[str, Any] = {"help": told[name], "type": kind}
        if "list[" in str(kind) and "dict[" not in str(kind):
            options |= {"type": int if "int" in str(kind) else str, "nargs": "+"}
        if not required:
            options["default"] = parameter.default
        if name in POSITIONAL:
            verb.add_argument(name, **({} if required else {"nargs": "?"}) | options)
        else:
            verb.add_argument(f"--{name}", required=required, **options)
    for action in verb._actions:
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True


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


def main(argv: list[str] | None = None) -> None:
    """Run one verb; user mistakes are one line and exit code 2."""
    warnings.filterwarnings("ignore", module="torch|timm|accelerate|PIL")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # It looks for a compiler nobody needs.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = build_parser()
    try:
        parsed = parser.parse_args(argv)
    except UnicodeDecodeError as error:
        parser.error(f"the file given by --config is not text in UTF-8 ({error.reason} at byte {error.start})")
    verb = parsed["verb"]
    options = dict(parser.instantiate(parsed)[verb])
    options.pop("config", None)
    if verb == "train":
        out = options.pop("out")
        options = {"recipe": Recipe(**options), "out": out}
    try:
        if options.get("device") == "cuda":
            _expect_cuda()
        VERBS[verb](**options)
    except VitrimError as error:  # A worker process wraps it in a traceback, of which it is the last line.
        line = str(error).strip().splitlines()[-1].removeprefix("vitrim.errors.")
        _leave(verb, re.sub(r"^\w+Error: ", "", line), 2)
    except Stopped as stopped:
        _leave(verb, str(stopped), stopped.code)
    except KeyboardInterrupt:
        _leave(verb, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The interpreter flushes it once more.
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is None:
            raise  # Not about a file, so that nobody can tell what to do.
        _leave(verb, f"{error.filename}: {error.strerror}", 2)


def _expect_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise VitrimError("there is no CUDA device here; use --device cpu")


def _leave(verb: str, line: str, code: Any) -> NoReturn:
    print(f"vitrim {verb}: {line}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
