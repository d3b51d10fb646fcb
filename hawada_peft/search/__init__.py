"""From a budget to a plan: the latency table of a model, every legal shape scored, the best ones built and timed."""

from .budgeted import find_plan
from .result import SearchResult
from .timed import measure_table

__all__ = [
    "SearchResult",
    "find_plan",
    "measure_table",
]
