"""For whoever refits by hand: a slim model's output projections, by least squares, to the dense model."""

from .reconstruction import Reconstruction, reconstruct

__all__ = [
    "Reconstruction",
    "reconstruct",
]
