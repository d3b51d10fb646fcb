"""Folders of weights: read, written, compared."""
