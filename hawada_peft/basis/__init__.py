"""Bases in which widths are cut almost for free: of the residual stream, and inside attention heads."""

from typing import TYPE_CHECKING

from ..lazy import names_of

if TYPE_CHECKING:
    from .heads.narrow import narrow_heads as narrow_heads
else:
    __getattr__, __dir__ = names_of(__name__, __file__)

__all__ = ["narrow_heads"]
