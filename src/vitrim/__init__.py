"""vitrim makes any Vision Transformer cheaper (fewer tokens, less width, a better teacher) and says what it costs.

Names are loaded when they are first used, so that `import vitrim` and the command's help stay instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "vitrim.models": ("Handle", "attach", "attached", "build_model", "load", "save", "set_epoch"),
    "vitrim.elastic": ("SuperNet", "stratify"),
    "vitrim.measure.cost": ("Cost", "cost"),
    "vitrim.tokens": (
        "Adaptive", "Budget", "Constant", "ConstantR", "CosineWarmup", "Counts", "Delayed", "KeepRate",
        "Polynomial", "PowerLaw", "Reduction", "Stages", "ToMe", "TokenState", "TopK",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from .elastic import SuperNet, stratify
    from .measure.cost import Cost, cost
    from .models import Handle, attach, attached, build_model, load, save, set_epoch
    from .tokens import (
        Adaptive,
        Budget,
        Constant,
        ConstantR,
        CosineWarmup,
        Counts,
        Delayed,
        KeepRate,
        Polynomial,
        PowerLaw,
        Reduction,
        Stages,
        TokenState,
        ToMe,
        TopK,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vitrim' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
