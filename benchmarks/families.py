"""How much faster models of other families become, each at its own image size: dense beside reduced.

    python benchmarks/families.py --threads 2 --out results/bench-families-cpu
    python benchmarks/families.py --device cuda --dtype bfloat16 --graphs --out results/bench-families-cuda

Weights are random, on which speed does not depend. Towers that average or pool their patches have no CLS token, so that
their tokens are chosen by the attention that they receive. The process should have the machine to itself.
"""

from typing import Annotated

from torch import nn

from vitrim import arguments, build_model
from vitrim.measure.speed import bench
from vitrim.models import variant
from vitrim.models.finding import find_adapter
from vitrim.options import Range

MODELS = {
    "DINOv3-S/16": "vit_small_patch16_dinov3",
    "EVA-02-S/14": "eva02_small_patch14_336",
    "PE-core-T/16": "vit_pe_core_tiny_patch16_384",
    "SigLIP 2-B/16": "vit_base_patch16_siglip_224",
}
"""How a table calls a model -> its name in timm."""


def methods_for(model: nn.Module) -> list[str]:
    """Dense, EViT at two keep rates, and ToMe that removes as much as EViT at the higher one."""
    geometry = find_adapter(model).geometry(model)
    score = "cls_attention" if geometry.has_cls else "mean_attention"
    pruned = [f"TopK({score}, fuse=sum) @ KeepRate({rate})" for rate in (0.7, 0.5)]
    return ["dense", *pruned, f"ToMe() @ ConstantR({geometry.num_patches // 15})"]


def main(
    models: list[str] = list(MODELS),  # noqa: B006 (shown as the default; never changed)
    batch_sizes: list[int] = [8],  # noqa: B006 (likewise)
    rounds: Annotated[int, Range(2, 1000)] = 10,
    threads: Annotated[int | None, Range(1, 1024)] = None,
    device: str | None = None,
    dtype: str = "float32",
    compile: bool = False,
    graphs: bool = False,
    out: str | None = None,
) -> None:
    """Time models of several families, dense and reduced.

    Args:
        models: names in the table of this file, or of timm.
        batch_sizes: images per forward pass.
        rounds: in which every network is timed once.
        threads: CPU threads; by default as they are.
        device: by default CUDA if there is one.
        dtype: of weights and images.
        compile: run all through torch.compile.
        graphs: replay all as CUDA graphs.
        out: stem of the files to write the table to.
    """
    networks: dict[str, nn.Module] = {}
    references: dict[str, str] = {}
    for name in models:
        whole = build_model(MODELS.get(name, name)).eval()
        for method in methods_for(whole):
            networks[f"{name}: {method}"] = variant(whole, method)
            references[f"{name}: {method}"] = f"{name}: dense"
    table = bench(
        networks, batch_sizes=batch_sizes, rounds=rounds, threads=threads, device=device, dtype=dtype, compile=compile,
        graphs=graphs, references=references,
    )  # fmt: skip
    print(table.text())
    if out is not None:
        table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/families.py")
