"""Training of gates: distillation from the frozen model itself, to a target shape."""

from .distill import get_student_logits, get_teacher_logits, kl_divergence, mean_squared_error
from .distill_trainer import DistillTrainer
from .importance import gate_importance, init_gates
from .objective import Distillation
from .penalties import size_penalty
from .recovery import recover
from .trainer import HawAdaTrainer

__all__ = [
    "DistillTrainer",
    "Distillation",
    "HawAdaTrainer",
    "gate_importance",
    "get_student_logits",
    "get_teacher_logits",
    "init_gates",
    "kl_divergence",
    "mean_squared_error",
    "recover",
    "size_penalty",
]
