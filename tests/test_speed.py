"""Speed measurement: what is counted, compared and written; and the plain baselines it is compared with."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils import benchmark

import vitrim
from clocks import Clock
from vitrim.errors import UnknownNameError, VitrimError
from vitrim.measure.bench_table import BenchRow, BenchTable, Quartiles, ratios
from vitrim.measure.environment import environment
from vitrim.measure.speed import bench
from vitrim.models import open_model, variant
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import baselines


def tiny(**options):
    torch.manual_seed(0)
    args = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5, **options}
    return timm.create_model("vit_tiny_patch16_224", **args).eval()


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only models that are known to take time do."""
    monkeypatch.setattr(benchmark, "timer", CLOCK.read)


class Sleeper(nn.Module):
    """A model whose time is known, and that records when it is called."""

    def __init__(self, seconds, log=None, name=""):
        super().__init__()
        self.seconds, self.log, self.name = seconds, log, name
        self.weight = nn.Parameter(torch.zeros(1))

    def __deepcopy__(self, memo):
        return Sleeper(self.seconds, self.log, self.name)

    def forward(self, x):
        if x.device.type != "meta":
            CLOCK.sleep(self.seconds)
            if self.log is not None:
                self.log.append((self.name, tuple(x.shape), x.dtype, torch.is_inference_mode_enabled()))
        return x.mean() + self.weight


@pytest.mark.usefixtures("clock")
def test_ratio_of_known_times():
    table = bench({"slow": Sleeper(0.02), "fast": Sleeper(0.005)}, batch_sizes=(4,), input_size=8, rounds=5, warmup=1)
    slow, fast = table.row("slow", 4), table.row("fast", 4)
    assert slow.speedup == Quartiles(1.0, 1.0, 1.0)
    assert slow.ms.median == pytest.approx(20, rel=1e-4)
    assert fast.ms.median == pytest.approx(5, rel=1e-4)
    assert fast.speedup.median == pytest.approx(np.median(np.divide(slow.seconds, fast.seconds)))
    assert fast.images_per_second == pytest.approx(4 / np.median(fast.seconds))
    assert table.speedup("fast", "slow", 4) == fast.speedup
    assert table.speedup("slow", "fast", 4).median < 1


def test_rounds_are_interleaved_shuffled_and_warm():
    log = []
    models = {name: Sleeper(0.0, log, name) for name in "abc"}
    table = bench(models, batch_sizes=(2,), input_size=(1, 4, 6), rounds=12, warmup=3, dtype="bfloat16", device="cpu")
    names = [entry[0] for entry in log]
    rounds = [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]
    assert len(rounds) == 15
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1
    assert {entry[1:] for entry in log} == {((2, 1, 4, 6), torch.bfloat16, True)}
    assert all(len(row.seconds) == 12 for row in table.measured)


def test_ratios_within_rounds_cancel_drift():
    drift = (1.0, 10.0, 100.0)
    quartiles = ratios([2 * second for second in drift], drift)
    assert quartiles == Quartiles(2.0, 2.0, 2.0)
    assert Quartiles.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Quartiles(3.0, 2.0, 4.0)


@pytest.mark.usefixtures("clock")
def test_latency_percentiles_at_batch_1_only():
    table = bench({"a": Sleeper(0.001)}, batch_sizes=(1, 2), input_size=4, rounds=2, warmup=0)
    p50, p95 = table.row("a", 1).latency_ms
    assert (p50, p95) == (pytest.approx(1, rel=1e-4), pytest.approx(1, rel=1e-4))
    assert table.row("a", 2).latency_ms is None


def test_models_are_left_as_they_are():
    model = tiny().train()
    handle = vitrim.attach(model, "TopK() @ KeepRate(0.5)")
    threads = torch.get_num_threads()
    bench({"m": model}, batch_sizes=(1,), dtype="bfloat16", device="cpu", threads=threads + 1, rounds=1, warmup=0)
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    assert vitrim.attached(model) is handle
    assert torch.get_num_threads() == threads


