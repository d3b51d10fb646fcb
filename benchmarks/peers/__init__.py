"""Peers of the frontier bench, run for real (Torch-Pruning) or written after their papers and code."""
