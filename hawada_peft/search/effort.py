"""How hard a search tries."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidBudgetError


@dataclass(frozen=True)
class SearchEffort:
    """
    How hard to look.

    Args:
        margin (`float`): how far below the budget to stay, in parts of it; room for the spread of the timer.
        top (`int`): shapes that are realised, timed and evaluated per round.
        rounds (`int`): rounds at most.
        instances (`int`): how often the dense model and the answer are built and timed side by side at the end. Models
            of one shape differ in speed by where their weights lie in memory; the median counts.

    Raises:
        InvalidBudgetError: on impossible numbers.
    """

    margin: float = 0.01
    top: int = 4
    rounds: int = 12
    instances: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 0.5 or min(self.top, self.rounds, self.instances) < 1:
            raise InvalidBudgetError(
                f"search needs 0 <= margin < 0.5, and top, rounds and instances of at least 1; got {self}"
            )
