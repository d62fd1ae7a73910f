"""Whether a model of Hugging Face transformers is built from the parts that its layout knows."""

from operator import attrgetter
from typing import Any

from ....errors import UnsupportedModelError, VitrimError
from ...adapter import Adapter
from ...own_code import own_class
from ...reduction.exchange import Reduced
from ...widths.sublayers import Elastic
from .elastic import RemovedAttention, enter_elastic
from .layout import Layout
from .reduced_classes import reduced_class
from .values import narrow_class


def check(adapter: Adapter, layout: Layout, model: Any) -> None:
    """See `Adapter.check`."""
    own = model if not isinstance(model, Reduced) else None
    if own is not None and type(own) not in (getattr(layout.module, name) for name in layout.names):
        raise UnsupportedModelError(own_class(model, type(model).__mro__[1], adapter))
    layer, attention = layout.part_class(layout.layer), layout.part_class(layout.attention)
    enter_elastic(layout)
    try:
        blocks, halves = layout.blocks(model), layout.parts
        parts = [(getattr(block, halves[0]), getattr(block, halves[1])) for block in blocks]
        attrgetter(layout.projection)(layout.tower_of(model))
    except AttributeError as error:
        from transformers import __version__

        raise UnsupportedModelError(
            f"the {type(model).__name__} of transformers {__version__} is built in another way ({error}); install "
            "the version that vitrim knows: pip install 'vitrim[hf]'"
        ) from None
    layout.check(layout.tower_of(model))
    for index, (block, (attn, mlp)) in enumerate(zip(blocks, parts, strict=True)):
        if isinstance(attn, Elastic) or isinstance(mlp, Elastic):
            raise VitrimError("the model runs as a sub-network of a super-network; leave that context first")
        attentions = (attention, *((narrow_class(layout, attention),) if layout.rotary else ()), RemovedAttention)
        known = ((block, (layer, reduced_class(layer))), (attn, attentions))
        for part, classes in known:
            if type(part) not in classes:
                raise UnsupportedModelError(
                    f"block {index} holds a {type(part).__name__}, which the {adapter.name} adapter cannot cut; it "
                    f"covers {adapter.covers}"
                )
