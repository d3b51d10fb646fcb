"""Models larger than memory, walked through layer by layer from their files: plans without gradients."""

from .plans import ActivityQuality, plan_checkpoint, walk_checkpoint

__all__ = [
    "ActivityQuality",
    "plan_checkpoint",
    "walk_checkpoint",
]
