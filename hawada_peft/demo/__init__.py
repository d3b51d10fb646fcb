"""`hawada demo`: a ViT and a Llama from training to a verified slim model, in minutes on two CPU cores."""

from .pipeline import run_demo
from .table import Row, render

__all__ = ["Row", "render", "run_demo"]
