"""How a model calls its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Call:
    """How the model calls one layer on one batch, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def absent(self) -> list[bool]:
        """Which of the values are None."""
        return [value is None for value in (*self.args, *self.kwargs.values())]

    def same(self, other: Call) -> bool:
        """Whether the other call has the very same objects."""
        mine, others = (self.args, *self.kwargs.items()), (other.args, *other.kwargs.items())
        return len(mine) == len(others) and all(_same(*pair) for pair in zip(mine, others, strict=True))


def _same(value: Any, other: Any) -> bool:
    """Whether two values are one object, equal plain values, or tuples of such."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        return len(value) == len(other) and all(_same(*pair) for pair in zip(value, other, strict=True))
    return value is other or (
        isinstance(value, bool | int | float | str) and type(value) is type(other) and value == other
    )
