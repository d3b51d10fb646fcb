"""The names of files in a slim folder."""

from __future__ import annotations

CARD_NAME = "README.md"


REPORT_NAME = "hawada_report.json"