def test_methods_count_what_the_model_executes():
    model = tiny()
    methods = ("dense", "dense+cls_only", "TopK() @ KeepRate(0.5)", "ToMe() @ ConstantR(3)")
    table = bench(model, methods, batch_sizes=(2,), rounds=2, warmup=0, device="cpu")
    dense = vitrim.cost(model).macs
    assert table.row("dense", 2).macs == dense
    for method in methods[1:]:
        row = table.row(method, 2)
        assert row.macs == vitrim.cost(variant(model, method)).macs < dense
        assert row.macs_ratio == pytest.approx(dense / row.macs)
        assert row.reference == "dense"
    assert vitrim.attached(model) is None


def test_prefix_only_last_block_where_the_head_allows_it():
    token, pooled = variant(tiny(), "TopK() @ KeepRate(0.5)"), tiny(global_pool="avg", class_token=False)
    assert vitrim.attached(token).cls_only
    assert not vitrim.attached(variant(pooled, "TopK(score=norm) @ KeepRate(0.5)")).cls_only
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(variant(tiny(), "dense+cls_only")(x), tiny()(x), rtol=1e-5, atol=1e-6)


def test_a_reduced_model_can_be_measured_as_it_is_or_dense():
    model = tiny()
    vitrim.attach(model, "TopK() @ KeepRate(0.5)")
    assert vitrim.attached(variant(model, "dense")) is None
    assert str(vitrim.attached(variant(model, "own")).reduction) == str(vitrim.attached(model).reduction)
    assert "ToMe" in str(vitrim.attached(variant(model, "ToMe() @ ConstantR(2)")).reduction)


def test_models_may_be_given_in_every_form():
    model, options = tiny(), {"batch_sizes": (2,), "rounds": 1, "warmup": 0, "device": "cpu"}
    names = lambda table: [row.name for row in table.measured]  # noqa: E731
    assert names(vitrim.bench(model, **options)) == ["dense"]
    assert names(vitrim.bench(model, "TopK() @ KeepRate(0.5)", **options)) == ["TopK() @ KeepRate(0.5)"]
    assert names(vitrim.bench({"mine": model}, **options)) == ["mine"]
    table = vitrim.bench({"a": model, "b": tiny(depth=1)}, ["dense", "ToMe() @ ConstantR(3)"], **options)
    assert names(table) == ["a: dense", "a: ToMe() @ ConstantR(3)", "b: dense", "b: ToMe() @ ConstantR(3)"]
    assert [row.reference for row in table.measured] == ["a: dense"] * 2 + ["b: dense"] * 2
    with pytest.raises(VitrimError, match="None is not a model"):
        vitrim.bench(None)  # type: ignore[arg-type]


def test_several_models_each_have_their_own_reference():
    table = bench(
        ["vitrim_digits_vit", "vitrim_cifar_vit"],
        ("dense", "TopK() @ PowerLaw()"),
        batch_sizes=(2,),
        rounds=1,
        warmup=0,
        device="cpu",
    )
    assert [row.reference for row in table.measured] == ["vitrim_digits_vit: dense"] * 2 + [
        "vitrim_cifar_vit: dense"
    ] * 2
    assert all(row.macs_ratio > 1 for row in table.measured if "TopK" in row.name)


def test_compiled_models_are_measured(monkeypatch):
    compiled = []

    def compile_quickly(model, **options):
        compiled.append((model, options))
        return genuine(model, backend="eager", fullgraph=True, **options)

    genuine = torch.compile
    monkeypatch.setattr(torch, "compile", compile_quickly)
    models = {name: variant(tiny(depth=1), name) for name in ("dense", "TopK() @ KeepRate(0.5, at=0)")}
    table = bench(models, batch_sizes=(2, 3), rounds=1, warmup=1, compile=True, device="cpu")
    assert len(compiled) == 4
    assert all(options == {"dynamic": False} for _, options in compiled)
    assert "compile True" in table.markdown()


