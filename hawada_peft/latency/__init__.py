"""Measured latency: the clock (`latency.measure`), the table of costs, the estimate, the budget."""

from .budget import LatencyBudget
from .build import TablePlan, build_table
from .clock import Effort, measure_built, measure_many
from .regime import Regime
from .table import LatencyTable, Realised
from .timing import Timing

__all__ = [
    "Effort",
    "LatencyBudget",
    "LatencyTable",
    "Realised",
    "Regime",
    "TablePlan",
    "Timing",
    "build_table",
    "measure_built",
    "measure_many",
]
