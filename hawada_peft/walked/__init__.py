"""Models larger than memory, walked through layer by layer from their files: plans without gradients."""

from .activity_quality import ActivityQuality, walk_checkpoint
from .directions import checkpoint_basis
from .plans import plan_checkpoint

__all__ = [
    "ActivityQuality",
    "checkpoint_basis",
    "plan_checkpoint",
    "walk_checkpoint",
]
