"""The one door through which foreign models come. Importing it fills the table of adapters and timm's registry.

The modules here are the port: what other rooms may ask about any model, above all in `adapter`. `reduction` and
`widths` are the two ways in which a model is changed, `families` know the classes of other libraries, and `files` are
models on disk.
"""

from . import families as _families  # noqa: F401  (fills the table of adapters)
from . import small_vits as _small_vits  # noqa: F401  (enters its models in timm's registry)
from .adapter import ADAPTERS, Adapter, Geometry
from .architectures import build_architecture, builder_of
from .compiling import compile, without_limit
from .families.hf.conversion import convert
from .files.build import build_model, has_weights, open_model
from .files.checkpoints import read_weights
from .files.store import check_place, load, save
from .finding import adapter_of, find_adapter, num_classes
from .outputs import as_tensor
from .reduction.attach import attach, set_epoch
from .reduction.attached import attached, handles_inside
from .reduction.handle import Handle
from .reduction.trace import Trace, trace_of
from .removed_branch import RemovedBranch
from .variants import DENSE, OWN, attached_instead, detached, own_method, reads_prefix_only, variant
from .widths.block_widths import BlockWidths, even_widths, narrow, rotary_blocks, set_widths, widths_of

__all__ = [
    "ADAPTERS",
    "DENSE",
    "OWN",
    "Adapter",
    "BlockWidths",
    "Geometry",
    "Handle",
    "RemovedBranch",
    "Trace",
    "adapter_of",
    "as_tensor",
    "attach",
    "attached",
    "attached_instead",
    "build_architecture",
    "build_model",
    "builder_of",
    "check_place",
    "compile",
    "convert",
    "detached",
    "even_widths",
    "find_adapter",
    "handles_inside",
    "has_weights",
    "load",
    "narrow",
    "num_classes",
    "open_model",
    "own_method",
    "read_weights",
    "reads_prefix_only",
    "rotary_blocks",
    "save",
    "set_epoch",
    "set_widths",
    "trace_of",
    "variant",
    "widths_of",
    "without_limit",
]
