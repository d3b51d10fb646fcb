"""What a measurement has to say besides its figures: told once, where the package was called."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from types import FrameType

from ..errors import UnsettledTimingWarning
from .effort import Effort
from .timing import Timing


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
