"""Why a size is not the one that was asked for. It is told by the code that rounds, and kept with the plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rounding:
    """
    A size that was asked for, and the one that was chosen.

    Args:
        axis (`str`): the size's name in a `Shape`.
        asked (`float`): as it was asked for.
        chosen (`int`): what it became.
        source (`str`): who asked: `"keep ratio"`, `"gates"`.
        reason (`str`): why they differ.
    """

    axis: str
    asked: float
    chosen: int
    source: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"asked": float(f"{self.asked:.6g}")}
