"""The rows that say where transformers' model families keep what is gated."""

from . import llama, vit
from .family import FAMILIES, FFN, HEADS, KV_GROUPS, TARGET_MODULES, Family, Layout, locate, register_family
from .shape import Shape

__all__ = [
    "FAMILIES",
    "FFN",
    "HEADS",
    "KV_GROUPS",
    "TARGET_MODULES",
    "Family",
    "Layout",
    "Shape",
    "llama",
    "locate",
    "register_family",
    "vit",
]
