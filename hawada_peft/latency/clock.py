"""What times a call: a clock, the wait for the device, and what is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from .regime import Regime
from .runner import Runner, prepare


class Clock:
    """
    The real one: models are called, and the time that this takes is read off.

    Another one is given as `Effort(clock=...)`: that of the processor (`Clock(time.thread_time)`), or one on which
    nothing depends on the machine (`ToyClock`).

    Args:
        seconds (`Callable`): reads the time.
    """

    elsewhere = False
    """Whether it measures models by itself, where they are deployed: one at a time, and whole answers as such."""

    def __init__(self, seconds: Callable[[], float] = time.perf_counter) -> None:
        self._seconds = seconds

    def now(self) -> float:
        """The time in seconds; only differences count."""
        return self._seconds()

    def wait(self, regime: Regime) -> None:
        """Wait until the regime's device has done its work."""
        device = torch.device(regime.device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    def runner(self, model: nn.Module, regime: Regime) -> Runner:
        """
        The call of a model under a regime, ready to be repeated.

        Raises:
            InvalidRegimeError: if the model cannot run that way.
        """
        return prepare(model, regime)

    def samples(self, models: Sequence[nn.Module], regime: Regime, timed: Callable[[], np.ndarray]) -> np.ndarray:
        """
        Milliseconds of calls: (models, rounds).

        Args:
            models: in the regime's dtype on its device.
            regime: the conditions.
            timed: calls the models, and times them by this clock.
        """
        return timed()

    def device_name(self, regime: Regime) -> str:
        """What is timed on; the tables of one are refused on another."""
        return regime.device_name
