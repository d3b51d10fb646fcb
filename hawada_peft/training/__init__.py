"""Training of gates: distillation from the frozen model itself, to a target shape."""

from .distill import get_student_logits, get_teacher_logits, kl_divergence, mean_squared_error
from .importance import gate_importance, init_gates
from .penalties import size_penalty
from .trainer import HawAdaTrainer

__all__ = [
    "HawAdaTrainer",
    "gate_importance",
    "get_student_logits",
    "get_teacher_logits",
    "init_gates",
    "kl_divergence",
    "mean_squared_error",
    "size_penalty",
]
