"""Folders of weights: reloaded as any user would, and compared."""

from .verify import Verification, verify_slim

__all__ = [
    "Verification",
    "verify_slim",
]
