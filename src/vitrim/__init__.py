"""vitrim makes any Vision Transformer cheaper (fewer tokens, less width, a better teacher) and says what it costs.

Names are loaded when they are first used, so that `import vitrim` and the command's help stay instant. Every reducer,
schedule, curriculum, distillation term and weight is a name of this module, those that a user adds included.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Adaptive",
    "Budget",
    "Certificate",
    "Cls",
    "ClsStages",
    "Cluster",
    "Compressed",
    "Constant",
    "ConstantR",
    "CosineWarmup",
    "Cost",
    "Counts",
    "Delayed",
    "DistToken",
    "Handle",
    "KeepRate",
    "Labels",
    "Linear",
    "Logits",
    "Merged",
    "Polynomial",
    "PowerLaw",
    "Reduction",
    "Stages",
    "SuperNet",
    "ToMe",
    "TokenState",
    "Tokens",
    "TopK",
    "attach",
    "attached",
    "bench",
    "build_model",
    "compile",
    "compress",
    "convert",
    "cost",
    "export",
    "lightning_callback",
    "load",
    "save",
    "set_epoch",
    "show",
    "stratify",
    "transformers_callback",
    "verify",
]

_HOMES = {
    "vitrim.models": ("Handle", "attach", "attached", "build_model", "compile", "convert", "load", "save", "set_epoch"),
    "vitrim.compression": ("Certificate", "Compressed", "compress", "verify"),
    "vitrim.elastic": ("SuperNet", "stratify"),
    "vitrim.train.callbacks": ("lightning_callback", "transformers_callback"),
    "vitrim.exporting": ("export",),
    "vitrim.measure.cost": ("Cost", "cost"),
    "vitrim.measure.speed": ("bench",),
    "vitrim.showing.pictures": ("show",),
    "vitrim.tokens": ("Reduction", "TokenState"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_TABLES = {"vitrim.tokens": ("REDUCERS", "SCHEDULES", "CURRICULA"), "vitrim.distill": ("TERMS", "WEIGHTS")}

if TYPE_CHECKING:
    from .compression import Certificate, Compressed, compress, verify
    from .distill import Cls, ClsStages, DistToken, Labels, Logits, Merged, Tokens
    from .distill.objective import Linear
    from .elastic import SuperNet, stratify
    from .exporting import export
    from .measure.cost import Cost, cost
    from .measure.speed import bench
    from .models import Handle, attach, attached, build_model, compile, convert, load, save, set_epoch
    from .showing.pictures import show
    from .tokens import (
        Adaptive,
        Budget,
        Cluster,
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
    from .train.callbacks import lightning_callback, transformers_callback


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    if name[0].isupper():  # Modules have other names; importing one must not load the tables.
        for home, tables in _TABLES.items():
            for table in tables:
                entries = getattr(import_module(home), table)
                if name in entries:
                    return entries[name]
    raise AttributeError(f"module 'vitrim' has no attribute {name!r}")


def __dir__() -> list[str]:
    rooms = [(sys.modules[home], tables) for home, tables in _TABLES.items() if home in sys.modules]
    entries = [name for room, tables in rooms for table in tables for name in getattr(room, table)]
    return sorted({*globals(), *__all__, *entries})
