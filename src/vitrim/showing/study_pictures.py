"""The pictures of a study: which tokens the models of its rows keep, on the same test images."""

from pathlib import Path

import torch

from ..data.specs import DataSpec
from ..data.splits import plain_stream
from ..models import open_model
from ..options import from_dict
from ..study.study import Study, run_folder
from .files import spread_evenly
from .pictures import show


def draw_study(study: Study, out: str | Path) -> list[Path]:
    """Draw the part `pictures` of a finished study, with the models of its first seed, on test images of its base.

    Args:
        study: the study.
        out: its folder, where the pictures are written: one sheet for each row, one line for each image.

    Returns:
        The pictures; empty where the study has no part `pictures`.
    """
    if study.pictures is None:
        return []
    data, drawn = from_dict(DataSpec, study.base.get("data", {}), "data"), []
    for row in study.pictures.rows:
        folder = run_folder(Path(out), row, study.seeds[0])
        model = open_model(str(folder))
        stream = plain_stream(model, data)
        chosen = spread_evenly(range(len(stream)), study.pictures.images)
        images = torch.stack([stream[index][0] for index in chosen])
        target = Path(out) / f"tokens-{folder.name}.png"
        drawn += show(model, images, target, montage=True, limit=None, overwrite=True)
    return drawn
