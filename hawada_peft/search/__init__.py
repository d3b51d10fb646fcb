"""From a budget to a plan: the latency table of a model, every legal shape scored, the best ones built and timed."""

from .budgeted import find_plan
from .result import SearchResult
from .timed import measure_table
from .walked import ActivityQuality, plan_checkpoint, walk_checkpoint

__all__ = [
    "ActivityQuality",
    "SearchResult",
    "find_plan",
    "measure_table",
    "plan_checkpoint",
    "walk_checkpoint",
]
