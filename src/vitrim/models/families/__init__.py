"""One file for each model family. Importing this package enters them all in the tables of adapters.

What the families of one library share is in `timm` and in `hf` (Hugging Face transformers).

Families that are imported later are tried first; `any_module`, which takes every model, has to be the first one here.
"""

from . import any_module as _any_module  # noqa: F401
from . import hf_beit as _hf_beit  # noqa: F401
from . import hf_clip as _hf_clip  # noqa: F401
from . import hf_dinov2 as _hf_dinov2  # noqa: F401
from . import hf_dinov3 as _hf_dinov3  # noqa: F401
from . import hf_siglip as _hf_siglip  # noqa: F401
from . import hf_siglip2 as _hf_siglip2  # noqa: F401
from . import hf_vit as _hf_vit  # noqa: F401
from . import timm_beit as _timm_beit  # noqa: F401
from . import timm_blocks as _timm_blocks  # noqa: F401
from . import timm_deepseek as _timm_deepseek  # noqa: F401
from . import timm_eva as _timm_eva  # noqa: F401
from . import timm_gemma4 as _timm_gemma4  # noqa: F401
from . import timm_naflex as _timm_naflex  # noqa: F401
from . import timm_qwen3 as _timm_qwen3  # noqa: F401
from . import timm_relpos as _timm_relpos  # noqa: F401
from . import timm_vit as _timm_vit  # noqa: F401
from .hf import model as _hf_model  # noqa: F401
from .timm import layers as _timm_layers  # noqa: F401  (enters its layers in the table of elastic ones)
from .timm import model as _timm_model  # noqa: F401
