"""The parts of the frontier bench (`benchmarks/frontier.py`): sizes by latency, quality, the page, a summary."""
