"""What a timer says: a median and its spread, from samples that drift, and whether it has settled, told once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
import transformers

from ..errors import UnsettledTimingWarning
from .effort import Effort
from .regime import Regime

MEDIAN_ERROR = 1.2533 / 1.349
"""Standard error of a median over the interquartile range, times the root of the count, for normal noise."""


@dataclass(frozen=True)
class Timing:
    """
    A measured latency.

    Args:
        median_ms (`float`): milliseconds per call. Where candidates were timed side by side, the drift that all of
            them saw is taken out.
        p95_ms (`float`): 95th percentile of the calls as they were.
        iqr_ms (`float`): interquartile range of the calls as they were.
        error (`float`): relative standard error of the median.
        settled (`bool`): whether the error is below the tolerance asked for.
        rounds (`int`): timed calls.
        regime (`Regime`): the conditions.
        device_name (`str`): what the device is.
        versions (`dict[str, str]`): of torch and transformers.
    """

    median_ms: float
    p95_ms: float
    iqr_ms: float
    error: float
    settled: bool
    rounds: int
    regime: Regime
    device_name: str
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        """The inverse of `to_dict`."""
        return cls(**{**data, "regime": Regime.from_dict(data["regime"])})

    def scaled(self, factor: float) -> Timing:
        """The same timing on a machine that takes `factor` times as long."""
        return replace(
            self, median_ms=self.median_ms * factor, p95_ms=self.p95_ms * factor, iqr_ms=self.iqr_ms * factor
        )

    def __str__(self) -> str:
        spread = f"p95 {self.p95_ms:.3f}, IQR {self.iqr_ms:.3f}, {self.rounds} rounds"
        return f"{self.median_ms:.3f} ms ({spread}; {self.regime})"


def median_errors(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The median of each candidate with the drift between rounds taken out, and its relative standard error.

    Logarithms of the times are split into a candidate's and a round's part by Tukey's median polish ("Exploratory Data
    Analysis", 1977); a single candidate is left as it is.

    Args:
        samples: milliseconds, (candidates, rounds).

    Returns:
        Milliseconds (candidates,) and relative errors (candidates,).
    """
    logs = np.log(np.maximum(samples, 1e-9))
    drift = np.zeros(logs.shape[1])
    if len(logs) > 1:
        for _ in range(3):
            centre = np.median(logs - drift, axis=1, keepdims=True)
            drift = np.median(logs - centre, axis=0)
        drift -= np.median(drift)
    flat = logs - drift
    low, high = np.percentile(flat, [25, 75], axis=1)
    return np.exp(np.median(flat, axis=1)), MEDIAN_ERROR * (high - low) / np.sqrt(flat.shape[1])


def summarise(samples: np.ndarray, regime: Regime, tolerance: float, device_name: str) -> list[Timing]:
    """Timings of samples in milliseconds, (candidates, rounds)."""
    medians, errors = median_errors(samples)
    low, high, p95 = np.percentile(samples, [25, 75, 95], axis=1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return [
        Timing(
            median_ms=float(medians[index]),
            p95_ms=float(p95[index]),
            iqr_ms=float(high[index] - low[index]),
            error=float(errors[index]),
            settled=bool(errors[index] <= tolerance),
            rounds=samples.shape[1],
            regime=regime,
            device_name=device_name,
            versions=versions,
        )
        for index in range(len(samples))
    ]


def unsettled(timings: Iterable[Timing], effort: Effort) -> str:
    """What did not settle within an effort, in words; empty if everything did."""
    timings = list(timings)
    found = [timing for timing in timings if not timing.settled]
    if not found:
        return ""
    worst = max(found, key=lambda timing: timing.error)
    return (
        f"{len(found)} of {len(timings)} timers did not settle within {effort.max_rounds} rounds or "
        f"{effort.max_seconds:g} s: the medians are known to {worst.error:.1%} at worst, {effort.tolerance:.1%} "
        f"was asked for (the worst: {worst})"
    )


def warn_unsettled(*notes: str) -> None:
    """One warning of all that did not settle, if anything."""
    told = [note for note in notes if note]
    if told:
        advice = "Stop other work on the machine, or give more time: `Effort(max_rounds=..., max_seconds=...)`"
        warn_caller(". ".join([*told, advice]), UnsettledTimingWarning)


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn, located at the line outside of this package that called it."""
    package, level = __name__.partition(".")[0], 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
