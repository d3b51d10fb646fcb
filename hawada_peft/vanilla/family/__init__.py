"""What is known of a model family, and where it is in a model."""

from __future__ import annotations

from .layout import FINDERS, Known, Layout, Part, hidden_home
from .lookup import (
    among,
    base_sizes,
    find_module,
    locate,
    locate_all,
    locate_every,
    locate_stream,
    mark,
    relocate,
    together,
    tower_names,
)
from .row import FAMILIES, TARGET_MODULES, Family, register_family

__all__ = [
    "FAMILIES",
    "FINDERS",
    "TARGET_MODULES",
    "Family",
    "Known",
    "Layout",
    "Part",
    "among",
    "base_sizes",
    "find_module",
    "hidden_home",
    "locate",
    "locate_all",
    "locate_every",
    "locate_stream",
    "mark",
    "register_family",
    "relocate",
    "together",
    "tower_names",
]
