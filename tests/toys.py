"""Machines that obey a law: tables that are known, and clocks that go by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from hawada_peft import Shape
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.runner import Runner
from hawada_peft.latency.table import LatencyTable
from hawada_peft.latency.timing import Timing
from hawada_peft.latency.toy import ToyClock
from hawada_peft.vanilla.family import locate

REGIME = Regime(mode="prefill", seq_len=8)
CLOCK = ToyClock()


def by_shape(law: Callable[[Shape], float]) -> ToyClock:
    """A clock on which a call takes the milliseconds that a law gives for the model's complete shape."""
    return ToyClock(lambda model, regime: law(locate(model).full))


def by_table(table: LatencyTable, factor: float = 1.0) -> ToyClock:
    """A clock on which all but the dense shape take so many times what a table says."""

    def law(model: nn.Module, regime: Regime) -> float:
        shape = locate(model).dense
        return table.estimate(shape) * (1.0 if shape == table.dense else factor)

    return ToyClock(law)


def once(clock: ToyClock = CLOCK, **changes: object) -> Effort:
    """Few candidates, each timed once: a law is exact."""
    few = {"warmup": 0, "lead_in": 0, "min_rounds": 1, "max_rounds": 1, "cache": False}
    return Effort.quick(**(few | {"clock": clock} | changes))


class StoppedClock(ToyClock):
    """No call can be timed on it: what has a table and a shape needs none."""

    def runner(self, model: nn.Module, regime: Regime) -> Runner:
        raise AssertionError(f"{type(model).__name__} was timed")


def toy_table(
    dense: Shape, *, launch: float, arithmetic: float, model: Mapping[str, int | str] | None = None
) -> LatencyTable:
    """Milliseconds per layer: `launch`, and `arithmetic` in equal parts for attention and FFN."""
    heads, groups, ffn, layers = dense.sizes().values()
    per_group = dense.heads_per_group
    grid = [[arithmetic / 2 * g * r / heads for r in range(1, per_group + 1)] for g in range(1, groups + 1)]
    low = grid[0][0]
    return LatencyTable(
        regime=REGIME,
        device_name=CLOCK.device_name(REGIME),
        model=model or {"model_type": "toy", "hidden_size": 64, "head_dim": 4, **dense.sizes()},
        versions={},
        fixed_ms=0.1,
        layer_ms=launch + low,
        kv_groups=tuple(range(1, groups + 1)),
        heads_per_group=tuple(range(1, per_group + 1)),
        attention_ms=tuple(tuple(value - low for value in row) for row in grid),
        ffn_sizes=(0, ffn),
        ffn_ms=(0.0, arithmetic / 2),
        interaction_ms=0.0,
        multiple=8,
        dense_ms=0.1 + layers * (launch + arithmetic),
    )


def timing(ms: float) -> Timing:
    return Timing(ms, ms, 0.0, 0.0, True, 1, REGIME, CLOCK.device_name(REGIME), {})
