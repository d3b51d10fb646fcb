"""From a plan to a slim model."""
