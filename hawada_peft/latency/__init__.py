"""For whoever measures: the clock, how hard it works (`Effort`), the table of costs, the estimate, the budget."""

from typing import TYPE_CHECKING

from ..lazy import names_of

if TYPE_CHECKING:
    from .budget import LatencyBudget as LatencyBudget
    from .build import build_table as build_table
    from .clock import Clock as Clock
    from .effort import Effort as Effort
    from .external import ExternalClock as ExternalClock
    from .measuring import measure_built as measure_built
    from .measuring import measure_many as measure_many
    from .regime import Regime as Regime
    from .table import LatencyTable as LatencyTable
    from .table import Realised as Realised
    from .timing import Timing as Timing
    from .toy import ToyClock as ToyClock
else:
    __getattr__, __dir__ = names_of(__name__, __file__)

__all__ = [
    "Clock",
    "Effort",
    "ExternalClock",
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
