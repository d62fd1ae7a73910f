"""The joint answer beside the best answers by tokens alone and by width alone, at several budgets, trained and not.

    python benchmarks/compress.py runs/vits14 --root data/imagenette160 --out results/compress-vits14-cpu

The model is one that was trained for long, such as a run of recipes/system5/finetune-vits14.yaml. Bar: the joint answer
is never further from the given model than the best pure one by more than noise, and closer at 0.5 of the MACs and
below. Answers are kept in a folder, so that a benchmark which was stopped goes on where it was, and several processes
may each make those of one kind. In the end all are timed in the same interleaved rounds.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from vitrim.arguments import run
from vitrim.compression.certificate import Certificate
from vitrim.compression.finetune import RUN, START
from vitrim.compression.verification import open_certified
from vitrim.measure.bench_table import ratios
from vitrim.measure.environment import environment
from vitrim.measure.speed import bench
from vitrim.measure.table import Column, Table
from vitrim.models import attached, open_model
from vitrim.models.files.description import parse
from vitrim.models.files.rebuild import rebuild
from vitrim.models.files.store import DESCRIPTION, WEIGHTS, attach_described
from vitrim.options import Range
from vitrim.train.recipe import Recipe
from vitrim.verbs.compressing import compress

Kind = Literal["tokens", "width", "joint"]
Row = dict[str, Any]
PARTS: dict[str, list[Any]] = {"tokens": ["tokens"], "width": ["width"], "joint": ["tokens", "width"]}
"""Kind of answer -> what may be reduced."""
ELSEWHERE = (
    "Times are those of networks of the same shapes, since the weights of some answers were not kept; all else is from "
    "the certificates, as they were made on another machine."
)
COLUMNS = (
    Column("budget", "MACs", ".2f"), Column("kind", "kind"), Column("epochs", "epochs", "d"),
    Column("tokens", "tokens"), Column("macs", "MACs / full", ".3f"), Column("params", "params / full", ".3f"),
    Column("divergence", "KL(full || cut)", ".4f"), Column("agreement", "same class", ".1%"),
    Column("over_tokens", "KL over tokens alone", "+.4f"), Column("over_width", "KL over width alone", "+.4f"),
    Column("drop", "accuracy lost", "+.2%"), Column("time", "time / full"),
)  # fmt: skip


def main(
    folder: str,
    root: str,
    budgets: list[float] = [0.75, 0.5, 0.35, 0.25],  # noqa: B006 (shown as the default; never changed)
    kinds: list[Kind] = ["tokens", "width", "joint"],  # noqa: B006 (likewise)
    epochs: Annotated[int, Range(0, 1000)] = 1,
    limit: int | None = None,
    images: Annotated[int, Range(64, 100_000)] = 1024,
    test_images: Annotated[int, Range(16, 100_000)] = 1000,
    trials: Annotated[int, Range(0, 10_000)] = 12,
    batch_size: Annotated[int, Range(1, 4096)] = 32,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: Annotated[int, Range(0, 256)] = 2,
    threads: Annotated[int, Range(1, 1024)] = 2,
    device: Literal["auto", "cpu"] = "auto",
    models: str = "runs/compress",
    out: str | None = None,
) -> None:
    """Compress one model to several budgets and compare the answers.

    Args:
        folder: run folder of the trained model.
        root: folder of its images, with train/ and val/.
        budgets: fractions of the MACs.
        kinds: of answers.
        epochs: for which each answer learns from the given model, after it was measured as it is.
        limit: training images for that; by default all.
        images: training images for the search.
        test_images: images for the certificates.
        trials: candidates of the sampler.
        batch_size: where times are measured.
        dtype: number format where times are measured.
        workers: processes that read images while an answer learns.
        threads: CPU threads.
        device: where to run; auto takes CUDA if there is one.
        models: folder in which the answers are kept.
        out: stem of the files to write the table to; without it, answers are made and nothing is tabulated.
    """
    torch.set_num_threads(threads)
    data = {"name": "folder", "root": root, "workers": workers, "limit": limit}
    learns = {"epochs": epochs, "batch_size": 32}
    places = {(budget, kind): Path(models) / f"{kind}-{budget:g}" for budget in budgets for kind in kinds}
    for (budget, kind), place in places.items():
        if not (place / "certificate.json").is_file():
            with suppress(SystemExit):  # A budget that is not met: its row is written too.
                compress(
                    folder, data, learns if epochs else {}, str(place), macs=budget, using=PARTS[kind],
                    num_images=images, num_test_images=test_images, trials=trials, batch_size=batch_size, dtype=dtype,
                    device=device,
                )  # fmt: skip
    if out is not None:
        write(places, open_model(folder).eval(), batch_size, dtype, device, out)


def write(
    places: dict[tuple[float, str], Path], full: nn.Module, batch_size: int, dtype: str, device: str, out: str
) -> None:
    """Time all answers together, print the table, and write OUT.md, OUT.csv and OUT.json."""
    rows, networks = [], {"full": full}
    for (budget, kind), place in places.items():
        learnt = (place / START / "certificate.json").is_file()
        for stage, where in enumerate([place / START, place] if learnt else [place]):
            name = f"{kind} {budget} {stage}"
            networks[name], found = answer(where).eval(), Certificate.read(where)
            rows.append({"budget": budget, "kind": kind, "epochs": _epochs(place) if stage else 0, "name": name}
                        | figures(found, networks[name]))  # fmt: skip
    where = None if device == "auto" else device
    times = bench(networks, batch_sizes=(batch_size,), device=where, dtype=dtype, rounds=10)
    seconds = {row.name: row.seconds for row in times.measured}
    for row in rows:
        row["time"] = str(ratios(seconds[row.pop("name")], seconds["full"]))
    notes = [
        f"Times at batch size {batch_size} in {dtype}: all answers in the same interleaved rounds, median [quartiles].",
        "Intervals of 95 %: divergence by a studentised bootstrap over images, accuracy lost paired by image.",
        *([] if all(map(kept, places.values())) else [ELSEWHERE]),
        *(verdict(budget, rows) for budget in dict.fromkeys(row["budget"] for row in rows)),
    ]
    table = Table("One budget over tokens and width", COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    table.write_all(out)


def kept(folder: Path) -> bool:
    """Whether the weights of an answer are there."""
    return (folder / WEIGHTS).is_file()


def answer(folder: Path) -> nn.Module:
    """The network of an answer; where its weights were not kept, one of the same shape, which takes the same time."""
    if kept(folder):
        return open_certified(folder)[0]
    record = parse((folder / DESCRIPTION).read_text(encoding="utf-8"), folder)
    network = rebuild(record)
    attach_described(network, record)
    return network


def figures(found: Certificate, network: nn.Module) -> Row:
    """What a certificate states, as cells of a row."""
    handle = attached(network)
    row: Row = {"tokens": "all" if handle is None or handle.reduction is None else str(handle.reduction)}
    for key in ("macs", "params"):
        row[key] = found[key].value / found[key].of
    for key in ("divergence", "agreement", "drop", "over_tokens", "over_width"):
        if key in found:
            row |= found[key].cells
    return row


def verdict(budget: float, rows: Sequence[Row]) -> str:
    """Whether the bar is met at one budget without training, in words.

    The pure answers are those of the same search, compared image by image.
    """
    found = [row for row in rows if row["budget"] == budget and row["kind"] == "joint" and not row["epochs"]]
    where = f"At {budget:g} of the MACs, without training,"
    if not found:
        return f"{where} the joint answer was not made."
    joint = found[0]
    over = [(joint[f"{key}_low"], joint[f"{key}_high"]) for key in ("over_tokens", "over_width") if key in joint]
    stands = f"the joint answer has KL {joint['divergence']:.4f}"
    if any(low > 0 for low, _ in over):
        return f"{where} {stands}: the pure answer of its search is closer, bar not met."
    if over and all(high < 0 for _, high in over):
        return f"{where} {stands}: closer beyond noise than the other answers of its search, bar met."
    met = "met" if budget > 0.5 else "not met"
    return f"{where} {stands}: within noise of the better pure answer of its search, bar {met}."


def _epochs(place: Path) -> int:
    return Recipe.read(place / RUN / "recipe.yaml").epochs


if __name__ == "__main__":
    run(main, "benchmarks/compress.py")
