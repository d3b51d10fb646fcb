"""For whoever judges: a slim model beside the dense one, by what it computes and how long it takes."""

from .evaluate import Evaluation, evaluate_slim
from .measures import qualities

__all__ = ["Evaluation", "evaluate_slim", "qualities"]
