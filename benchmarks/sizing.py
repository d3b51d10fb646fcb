"""From a budget to a size: the smallest cut whose measured latency meets it, by few timings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hawada_peft.errors import UnsettledTimingWarning
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.measuring import measure_many
from hawada_peft.latency.regime import Regime
from hawada_peft.vanilla.family import locate

SHORT, LONG = 0.988, 1.02
"""
A cut meets a budget if it is faster than SHORT times it; from LONG times it on a smaller cut is looked for. At 0.99
twenty layers of SmolLM2 at 1.5x (1.485 to 1.494x, by the machine) were met in one run and missed in the next, so that
contestants were compared across a whole layer.
"""

RESOLUTION = 1 / 512
"""Amounts that are closer than this are not told apart."""

CUTS = 32
"""Models cut for one budget at most; most of them have sizes that were timed before."""


@dataclass(frozen=True)
class Timed:
    """A model's latency beside the dense model's, both from one measurement, and its sizes."""

    ms: float
    dense_ms: float
    error: float
    parameters: int
    sizes: list[tuple[int, int] | None]

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ms


@dataclass
class Stopwatch:
    """
    Times models in turns with the dense one, under a regime.

    Args:
        dense: in the regime's dtype, on its device.
        regime, effort: as in `measure_many`.
    """

    dense: PreTrainedModel
    regime: Regime
    effort: Effort

    def __call__(self, model: PreTrainedModel) -> Timed:
        """The model is moved to the regime's device and dtype."""
        model = model.to(device=self.regime.device, dtype=self.regime.torch_dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnsettledTimingWarning)  # the error is in the row
            found = measure_many({"dense": self.dense, "cut": model}, self.regime, effort=self.effort)
        return Timed(
            ms=found["cut"].median_ms,
            dense_ms=found["dense"].median_ms,
            error=max(found["dense"].error, found["cut"].error),
            parameters=model.num_parameters(),
            sizes=sizes_of(model, self.dense),
        )


@dataclass(frozen=True)
class Fit:
    """An amount, what it costs, whether that meets the budget, and how many timings it took to find."""

    amount: float
    timed: Timed
    met: bool
    timings: int


def sizes_of(model: PreTrainedModel, dense: PreTrainedModel) -> list[tuple[int, int] | None]:
    """Input features of the attention's and the FFN's output projections per layer; None where there are none."""
    layout = locate(dense)
    sizes: list[tuple[int, int] | None] = []
    for layer in range(layout.dense.num_hidden_layers or 0):
        try:
            ends = [model.get_submodule(name) for name in (layout.attention_out(layer), layout.ffn_out(layer))]
            heads, channels = (end.get_parameter("weight").shape[-1] for end in ends)
        except AttributeError:  # the layer, or a part of it, is gone
            sizes.append(None)
        else:
            sizes.append((heads // layout.head_dim, channels))
    return sizes


def fit_amount(
    cut: Callable[[float], PreTrainedModel],
    watch: Callable[[PreTrainedModel], Timed],
    speedup: float,
    *,
    start: Fit | None = None,
    timings: int = 8,
) -> Fit:
    """
    The smallest amount whose measured speedup meets a budget, within a few percent.

    The part of the latency that is left is taken as linear in the amount between the nearest amounts on both sides;
    where that leads to sizes that were timed already, the interval is halved. No sizes are timed twice.

    Args:
        cut: makes the model of an amount.
        watch: times it.
        speedup: the budget.
        start: what another seed found, to be taken over if it holds within 2 %.
        timings: models timed at most, once the budget is met.

    Returns:
        A `Fit`; if no amount meets the budget, the fastest, with `met=False`.
    """
    known: dict[Any, Timed] = {}
    tried: list[tuple[float, Timed]] = []
    low, high = (0.0, 1.0), None  # (amount, part of the dense latency): too slow, and fast enough
    amount = 1 - 1 / speedup if start is None else start.amount
    enough = speedup * LONG if start is None else max(speedup, start.timed.speedup) * LONG
    for _ in range(CUTS):
        model = cut(amount)
        sizes = tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
        repeated = sizes in known
        if not repeated:
            known[sizes] = watch(model)
        timed = known[sizes]
        tried.append((amount, timed))
        point = (amount, 1 / timed.speedup)
        if timed.speedup < SHORT * speedup:
            low = point
        else:
            high = point
            if timed.speedup <= enough:
                break
        enough = speedup * LONG
        if high is None and amount == 1.0:
            break
        if high is not None and (high[0] - low[0] <= RESOLUTION or len(known) >= timings):
            break
        amount = _between(low, high, 1 / speedup, halve=repeated) if high else _beyond(low, 1 / speedup)
    met = [pair for pair in tried if pair[1].speedup >= SHORT * speedup]
    amount, timed = min(met, key=lambda pair: pair[0]) if met else max(tried, key=lambda pair: pair[1].speedup)
    return Fit(amount, timed, bool(met), len(known))


def _beyond(low: tuple[float, float], part: float) -> float:
    """A larger amount, on the line from (0, 1) through the last one; 1 at most."""
    amount, left = low
    further = amount * (1 - part) / (1 - left) if left < 1 else 2 * amount
    return min(1.0, max(further * 1.02, amount + 0.04))


def _between(low: tuple[float, float], high: tuple[float, float], part: float, *, halve: bool) -> float:
    width = high[0] - low[0]
    if halve or low[1] <= high[1]:
        return low[0] + width / 2
    place = (low[1] - part) / (low[1] - high[1])
    return low[0] + width * min(0.9, max(0.1, place))
