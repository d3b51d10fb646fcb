"""The parts of the system bench (`benchmarks/system.py`): sizes, rows, what is measured, and the page."""
