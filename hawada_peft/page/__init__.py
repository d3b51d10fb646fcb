"""The report of a slim model for people: one HTML page with pictures."""

from .write import WrittenReport, write_report

__all__ = ["WrittenReport", "write_report"]
