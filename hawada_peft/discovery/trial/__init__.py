"""A small model with random weights, and claims tried on it."""
