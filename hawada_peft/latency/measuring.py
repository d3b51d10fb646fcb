"""Timing models: medians of interleaved runs, with their spread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..errors import HawAdaError
from ..files.kept import Kept, digest_of_key
from ..progress import Progress, progress_bar
from .clock import Clock
from .effort import Effort
from .regime import Regime
from .runner import Runner
from .timing import Timing, median_errors, summarise, unsettled, warn_unsettled

Key = TypeVar("Key", bound=Hashable)

LONG = 0.05
"""Seconds of a call from which on no other leads in to it: caches are filled in a small part of that."""

INSTANCE_SPREAD = 0.01
"""How far two models of one shape differ in speed anyway, by where their weights lie in memory (relative)."""


def measure_many(
    models: Mapping[Key, nn.Module], regime: Regime, *, effort: Effort | None = None
) -> dict[Key, Timing]:
    """
    Time several models side by side: round after round, each model once, so that a machine that slows down does so for
    all of them. Of whole answers (`mode="generate"`) the prefill and a step of decode are timed in each round, and
    count as `Regime.parts` says.

    Args:
        models: transformers models in the regime's dtype on its device, all in memory at the same time.
        regime: the conditions.
        effort: how long to measure, and by which clock.

    Raises:
        InvalidRegimeError: if a model cannot run that way.
        HawAdaError: if the clock tells no time that passes.
        ExternalClockError: if an external clock fails.

    Warns:
        UnsettledTimingWarning: if a median is known less well than the effort asks for.
    """
    effort = effort or Effort()
    timings = _time(models, regime, effort)
    warn_unsettled(unsettled(timings.values(), effort))
    return timings


def measure_built(
    build: Callable[[Key], nn.Module],
    keys: Sequence[Key],
    regime: Regime,
    *,
    reference: Key,
    effort: Effort,
    label: str = "timing",
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> dict[Key, Timing]:
    """
    Build and time many candidates, a group at a time, so that only one group is in memory.

    Every group holds the reference as well, which ties the groups together: where it takes different times in
    different groups, by more than models of one shape differ anyway, the group's times are scaled by that. For an
    external clock there is one model in memory at a time.

    Args:
        build: makes the model of a key.
        keys: the candidates.
        regime: the conditions.
        reference: the candidate that ties the groups together; it is in the result.
        effort: how long to measure, by which clock, and how many models are in memory at a time, with the reference.
        label: of the progress bar.
        progress: makes it, as `tqdm.tqdm`; none is shown if left out.
        kept: where the timings of each group are kept as they come.

    Returns:
        Timings, which say whether they have settled; `unsettled` sums that up.

    Raises:
        InvalidRegimeError: if a model cannot run that way.
        HawAdaError: if the clock tells no time that passes.
        ExternalClockError: if an external clock fails.
    """
    wanted = [key for key in dict.fromkeys(keys) if key != reference]
    kept = kept or Kept()

    def timed(group: Sequence[Key]) -> dict[Key, Timing]:
        name = f"{label} {digest_of_key([regime.to_dict(), *map(repr, group)])}"
        found = kept.value(name, partial(_built_and_timed, build, group, regime, effort))
        return {key: Timing.from_dict(each) for key, each in zip(group, found, strict=True)}

    if effort.clock.elsewhere:
        return _measured_elsewhere(timed, [reference, *wanted], label, progress)
    step = effort.group - 1
    chunks = [wanted[start : start + step] for start in range(0, len(wanted), step)] or [[]]
    measured: list[dict[Key, Timing]] = []
    with progress_bar(progress, total=len(wanted), desc=label, leave=False) as bar:
        for chunk in chunks:
            measured.append(timed([reference, *chunk]))
            bar.update(len(chunk))
    seen = np.log([timings[reference].median_ms for timings in measured])
    off = seen - np.median(seen)
    trust = off.var() / (off.var() + INSTANCE_SPREAD**2)
    result: dict[Key, Timing] = {}
    for timings, drift in zip(measured, off, strict=True):
        result |= {key: timing.scaled(float(np.exp(-trust * drift))) for key, timing in timings.items()}
    result[reference] = result[reference].scaled(float(np.exp(np.median(seen))) / result[reference].median_ms)
    return result


def _measured_elsewhere(
    timed: Callable[[Sequence[Key]], dict[Key, Timing]], keys: Sequence[Key], label: str, progress: Progress | None
) -> dict[Key, Timing]:
    result: dict[Key, Timing] = {}
    with progress_bar(progress, total=len(keys), desc=label, leave=False) as bar:
        for key in keys:
            result |= timed([key])
            bar.update(1)
    return result


def interleave(
    runners: Sequence[Runner], regime: Regime, effort: Effort, *, counts: Sequence[int] = (1,)
) -> np.ndarray:
    """
    Time each runner once per round, until all medians have settled or the rounds are used up.

    Args:
        runners: of each candidate its calls, one candidate after the other.
        regime: of the device that is waited for.
        effort: how long, and by which clock.
        counts: how often each call of a candidate counts; the sum is what the candidate takes.

    Returns:
        Milliseconds: (candidates, rounds).
    """
    rows: list[np.ndarray] = []
    clock = effort.clock
    begun = clock.now()
    with torch.inference_mode():
        leads = [_warm_up(runner, regime, effort) for runner in runners]
        while len(rows) < effort.max_rounds:
            row = [0.0] * len(runners)
            order = range(len(runners)) if len(rows) % 2 == 0 else reversed(range(len(runners)))
            for index in order:
                runner = runners[index]
                for _ in range(leads[index]):
                    runner.call()
                    runner.reset()
                row[index] = 1e3 * _timed_call(runner, regime, clock)
            rows.append(np.reshape(row, (-1, len(counts))) @ np.array(counts))
            if len(rows) >= effort.min_rounds:
                samples = np.asarray(rows).T
                if median_errors(samples)[1].max() <= effort.tolerance or clock.now() - begun > effort.max_seconds:
                    break
    return np.asarray(rows).T


def _warm_up(runner: Runner, regime: Regime, effort: Effort) -> int:
    """
    The calls before the first timed one, fewer of long ones. The first may compile, so it says nothing.

    Returns:
        How many lead in to each timed one.
    """
    for number in range(effort.warmup):
        if number == 0:
            runner.call()
            runner.reset()
        elif _timed_call(runner, regime, effort.clock) > LONG:
            return 0
    return effort.lead_in


def _timed_call(runner: Runner, regime: Regime, clock: Clock) -> float:
    """Seconds of a call."""
    clock.wait(regime)
    start = clock.now()
    runner.call()
    clock.wait(regime)
    seconds = clock.now() - start
    runner.reset()
    return seconds


def _built_and_timed(
    build: Callable[[Key], nn.Module], keys: Sequence[Key], regime: Regime, effort: Effort
) -> list[dict[str, Any]]:
    """Build a group, time it and forget it: the timings, for JSON."""
    found = _time({key: build(key) for key in keys}, regime, effort)
    if torch.device(regime.device).type == "cuda":
        torch.cuda.empty_cache()
    return [timing.to_dict() for timing in found.values()]


def _time(models: Mapping[Key, nn.Module], regime: Regime, effort: Effort) -> dict[Key, Timing]:
    clock = effort.clock
    samples = clock.samples(list(models.values()), regime, partial(_timed_here, models, regime, effort))
    return dict(zip(models, summarise(samples, regime, effort.tolerance, clock.device_name(regime)), strict=True))


def _timed_here(models: Mapping[Key, nn.Module], regime: Regime, effort: Effort) -> np.ndarray:
    """Milliseconds: (models, rounds)."""
    parts = regime.parts()
    compiled = len(models) * len(parts) if regime.backend == "compile" else 0
    with _many_compilations(compiled) if compiled else contextlib.nullcontext():
        runners = [effort.clock.runner(model, part) for model in models.values() for _, part in parts]
        samples = interleave(runners, regime, effort, counts=[times for times, _ in parts])
    if not (np.isfinite(samples).all() and (samples > 0).all()):
        raise HawAdaError(
            f"the clock tells no time that passes: a call took {float(samples.ravel()[_first_bad(samples)])!r} ms; "
            "give one that does, as `Effort(clock=...)`"
        )
    return samples


def _first_bad(samples: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(samples.ravel()) & (samples.ravel() > 0)))


@contextlib.contextmanager
def _many_compilations(count: int) -> Iterator[None]:
    """Let `torch.compile` keep all candidates; beyond its limit it would run the rest eagerly without a word."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=count + 8, fail_on_recompile_limit_hit=True):
        yield