def test_no_row_is_left_uncompiled(monkeypatch, two_forms):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    genuine = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: genuine(model, backend=count, **options))
    models = {f"r={r}": variant(tiny(depth=2), f"ToMe() @ ConstantR({r})") for r in (1, 2)}
    bench(models, batch_sizes=(2, 3), rounds=1, warmup=1, compile=True, device="cpu")
    assert len(compiled) == 2 * len(models)


def test_macs_of_foreign_models_come_from_pytorch():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    looks_at_values = type("Looks", (nn.Module,), {"forward": lambda self, x: x if x.sum().item() > 0 else -x})()
    table = bench({"a": linear, "b": looks_at_values}, batch_sizes=(3,), input_size=2, rounds=1, warmup=0, device="cpu")
    assert table.row("a", 3).macs == 84
    assert table.row("b", 3).macs is None
    assert table.row("b", 3).macs_ratio is None


def test_table_in_every_format(tmp_path):
    row = BenchRow("TopK()", "dense", 8, (0.5, 0.25, 0.5), Quartiles(2.0, 1.5, 2.5), (1.0, 2.0), 1000, 1.5)
    dense = BenchRow("dense", "dense", 8, (1.0, 1.0, 1.0), Quartiles(1.0, 1.0, 1.0), macs=1500, macs_ratio=1.0)
    table = BenchTable.of((dense, row), {"torch": "1.2"}, {"rounds": 3})
    assert "| TopK() | 8 | 500.00 [375.00, 500.00] | 16.0 | 2.00 [1.50, 2.50] | 1.50 | 1,000 |" in table.markdown()
    assert "peak" not in table.markdown()
    assert "torch 1.2" in table.markdown()
    assert "rounds 3" in table.markdown()
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert (lines[1]["speedup_low"], lines[1]["seconds"]) == ("1.5", "0.5 0.25 0.5")
    table.write(tmp_path / "bench.json")
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rows"][1]["seconds"] == [0.5, 0.25, 0.5]
    assert data["environment"] == {"torch": "1.2"}
    with pytest.raises(UnknownNameError, match="TopK"):
        table.row("TopK", 8)


def test_environment_counts_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert environment()["processes"] == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment()["processes"] == 4


def test_environment_names_versions_but_nobody():
    import getpass
    import platform

    found = environment()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["timm"] == timm.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    text = json.dumps({name: value for name, value in found.items() if name not in ("cpu", "gpu")})
    assert "/" not in text
    assert platform.node() not in text.split('"')
    assert getpass.getuser() not in text.split('"')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "nothing to measure"),
        ({"batch_sizes": ()}, "nothing to measure"),
        ({"batch_sizes": (0,)}, "batch size is 1 or more"),
        ({"rounds": 0}, "rounds is 1 or more"),
        ({"threads": -1}, "threads is 1 or more"),
        ({"dtype": "float23"}, "did you mean float32"),
        ({"references": {"a": "z"}}, "unknown model 'z'"),
        ({"input_size": None}, "give input_size"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message):
    with pytest.raises(VitrimError, match=message) as caught:
        bench(**{"models": {"a": Sleeper(0.0)}, "input_size": 4, "rounds": 1, **options})
    assert "\n" not in str(caught.value)


