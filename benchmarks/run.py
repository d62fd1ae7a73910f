"""Produces the committed speed table: reductions and their plain counterparts beside dense timm, in interleaved rounds.

    python benchmarks/run.py --threads 2 --rounds 10 --out results/bench-deit-s-cpu
    python benchmarks/run.py --device cuda --dtype bfloat16 --batch_sizes 256 32 --out results/bench-deit-s-cuda
    python benchmarks/run.py --device cuda --dtype bfloat16 --batch_sizes 1 --graphs --out results/bench-deit-s-cuda-1

The process should have the machine to itself.
"""

from collections.abc import Sequence
from pathlib import Path

from baselines import evit_materialised, first_tokens, tome_materialised
from vitrim import arguments, cost
from vitrim.measure.bench_table import BenchTable
from vitrim.measure.speed import bench
from vitrim.models import build_model, variant

METHODS = {
    "TopK() @ KeepRate(0.7)": "evit-materialised 0.7",
    "TopK(fuse=sum) @ KeepRate(0.7)": "evit-materialised 0.7",
    "TopK() @ KeepRate(0.5)": "evit-materialised 0.5",
    "TopK(fuse=sum) @ KeepRate(0.5)": "evit-materialised 0.5",
    "ToMe() @ ConstantR(13)": "tome-materialised r=13",
    "Cluster() @ ConstantR(13)": None,
    "Cluster() @ KeepRate(0.7, at=(0, 4))": None,
    "TopK() @ PowerLaw(0.6, 2.0)": None,
}
"""Each reduction with the plain form of the same method, where there is one."""


def free_form(method: str) -> str:
    """The name of the network that has as many tokens as this reduction leaves, and does nothing to choose them."""
    return f"first tokens, as many as {method}"


def compare(table: BenchTable, batch_sizes: Sequence[int]) -> str:
    """Every reduction against dense, against as few tokens chosen for free, and against its plain form, in Markdown."""
    lines = [
        "| model | batch | over dense | with tokens chosen for free | over plain form | plain form |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for batch_size in batch_sizes:
        for method, plain in METHODS.items():
            over_plain = table.speedup(method, plain, batch_size) if plain else "-"
            over_dense, free = (table.speedup(each, "dense", batch_size) for each in (method, free_form(method)))
            lines.append(f"| `{method}` | {batch_size} | {over_dense} | {free} | {over_plain} | {plain or '-'} |")
    return "\n".join(lines) + "\n"


def main(
    model: str = "deit_small_patch16_224",
    batch_sizes: list[int] = [32, 1],  # noqa: B006 (never changed)
    threads: int | None = 2,
    rounds: int = 20,
    compile: bool = False,
    graphs: bool = False,
    dtype: str = "float32",
    device: str | None = "cpu",
    out: str = "results/bench-deit-s-cpu",
) -> None:
    """Measure, print, and write OUT.md and OUT.json."""
    dense = build_model(model)
    models = {"dense": dense, **{method: variant(dense, method) for method in ("dense+cls_only", *METHODS)}}
    for rate in (0.7, 0.5):
        models[f"evit-materialised {rate}"] = evit_materialised(dense, rate)
    models["tome-materialised r=13"] = tome_materialised(dense, 13)
    for method in METHODS:
        models[free_form(method)] = first_tokens(dense, cost(models[method]).token_counts)
    table = bench(
        models, batch_sizes=batch_sizes, threads=threads, rounds=rounds, compile=compile, graphs=graphs, dtype=dtype,
        device=device,
    )  # fmt: skip
    text = f"# Speed of {model}\n\n{table.markdown()}\n## Against the plain forms\n\n{compare(table, batch_sizes)}"
    print(text)
    table.write(f"{out}.json", overwrite=True)
    Path(f"{out}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    arguments.run(main, "benchmarks/run.py")
