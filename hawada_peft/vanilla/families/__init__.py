"""Rows of data: where transformers' models of each family keep what is gated."""

from . import bert, llama, vit

__all__ = ["bert", "llama", "vit"]
