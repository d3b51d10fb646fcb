"""From a budget to a plan: the latency table of a model, every legal shape scored, the best ones built and timed."""

from .budgeted import find_plan
from .effort import SearchEffort
from .result import SearchResult
from .timed import measure_table

__all__ = [
    "SearchEffort",
    "SearchResult",
    "find_plan",
    "measure_table",
]
