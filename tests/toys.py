"""
A machine whose latency follows from a model's sizes alone: no test depends on how fast this one is just now.

`python tests/toys.py SCRIPT ...` runs a script on it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from hawada_peft.latency import clock
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.timing import Timing

Key = TypeVar("Key")

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
FIXED_MS, MS_PER_WEIGHT = 0.5, 1e-3


def toy_ms(model: nn.Module) -> float:
    """A fixed part, and one by the weights of all linear modules: additive in heads, channels and layers."""
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return FIXED_MS + MS_PER_WEIGHT * weights


def toy_timing(ms: float, regime: Regime) -> Timing:
    """A timing without spread."""
    return Timing(ms, ms, 0.0, 0.0, True, 1, regime, regime.device_name, VERSIONS)


def toy_times(models: Mapping[Key, nn.Module], regime: Regime, *_: Any) -> dict[Key, Timing]:
    """In place of `clock._time`: nothing is run."""
    return {key: toy_timing(toy_ms(model), regime) for key, model in models.items()}


def install() -> None:
    """For a process that does nothing else."""
    clock._time = toy_times


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
