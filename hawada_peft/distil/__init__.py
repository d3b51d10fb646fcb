"""For whoever distils by hand: a gated model's and its teacher's logits, their divergence, slim models' trainer."""

from ..vanilla.outputs import get_student_logits
from .divergence import get_teacher_logits, kl_divergence, mean_squared_error
from .objective import Distillation
from .recovery import recover
from .trainer import DistillTrainer

__all__ = [
    "DistillTrainer",
    "Distillation",
    "get_student_logits",
    "get_teacher_logits",
    "kl_divergence",
    "mean_squared_error",
    "recover",
]
