"""Whether a reduced vision tower that gives every surviving token is faster than the dense one, at small batches too.

    python benchmarks/towers.py --threads 2
    python benchmarks/towers.py --device cuda --dtype bfloat16

The tower is CLIP-L/14 at 336 px with random weights, on which speed does not depend. It
computes all tokens of all blocks. Both run in interleaved rounds.
"""

from typing import Annotated, Literal

from torch import nn

from vitrim import attach, build_model
from vitrim.arguments import run
from vitrim.measure.speed import bench
from vitrim.models import open_model
from vitrim.options import Range

LARGE = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}


def main(
    model: str | None = None,
    reduction: str = "TopK(cls_attention, fuse=mean) @ KeepRate(0.111, at=8)",
    batch_size: list[int] = [1, 4, 16],  # noqa: B006 (shown as the default; never changed)
    rounds: Annotated[int, Range(2, 1000)] = 10,
    threads: Annotated[int | None, Range(1, 1024)] = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    graphs: bool = False,
    out: str | None = None,
) -> None:
    """Time a tower, dense and reduced.

    Args:
        model: what `vitrim bench` takes; CLIP-L/14 at 336 px by default.
        reduction: how its tokens are reduced; by default 64 of 576 are kept after a third of the blocks, and one fused
            token stands for the others.
        batch_size: images per forward pass.
        rounds: in which every network is timed once.
        threads: CPU threads; by default as they are.
        device: by default CUDA if there is one.
        dtype: of weights and images.
        compile: run both through torch.compile.
        graphs: replay both as CUDA graphs.
        out: stem of the files to write the table to.
    """
    table = bench(
        towers(model, reduction), batch_sizes=batch_size, rounds=rounds, threads=threads, device=device, dtype=dtype,
        compile=compile, graphs=graphs,
    )  # fmt: skip
    print(table.text())
    if out is not None:
        table.write_all(out)


def towers(model: str | None, reduction: str) -> dict[str, nn.Module]:
    """The same tower, dense and reduced."""
    found = {"dense": _opened(model), reduction: _opened(model)}
    attach(found[reduction], reduction)
    return found


def _opened(model: str | None) -> nn.Module:
    if model is not None:
        return open_model(model).eval()
    return build_model("CLIPVisionModel", **LARGE, num_attention_heads=16).eval()


if __name__ == "__main__":
    run(main, "benchmarks/towers.py")
