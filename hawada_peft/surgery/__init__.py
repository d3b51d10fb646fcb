"""For whoever cuts by hand: a plan applied to a vanilla model, and modules with some of their features."""

from .slicing import slice_conv, slice_embedding, slice_linear
from .slimming import slim

__all__ = [
    "slice_conv",
    "slice_embedding",
    "slice_linear",
    "slim",
]