def test_wrong_names_of_models_and_methods():
    with pytest.raises(UnknownNameError, match="deit_small_patch16_224"):
        bench("deit_smal_patch16_224", rounds=1)
    with pytest.raises(VitrimError, match="TopK"):
        bench(tiny(), ("dense", "TopKk() @ KeepRate(0.5)"), rounds=1)
    with pytest.raises(VitrimError, match="named twice"):
        bench(tiny(), ("dense", "dense"), rounds=1)
    with pytest.raises(VitrimError, match="at least one"):
        bench([], ("dense",))


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_evit_baseline_computes_the_same_logits(rate):
    model = tiny(depth=4, init_values=0.5).double()
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    reduced = variant(model, f"TopK(fuse=sum) @ KeepRate({rate})")
    expected = baselines.evit_materialised(model, rate)(x)
    assert (expected - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(reduced(x), expected, rtol=0, atol=1e-12)


def test_tome_baseline_computes_the_same_logits():
    # One block that merges and one that weighs by size: further merges pair tokens in another order (see baselines).
    model = tiny(depth=3).double()
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    plain = baselines.tome_materialised(model, 5)
    for block in plain.model.blocks[1:]:
        block.r = 0
    reduced = variant(model, "ToMe() @ Counts([11, 11, 11])")
    expected = plain(x)
    assert (expected - model(x)).abs().max() > 1e-4
    torch.testing.assert_close(reduced(x), expected, rtol=0, atol=1e-12)


def test_tokens_chosen_for_free_are_the_first_and_as_many():
    model = tiny(depth=3).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(baselines.first_tokens(model, (17, 17, 17))(x), model(x))
    free = baselines.first_tokens(model, (17, 9, 4))
    entered: list[int] = []
    for block in free.model.blocks:
        block.register_forward_pre_hook(lambda block, tokens: entered.append(tokens[0].shape[1]))
    free(x)
    assert entered == [17, 17, 9]


def test_baselines_are_measured_and_counted():
    model = tiny()
    models = {
        "dense": model,
        "evit": baselines.evit_materialised(model, 0.5),
        "tome": baselines.tome_materialised(model, 3),
    }
    table = bench(models, batch_sizes=(2,), rounds=1, warmup=0, device="cpu")
    dense, evit = table.row("dense", 2).macs, table.row("evit", 2).macs
    assert vitrim.cost(variant(model, "TopK(fuse=sum) @ KeepRate(0.5)")).macs < evit < dense
    assert table.row("tome", 2).macs_ratio > 1


def test_saved_models_and_names_share_one_table(tmp_path: Path):
    run = tmp_path / "run"
    model = open_model("vitrim_digits_vit")
    vitrim.save(model, run / "model")
    table = bench(
        [str(run), f"vitrim_digits_vit@{run / 'model'}", "vitrim_digits_vit"], batch_sizes=(2,), rounds=1, warmup=0,
        device="cpu",
    )  # fmt: skip
    names = [f"{run}: dense", f"vitrim_digits_vit@{run / 'model'}: dense", "vitrim_digits_vit: dense"]
    assert [row.name for row in table.measured] == names
    assert len({row.macs for row in table.measured}) == 1
    assert table.columns[0].heading == "model"
    opened = open_model(f"vitrim_digits_vit@{run / 'model'}")
    assert torch.equal(opened.pos_embed, model.pos_embed)


def test_graphs_are_refused_where_there_is_no_cuda():
    with pytest.raises(VitrimError, match="graphs are those of CUDA, but models run on cpu; leave graphs out"):
        bench({"dense": timm.create_model("vit_tiny_patch16_224", depth=1)}, graphs=True, device="cpu")


def test_compilation_without_a_compiler_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    model = vitrim.build_model("vitrim_digits_vit", depth=2, embed_dim=24, num_heads=2)
    pixels, line = (
        torch.rand(80, 1, 8, 8),
        r"no compiler here; install g\+\+ or clang\+\+, name one in CXX, or l",
    )
    with pytest.raises(VitrimError, match=line):
        bench({"model": model}, compile=True, device="cpu")
    with pytest.raises(VitrimError, match=line):
        vitrim.compress(model, pixels, macs=0.5, compile=True, device="cpu")
    recipe = Recipe.from_dict({"compile": True, "epochs": 1, "data": {"limit": 60, "workers": 0}})
    with pytest.raises(VitrimError, match=line):
        train(recipe, "not-made")
    assert not Path("not-made").exists()
