"""A clock that goes by a law: for tests, examples and rehearsals, where nothing may depend on a real machine."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..discovery.inputs import configs_of
from ..errors import HawAdaError
from .clock import Clock
from .regime import Regime
from .runner import Runner, check_call

Law = Callable[[nn.Module, Regime], float]
"""The milliseconds of a call."""

CALL_MS, LAYER_MS, WEIGHT_MS = 0.1, 0.02, 1e-6
"""Milliseconds of a call, of each layer, and of each weight that is no embedding."""

TICK = 2.0**-40
"""Seconds. Times are multiples of it, so that sums and differences of them are exact, however late it is."""


def toy_law(model: nn.Module, regime: Regime) -> float:
    """
    Milliseconds that grow with the layers and with the weights in them; the regime makes no difference.

    Raises:
        InvalidRegimeError: if the model cannot run under it.
    """
    found = check_call(model, regime)
    weights = found.num_parameters(exclude_embeddings=True)
    layers = sum(getattr(config, "num_hidden_layers", 0) for config in configs_of(found.config))
    return CALL_MS + LAYER_MS * layers + WEIGHT_MS * weights


class ToyClock(Clock):
    """
    A clock on which a call takes what a law says. Exact, the same everywhere, and no model is run.

    Args:
        law (`Callable`): the milliseconds of a call, of the model and the regime; `toy_law` if left out.

    Example:

        >>> from hawada_peft import Effort
        >>> Effort.quick(clock=ToyClock()).clock.now()
        0.0
    """

    def __init__(self, law: Law = toy_law) -> None:
        super().__init__(lambda: self._passed)
        self._passed, self._law = 0.0, law

    def wait(self, regime: Regime) -> None:
        """Nothing is under way."""

    def runner(self, model: nn.Module, regime: Regime) -> Runner:
        """A call that lets time pass."""
        milliseconds = self._law(model, regime)
        if not 0 < milliseconds < math.inf:
            raise HawAdaError(f"the law of a toy clock must give milliseconds above 0, got {milliseconds!r}")
        seconds = round(1e-3 * milliseconds / TICK) * TICK

        def call() -> None:
            self._passed += seconds

        return Runner(call, reset=lambda: None)

    def device_name(self, regime: Regime) -> str:
        """No device."""
        return "a toy clock"
