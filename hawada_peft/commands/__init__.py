"""
The commands of `hawada` as Python calls of the same names and words.

Each does the work and returns a result with `to_dict()` for scripts and a `str()` for people. None prints.

Example:

    >>> from hawada_peft import commands
    >>> result = commands.slim("teacher", "adapter", "slim")  # doctest: +SKIP
    >>> commands.verify(result.folder, base="teacher", adapter="adapter").ok  # doctest: +SKIP
    True
"""

from ._demo import DemoResult, demo
from ._measure import MeasureResult, measure
from ._plan import PlanResult, plan
from ._report import report
from ._slim import slim
from ._train import TrainSteps, train
from ._verify import verify

__all__ = [
    "DemoResult",
    "MeasureResult",
    "PlanResult",
    "TrainSteps",
    "demo",
    "measure",
    "plan",
    "report",
    "slim",
    "train",
    "verify",
]
