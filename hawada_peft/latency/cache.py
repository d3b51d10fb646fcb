"""Latency tables on disk, by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import IncompatibleTableError, UncachedTableWarning
from ..folders import default_cache
from ..vanilla.shape import Shape
from .effort import Effort
from .regime import Regime
from .table import LatencyTable
from .timing import warn_caller

logger = logging.getLogger(__name__)


def cached_table(make: Callable[[], LatencyTable], key: Mapping[str, Any], effort: Effort) -> LatencyTable:
    """
    A table from the disk cache, or a new one that is put there.

    A file that cannot be read, or holds the table of something else or one that did not settle, is measured anew. What
    does not settle is not kept.

    Args:
        make: measures it.
        key: what the table depends on, as `table_key` gives it.
        effort: where the cache is, and whether what it holds counts.

    Warns:
        UncachedTableWarning: if the folder cannot be written.
    """
    if effort.cache is False:
        return make()
    folder = default_cache() if effort.cache is True else Path(effort.cache)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = folder / f"table-{digest}.json"
    found = None if effort.fresh else _read(path, key)
    if found is not None:
        logger.info("%s; `Effort(fresh=True)` measures it again", found)
        return found
    table = make()
    if table.unsettled:
        logger.warning("the latency table is not kept for later, as it did not settle")
    else:
        _write(table, path)
    return table


def table_key(
    regime: Regime, base_sizes: Mapping[str, int | str], heads: Sequence[Shape], effort: Effort
) -> dict[str, Any]:
    """What a cached table depends on."""
    return {
        "device_name": effort.clock.device_name(regime),
        "regime": regime.to_dict(),
        "base_sizes": dict(base_sizes),
        "heads": [shape.to_dict() for shape in heads],
        "effort": effort.of_a_table(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _read(path: Path, key: Mapping[str, Any]) -> LatencyTable | None:
    """The table in a file, if it is there and what it should be."""
    if not path.is_file():
        return None
    try:
        table = LatencyTable.load(path)
        regime = Regime.from_dict(key["regime"])
        table.check(regime=regime, base_sizes=key["base_sizes"], device_name=key["device_name"])
    except (IncompatibleTableError, OSError) as error:
        logger.warning("%s is measured again: %s", path, error)
        return None
    return None if table.unsettled else table


def _write(table: LatencyTable, path: Path) -> None:
    """Keep a table, or warn that it is not kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
    except OSError as error:
        warn_caller(
            f"the latency table was measured ({table.seconds:.0f} s), and cannot be kept for later: {error}. It is "
            "used now; name a folder that can be written as `Effort(cache=...)` or in HAWADA_CACHE",
            UncachedTableWarning,
        )
