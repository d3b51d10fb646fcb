"""For whoever adds a family: the rows that say where transformers' models keep what is gated."""

from .family import (
    FAMILIES,
    TARGET_MODULES,
    Family,
    Layout,
    find_module,
    locate,
    register_family,
)
from .rehoming import rehome
from .rows import bert, experts, llama, vit
from .shape import FFN, HEADS, HIDDEN, KV_GROUPS, LAYERS, SIZES, Axis, Shape

__all__ = [
    "FAMILIES",
    "FFN",
    "HEADS",
    "HIDDEN",
    "KV_GROUPS",
    "LAYERS",
    "SIZES",
    "TARGET_MODULES",
    "Axis",
    "Family",
    "Layout",
    "Shape",
    "bert",
    "experts",
    "find_module",
    "llama",
    "locate",
    "register_family",
    "rehome",
    "vit",
]
