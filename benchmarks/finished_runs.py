"""The accuracy of every finished run of a study, for a study that was stopped before all of them were.

    python benchmarks/finished_runs.py runs/system4-real --seeds 0 --out results/system4-real/finished

Accuracies are those that the runs wrote down themselves, of their best epochs on all test images. `vitrim study` tests
the models of all rows together, and times them, once all runs are finished.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from vitrim import arguments
from vitrim.errors import DataError
from vitrim.measure.columns import columns
from vitrim.measure.table import Table
from vitrim.train.checkpoint import RunFolder

COLUMNS = columns("row", "accuracy", "accuracy_std", "n", "gmacs", "params", "train_seconds", "tokens")


def row_of(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the finished seeds of one row."""
    accuracies = [result["test_accuracy"] for result in results]
    return {
        "row": name, "accuracy": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None, "n": len(accuracies),
        "gmacs": results[0]["macs"] / 1e9, "params": results[0]["params"],
        "train_seconds": statistics.fmean(result["train_seconds"] for result in results),
        "tokens": results[0]["tokens"],
    }  # fmt: skip


def main(folder: str, seeds: list[int] | None = None, out: str | None = None) -> None:
    """Print the table, and write OUT.md, OUT.csv and OUT.json.

    Args:
        folder: of a study, with a folder ROW-sSEED for each run.
        seeds: which runs; all by default. Rows can be compared where the same seeds are finished.
        out: stem of the files to write.
    """
    runs = sorted(path for path in Path(folder).glob("*-s*") if path.is_dir())
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    environment: dict[str, Any] = {}
    for run in map(RunFolder, runs):
        row, _, seed = run.path.name.rpartition("-s")
        if seeds is not None and seed not in map(str, seeds):
            continue
        if run.result is not None and run.result.get("test_accuracy") is not None:
            found[row].append(run.result)
            environment = json.loads((run.path / "environment.json").read_text())
    if not found:
        raise DataError(f"{folder} holds no finished run that learns classes")
    rows = [row_of(name, results) for name, results in found.items()]
    rows.sort(key=lambda row: row["row"])
    table = Table(f"Finished runs of {Path(folder).name}", COLUMNS, rows, environment=environment)
    print(table.text())
    if out is not None:
        table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/finished_runs.py")
