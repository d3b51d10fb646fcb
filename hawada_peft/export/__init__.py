"""From gates to a verified vanilla model: plan, legality, slicing, slim model, verification."""

from .plan import Plan
from .search_state import SearchEffort, SearchResult
from .slicing import slice_conv, slice_embedding, slice_linear
from .slim import slim
from .stream import SlimCheckpoint, slim_checkpoint
from .verify import Verification, save_slim, verify_slim

__all__ = [
    "Plan",
    "SearchEffort",
    "SearchResult",
    "SlimCheckpoint",
    "Verification",
    "save_slim",
    "slice_conv",
    "slice_embedding",
    "slice_linear",
    "slim",
    "slim_checkpoint",
    "verify_slim",
]
