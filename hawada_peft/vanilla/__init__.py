"""The rows that say where transformers' model families keep what is gated."""

from . import llama, vit
from .family import (
    FAMILIES,
    FFN,
    HEADS,
    HIDDEN,
    KV_GROUPS,
    TARGET_MODULES,
    Family,
    Layout,
    find_module,
    locate,
    register_family,
)
from .shape import Shape

__all__ = [
    "FAMILIES",
    "FFN",
    "HEADS",
    "HIDDEN",
    "KV_GROUPS",
    "TARGET_MODULES",
    "Family",
    "Layout",
    "Shape",
    "find_module",
    "llama",
    "locate",
    "register_family",
    "vit",
]
