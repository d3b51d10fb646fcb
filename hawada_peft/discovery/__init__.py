"""For whoever asks what can be removed of a model: found and proved for any transformers class."""

from .anatomy import (
    EXPERTS,
    FFN,
    HEADS,
    HIDDEN,
    INPUT,
    KINDS,
    LOGITS,
    NORM,
    OTHER,
    PARAMETER,
    Anatomy,
    Axis,
    Number,
    PerLayer,
    Pinned,
    Place,
    Refusal,
    Rows,
    Segment,
    Stack,
)
from .families import find_parts, parts_of
from .inspected import inspect
from .table import table_of

__all__ = [
    "EXPERTS",
    "FFN",
    "HEADS",
    "HIDDEN",
    "INPUT",
    "KINDS",
    "LOGITS",
    "NORM",
    "OTHER",
    "PARAMETER",
    "Anatomy",
    "Axis",
    "Number",
    "PerLayer",
    "Pinned",
    "Place",
    "Refusal",
    "Rows",
    "Segment",
    "Stack",
    "find_parts",
    "inspect",
    "parts_of",
    "table_of",
]
