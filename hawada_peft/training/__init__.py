"""Training of gates: distillation from the frozen model itself, to a shape, a ratio or a latency."""

from .arguments import GateTrainingArguments
from .penalties import bimodality_penalty, floor_penalty, size_penalty
from .start import init_gates
from .trainer import HawAdaTrainer

__all__ = [
    "GateTrainingArguments",
    "HawAdaTrainer",
    "bimodality_penalty",
    "floor_penalty",
    "init_gates",
    "size_penalty",
]
