"""Milliseconds for a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..errors import IncompatibleTableError
from ..latency.table import LatencyTable
from ..latency.timing import Timing
from ..search.result import SearchResult
from ..vanilla.shape import Shape

Latency: TypeAlias = SearchResult | LatencyTable | Mapping[str, Timing]


def latency_facts(latency: Latency, slim: Shape | None = None) -> dict[str, Any]:
    """
    Milliseconds of the dense and the slim model, and where they come from.

    Args:
        latency: see `ExportFacts`.
        slim: the slim model's sizes, complete, with that of the residual stream; timings are of the models themselves,
            and need none.

    Raises:
        IncompatibleTableError: see `report_of`.
    """
    if isinstance(latency, SearchResult) and slim is not None:
        best = latency.best.shape.complete(latency.table.dense).complete(slim)
        if best != slim:
            raise IncompatibleTableError(
                f"the search found {best.to_dict()}, the slim model has {slim.to_dict()}: pass the latency of this "
                "shape, or leave it out"
            )
        measured, table = latency.best.measured_ms is not None, latency.table
        return _latency(
            latency.dense_ms, latency.ms, table.regime.to_dict(), table.device_name, table.versions, measured=measured
        ) | {"budget": str(latency.budget), "how": "a model of this shape with random weights, beside the dense one"}
    if isinstance(latency, LatencyTable) and slim is not None:
        return _latency(
            latency.dense_ms,
            latency.estimate(slim),
            latency.regime.to_dict(),
            latency.device_name,
            latency.versions,
            measured=False,
        ) | {"errors": dict(latency.errors), "how": "the estimate of a latency table", "multiple": latency.multiple}
    if not isinstance(latency, Mapping):
        raise IncompatibleTableError("the latency of a search or a table is of sizes: pass those of the slim model")
    missing = sorted({"dense", "slim"} - set(latency))
    if missing:
        raise IncompatibleTableError(
            f"the timings lack {missing}: time both, `measure_many({{'dense': ..., 'slim': ...}}, regime)`"
        )
    before, after = latency["dense"], latency["slim"]
    if before.regime != after.regime or before.device_name != after.device_name:
        raise IncompatibleTableError(
            f"the dense model was timed under {before.regime} on {before.device_name}, the slim model under "
            f"{after.regime} on {after.device_name}: time them side by side"
        )
    return _latency(
        before.median_ms,
        after.median_ms,
        after.regime.to_dict(),
        after.device_name,
        after.versions,
        measured=True,
    ) | {"rounds": after.rounds, "relative_error": after.error, "how": "dense and slim model side by side"}


def _latency(
    dense_ms: float,
    slim_ms: float,
    regime: dict[str, Any],
    device: str,
    versions: Mapping[str, str],
    *,
    measured: bool,
) -> dict[str, Any]:
    return {
        "measured": measured,
        "dense_ms": dense_ms,
        "slim_ms": slim_ms,
        "speedup": dense_ms / slim_ms,
        "regime": regime,
        "device": device,
        "versions": dict(versions),
    }
