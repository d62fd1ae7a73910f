"""Verbs that show something: pictures, reports, the demonstration, and lists of names."""

from typing import Annotated, Literal

from ..errors import VitrimError
from ..options import Range
from ..verb_help import UsageError
from .delivery import Count, Device, Pixels, command_line, say


def show(
    model: str,
    images: str | None = None,
    out: str | None = None,
    method: str | None = None,
    montage: bool = False,
    scores: bool = False,
    limit: Count = 16,
    blocks: list[Annotated[int, Range(0, 10_000)]] | None = None,
    image_size: Pixels | None = None,
    overwrite: bool = False,
    device: Device = "auto",
    app: bool = False,
    port: Annotated[int, Range(0, 65_535)] = 7860,
) -> None:
    """Draw which patches survive, or merge, at each cut; with --app, on a page to play with.

    Args:
        model: a timm name, NAME@FILE (with weights from a file), a folder written by vitrim or transformers, hf:NAME,
            or a run folder.
        images: folder of images, or one image; needed without --app.
        out: folder for the pictures; needed without --app.
        method: reduction to show, such as "TopK() @ KeepRate(0.7)"; by default the model's own.
        montage: one picture for all images.
        scores: add a heat map of the scores on which each cut was decided.
        limit: largest number of images to draw.
        blocks: numbers of the blocks to show, from 0, in place of all that cut.
        image_size: side of square images in pixels; by default the model's own.
        overwrite: replace pictures that exist.
        device: where to run.
        app: serve a page on this machine instead, where images are dropped in and methods chosen.
        port: port of the page that --app serves; 0 takes any that is free.
    """
    if app:
        given = {
            "images": images, "out": out, "method": method, "montage": montage, "scores": scores, "blocks": blocks,
            "overwrite": overwrite,
        }  # fmt: skip
        return _serve(model, given, port, image_size, device)
    for name, value in (("images", images), ("out", out)):
        if value is None:
            raise UsageError(f"missing: --{name}")
    assert images is not None
    assert out is not None
    from ..measure.accelerator import make_accelerator
    from ..models import attached, has_weights, open_model, variant
    from ..showing.pictures import show as draw

    network = variant(open_model(model, image_size), method)
    if attached(network) is None:
        raise VitrimError(f"{model} reduces no tokens by itself; give a --method, such as 'TopK() @ KeepRate(0.7)'")
    if not has_weights(model):
        say(f"vitrim show: weights are random; write {model}@pretrained or {model}@FILE", error=True)
    drawn = draw(
        network, images, out, montage=montage, scores=scores, limit=limit, blocks=blocks,
        overwrite=overwrite, device=make_accelerator(cpu=device == "cpu").device,
    )  # fmt: skip
    for line in (*drawn, *drawn.skipped):
        say(line)
    if drawn.left_out:
        say(f"vitrim show: images left out by --limit {limit}: {drawn.left_out}", error=True)


def _serve(model: str, given: dict[str, object], port: int, image_size: int | None, device: str) -> None:
    if wrong := [f"--{name}" for name, value in given.items() if value]:
        raise VitrimError(f"{wrong[0]} has no effect with --app, where images and methods are chosen on the page")
    from ..showing.app import serve

    serve(model, port=port, image_size=image_size, device=device)


def report(folder: list[str], out: str | None = None) -> None:
    """Gather run, study or demo folders into one self-contained HTML page.

    Args:
        folder: run, study or demo folders.
        out: file to write; report.html in the folder by default.
    """
    from ..showing.report import write_report

    say(write_report(folder if len(folder) > 1 else folder[0], out))


def demo(out: str = "runs/demo", epochs: Count | None = None) -> None:
    """Run everything in miniature on real images, offline, in under four minutes on two cores.

    Args:
        out: folder for the runs, the compressed model, pictures and the report; a finished demo there is measured
            again, not trained again.
        epochs: passes over the digits; by default 3, enough to reach about 95 %.
    """
    from ..demo import run_demo

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
    from ..showing.listing import listing

    print(listing(kind))
