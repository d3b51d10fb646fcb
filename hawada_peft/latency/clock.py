"""The only clock: medians of interleaved runs, with their spread."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..errors import HawAdaError, UnsettledTimingWarning
from ..progress import Progress, progress_bar
from .regime import Regime
from .runner import Runner, prepare
from .timing import Timing, median_errors, summarise

logger = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]
Sync = Callable[[], Any]

INSTANCE_SPREAD = 0.01
"""How far two models of one shape differ in speed anyway, by where their weights lie in memory (relative)."""


@dataclass(frozen=True)
class Effort:
    """
    How long to measure.

    Args:
        warmup (`int`): calls before the first timed one.
        lead_in (`int`): untimed calls right before each timed one, so that caches hold what they hold when the model
            runs alone and not what another candidate left there.
        min_rounds (`int`): timed calls of each candidate at least.
        max_rounds (`int`): and at most.
        max_seconds (`float`): no further round is begun after this time, once there are `min_rounds`.
        tolerance (`float`): a timer has settled when the relative standard error of its median is below this.

    Raises:
        HawAdaError: on impossible numbers.
    """

    warmup: int = 3
    lead_in: int = 1
    min_rounds: int = 10
    max_rounds: int = 60
    max_seconds: float = 20.0
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        rounds = 1 <= self.min_rounds <= self.max_rounds
        if min(self.warmup, self.lead_in) < 0 or not rounds or not self.tolerance > 0 or not self.max_seconds >= 0:
            raise HawAdaError(
                "effort needs warmup, lead_in, max_seconds >= 0, 1 <= min_rounds <= max_rounds, tolerance > 0; "
                f"got {self}"
            )


def measure(
    model: nn.Module,
    regime: Regime,
    *,
    effort: Effort | None = None,
    clock: Clock = time.perf_counter,
    sync: Sync | None = None,
) -> Timing:
    """
    Time one model.

    Args:
        model: a transformers model in the regime's dtype on its device.
        regime: the conditions.
        effort: how long to measure.
        clock: seconds; injected in tests.
        sync: waits for the device; that of the regime's device if left out.

    Raises:
        InvalidRegimeError: if the model cannot run that way.
    """
    return measure_many({"model": model}, regime, effort=effort, clock=clock, sync=sync)["model"]


def measure_many(
    models: Mapping[Key, nn.Module],
    regime: Regime,
    *,
    effort: Effort | None = None,
    clock: Clock = time.perf_counter,
    sync: Sync | None = None,
) -> dict[Key, Timing]:
    """
    Time several models side by side: round after round, each model once, so that a machine that slows down does so for
    all of them.

    Arguments and errors as in `measure`; all models are in memory at the same time.
    """
    effort = effort or Effort()
    timings = _time(models, regime, effort, clock, sync)
    _warn_unsettled(timings, effort)
    return timings


def measure_built(
    build: Callable[[Key], nn.Module],
    keys: Sequence[Key],
    regime: Regime,
    *,
    reference: Key,
    effort: Effort | None = None,
    group: int = 8,
    clock: Clock = time.perf_counter,
    sync: Sync | None = None,
    label: str = "timing",
    progress: Progress | None = None,
) -> dict[Key, Timing]:
    """
    Build and time many candidates, a group at a time, so that only one group is in memory.

    Every group holds the reference as well, which ties the groups together: where it takes different times in
    different groups, by more than models of one shape differ anyway, the group's times are scaled by that.

    Args:
        build: makes the model of a key.
        keys: the candidates.
        regime: the conditions.
        reference: the candidate that ties the groups together; it is in the result.
        effort: how long to measure.
        group: models in memory at a time, the reference included.
        clock, sync: as in `measure`.
        label: of the progress bar.
        progress: makes it, as `tqdm.tqdm`; none is shown if left out.
    """
    effort = effort or Effort()
    wanted = [key for key in dict.fromkeys(keys) if key != reference]
    step = max(1, group - 1)
    chunks = [wanted[start : start + step] for start in range(0, len(wanted), step)] or [[]]
    measured: list[dict[Key, Timing]] = []
    with progress_bar(progress, total=len(wanted), desc=label, leave=False) as bar:
        for chunk in chunks:
            models = {key: build(key) for key in (reference, *chunk)}
            measured.append(_time(models, regime, effort, clock, sync))
            del models
            if torch.device(regime.device).type == "cuda":
                torch.cuda.empty_cache()
            bar.update(len(chunk))
    seen = np.log([timings[reference].median_ms for timings in measured])
    off = seen - np.median(seen)
    trust = off.var() / (off.var() + INSTANCE_SPREAD**2)
    result: dict[Key, Timing] = {}
    for timings, drift in zip(measured, off, strict=True):
        result |= {key: timing.scaled(float(np.exp(-trust * drift))) for key, timing in timings.items()}
    result[reference] = result[reference].scaled(float(np.exp(np.median(seen))) / result[reference].median_ms)
    _warn_unsettled(result, effort)
    return result


def interleave(runners: Sequence[Runner], effort: Effort, *, clock: Clock, sync: Sync) -> np.ndarray:
    """
    Time each runner once per round, until all medians have settled or the rounds are used up.

    Returns:
        Milliseconds: (runners, rounds).
    """
    rows: list[list[float]] = []
    begun = clock()
    with torch.inference_mode():
        for runner in runners:
            for _ in range(effort.warmup):
                runner.call()
                runner.reset()
        while len(rows) < effort.max_rounds:
            row = [0.0] * len(runners)
            order = range(len(runners)) if len(rows) % 2 == 0 else reversed(range(len(runners)))
            for index in order:
                runner = runners[index]
                for _ in range(effort.lead_in):
                    runner.call()
                    runner.reset()
                sync()
                start = clock()
                runner.call()
                sync()
                row[index] = (clock() - start) * 1e3
                runner.reset()
            rows.append(row)
            if len(rows) >= effort.min_rounds:
                samples = np.asarray(rows).T
                if median_errors(samples)[1].max() <= effort.tolerance or clock() - begun > effort.max_seconds:
                    break
    return np.asarray(rows).T


def _time(
    models: Mapping[Key, nn.Module], regime: Regime, effort: Effort, clock: Clock, sync: Sync | None
) -> dict[Key, Timing]:
    with _many_compilations(len(models)) if regime.backend == "compile" else contextlib.nullcontext():
        runners = [prepare(model, regime) for model in models.values()]
        samples = interleave(runners, effort, clock=clock, sync=sync or device_sync(regime))
    return dict(zip(models, summarise(samples, regime, effort.tolerance), strict=True))


def _warn_unsettled(timings: Mapping[Key, Timing], effort: Effort) -> None:
    unsettled = [timing for timing in timings.values() if not timing.settled]
    if unsettled:
        worst = max(unsettled, key=lambda timing: timing.error)
        warnings.warn(
            f"{len(unsettled)} of {len(timings)} timers did not settle within {effort.max_rounds} rounds or "
            f"{effort.max_seconds:g} s: the medians are known to {worst.error:.1%} at worst, {effort.tolerance:.1%} "
            f"was asked for (the worst: {worst}). Stop other work on the machine, or give more rounds and seconds.",
            UnsettledTimingWarning,
            stacklevel=3,
        )


def device_sync(regime: Regime) -> Sync:
    """What waits for the regime's device."""
    device = torch.device(regime.device)
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return _no_wait


def _no_wait() -> None:
    """A CPU call is done when it returns."""


@contextlib.contextmanager
def _many_compilations(count: int) -> Iterator[None]:
    """Let `torch.compile` keep all candidates; beyond its limit it would run the rest eagerly without a word."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=count + 8, fail_on_recompile_limit_hit=True):
        yield
