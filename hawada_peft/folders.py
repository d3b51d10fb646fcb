"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """`$HAWADA_CACHE`, else `hawada` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HAWADA_CACHE") or Path(root) / "hawada")
