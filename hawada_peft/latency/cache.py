"""Latency tables on disk, by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from ..vanilla.shape import Shape
from .build import TablePlan
from .regime import Regime
from .table import LatencyTable

logger = logging.getLogger(__name__)


def cached_table(
    make: Callable[[], LatencyTable], key: Mapping[str, object], folder: str | Path | None
) -> LatencyTable:
    """
    A table from the disk cache, or a new one that is put there.

    Args:
        make: measures it.
        key: what the table depends on (JSON).
        folder: the cache; `default_cache()` if left out.
    """
    folder = default_cache() if folder is None else Path(folder)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = folder / f"table-{digest}.json"
    if path.is_file():
        logger.info("latency table from %s", path)
        return LatencyTable.load(path)
    table = make()
    folder.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}.tmp")
    table.save(partial_path)
    partial_path.replace(path)
    return table


def table_key(
    regime: Regime, model: Mapping[str, int | str], heads: Sequence[Shape], plan: TablePlan
) -> dict[str, object]:
    """What a cached table depends on."""
    return {
        "device_name": regime.device_name,
        "regime": regime.to_dict(),
        "model": dict(model),
        "heads": [shape.to_dict() for shape in heads],
        "plan": asdict(plan),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def default_cache() -> Path:
    """`$HAWADA_CACHE`, else `hawada` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HAWADA_CACHE") or Path(root) / "hawada")
