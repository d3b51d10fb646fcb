"""From gates to a plan."""
