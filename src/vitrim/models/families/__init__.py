"""One file for each model family. Importing this package enters them in the table of adapters."""

from . import timm_layers as _timm_layers  # noqa: F401  (enters its layers in the table of elastic ones)
from . import timm_vit as _timm_vit  # noqa: F401
