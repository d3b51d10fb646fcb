"""Training of gates: distillation from the frozen model itself, to a target shape."""

from ..distil.divergence import get_teacher_logits, kl_divergence, mean_squared_error
from ..distil.objective import Distillation
from ..distil.recovery import recover
from ..distil.trainer import DistillTrainer
from ..planning.importance import gate_importance
from ..vanilla.outputs import get_student_logits
from .arguments import GateTrainingArguments
from .penalties import size_penalty
from .start import init_gates
from .trainer import HawAdaTrainer

__all__ = [
    "DistillTrainer",
    "Distillation",
    "GateTrainingArguments",
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
