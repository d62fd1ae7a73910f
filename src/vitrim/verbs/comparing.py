"""Verbs that put models and methods side by side: their accuracy, their speed."""

from typing import Literal

from ..errors import VitrimError
from .delivery import TRAINING_ONLY, Count, Device, Pixels, TestImages, Threads, check_table, check_used, deliver
from .images import images_of


def evaluate(
    model: list[str],
    data: TestImages,
    method: list[str] | None = None,
    batch_size: Count = 128,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Evaluate models, each as it is or under every method, side by side.

    Args:
        model: timm names, NAME@FILE (with weights from a file), folders written by vitrim or transformers, hf:NAME, or
            run folders.
        data: the test images; by default those of the first model, if it is a run folder or one written by
            vitrim compress.
        method: reductions to attach at test time, such as "TopK() @ KeepRate(0.7)"; "dense" removes any, "own" keeps
            what is attached. By default each model is evaluated as it is.
        batch_size: images at a time.
        device: where to run.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    check_table(out)
    check_used("eval", data, TRAINING_ONLY, "the test images")
    from ..showing.progress import live
    from ..study.compare import compare

    images = images_of(model, data)
    with live() as report:
        tick = lambda done, batches: report("evaluation", {"done": done, "batches": batches})  # noqa: E731
        table = compare(model, images, method, batch_size=batch_size, device=device, tick=tick)
    deliver(table, out)


def bench(
    model: list[str],
    method: list[str] | None = None,
    batch_size: list[Count] = [32],  # noqa: B006 (shown as the default; never changed)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    graphs: bool = False,
    threads: Threads | None = None,
    rounds: Count = 10,
    image_size: Pixels | None = None,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Time models and methods side by side, in interleaved rounds, as ratios to the first.

    Args:
        model: timm names, NAME@FILE (with weights from a file), folders written by vitrim or transformers, hf:NAME, run
            folders, or files for other runtimes (.onnx, .pt2; a .pt2 file is a program, so name none that you do not
            trust).
        method: "dense", "own" (what is attached), or reductions such as "ToMe() @ ConstantR(13)". By default each model
            runs as it is, as files always do.
        batch_size: images at a time.
        dtype: number format of weights and images.
        compile: compile the models with torch.compile first.
        graphs: replay models as CUDA graphs, without the time that Python takes between kernels.
        threads: number of CPU threads; by default PyTorch's own choice.
        rounds: number of rounds; in each, every model runs once.
        image_size: side of square images in pixels; by default each model's own.
        device: where to run.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    check_table(out)
    from ..measure.served import is_file
    from ..measure.speed import bench as run

    if method and all(map(is_file, model)):
        raise VitrimError("files run as they are, so that --method would have no effect; leave it out")
    table = run(
        model, method, batch_sizes=tuple(batch_size), dtype=dtype, compile=compile, graphs=graphs, threads=threads,
        rounds=rounds, input_size=image_size, device=None if device == "auto" else device,
    )  # fmt: skip
    deliver(table, out)
