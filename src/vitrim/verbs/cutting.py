"""Verbs that make smaller networks: a super-network of a model, and what is cut out of it."""

from .delivery import DataOptions, Device


def stratify(
    model: str,
    data: DataOptions,
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
    from ..elastic.supernet import stratify as run
    from ..models import check_place, open_model
    from ..search.compare import data_of
    from ..train.data import make_loader, plain_stream
    from ..train.evaluate import make_accelerator

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
    from ..elastic.supernet import SuperNet
    from ..measure.cost import cost
    from ..models import check_place, save

    check_place(out, overwrite=overwrite)
    network = SuperNet.load(supernet).extract(macs=macs, params=params, latency=latency)
    save(network, out, overwrite=overwrite)
    print(f"{cost(network)}; written to {out}")
