"""Rows of data: where transformers' models of each family keep what is gated."""

from . import llama, vit

__all__ = ["llama", "vit"]
