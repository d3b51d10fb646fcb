"""From the dense model's outputs to a loss, and a slim model trained on it."""
