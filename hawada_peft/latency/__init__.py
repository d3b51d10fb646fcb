"""For whoever measures: the clock, how hard it works (`Effort`), the table of costs, the estimate, the budget."""

from .budget import LatencyBudget
from .build import build_table
from .clock import Clock
from .effort import Effort
from .measuring import measure_built, measure_many
from .regime import Regime
from .table import LatencyTable, Realised
from .timing import Timing
from .toy import ToyClock

__all__ = [
    "Clock",
    "Effort",
    "LatencyBudget",
    "LatencyTable",
    "Realised",
    "Regime",
    "Timing",
    "ToyClock",
    "build_table",
    "measure_built",
    "measure_many",
]
