"""From gates to a verified vanilla model: plan, legality, slicing, slim model, verification."""

from .plan import Plan
from .slicing import slice_conv, slice_embedding, slice_linear
from .slim import slim
from .verify import Verification, save_slim, verify_slim

__all__ = [
    "Plan",
    "Verification",
    "save_slim",
    "slice_conv",
    "slice_embedding",
    "slice_linear",
    "slim",
    "verify_slim",
]
