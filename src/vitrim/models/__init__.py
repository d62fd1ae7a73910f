"""Adapters: the only room that knows a foreign class. Importing it fills the table of adapters."""

from . import timm_vit as _timm_vit  # noqa: F401  (enters itself in the table)
from .adapter import ADAPTERS, Adapter, Geometry, find_adapter
from .attach import Handle, attach, attached, attached_instead

__all__ = ["ADAPTERS", "Adapter", "Geometry", "Handle", "attach", "attached", "attached_instead", "find_adapter"]
