"""What a reduction needs of a whole model: a CLS token to score by, or a head that reads nothing else."""

from ...errors import ScoreError, VitrimError
from ...tokens import Reduction, render
from ..adapter import Geometry


def check_needs(reduction: Reduction | None, cls_only: bool, g: Geometry, name: str) -> None:
    """Raise unless the model has what the reduction reads.

    Args:
        reduction: what is to act; None: nothing.
        cls_only: whether the last block is to compute prefix tokens only.
        g: geometry of the model.
        name: the model, for the message.

    Raises:
        ScoreError: the score, or the curriculum, needs a CLS token.
        VitrimError: `cls_only` needs a head that reads only CLS.
    """
    if cls_only and g.head != "prefix":
        raise VitrimError(f"cls_only needs a head that reads only CLS; the head of this {name} pools patch tokens")
    if reduction is None or g.has_cls:
        return
    if reduction.reducer.needs == "cls_row":
        raise ScoreError(
            f"this {name} has no CLS token to score with; use TopK(score='norm'), 'key_norm', "
            "'mean_attention' or ToMe()"
        )
    for figure in reduction.curriculum.reads:
        if figure.needs == "cls_row":
            raise ScoreError(
                f"this {name} has no CLS token, which {figure.name} of {render(reduction.curriculum)} needs; "
                "choose another curriculum"
            )
