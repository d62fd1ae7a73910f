"""The benchmark of predicted times runs; what it finds depends on the machine and is not a test."""

import random
import sys
from pathlib import Path

import torch

from elastic_models import small

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from latency_table import compare


def test_predictions_are_compared_with_times_of_random_networks() -> None:
    model = small(torch.float32, img_size=64, depth=3, embed_dim=24, num_heads=2)
    rows = compare(model, batch_size=1, number=2, rounds=3, dice=random.Random(0))
    assert len(rows) == 2
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
    assert all(row["error"] == row["predicted"] / row["measured"] - 1 for row in rows)
