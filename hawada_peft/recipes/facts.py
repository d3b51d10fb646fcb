"""What is learnt on the way of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState

from ..distil.events import Events
from ..race.record import RaceRecord
from ..refit.reconstruction import Reconstruction


class Evaluations(Events):
    """Of a recovery: when there are any, and what they found."""


class Facts:
    """
    What a recipe's result tells of its steps.

    Args:
        losses: of the gates, by what they are of.
    """

    def __init__(self, losses: Mapping[str, float]) -> None:
        self.losses = dict(losses)
        self.reconstruction: Reconstruction | None = None
        self.race: RaceRecord | None = None
        self.calibration: dict[str, Any] | None = None

    def evaluations(self) -> Evaluations:
        """For a recovery: it is evaluated after the last step, and the first and the last evaluation are kept."""
        return Evaluations(on_step_end=_evaluate_last, on_train_end=self._keep_evaluations)

    def _keep_evaluations(self, state: TrainerState, control: TrainerControl) -> None:
        found = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if found:
            self.losses |= {"recovery_start": found[0], "recovery_end": found[-1]}


def _evaluate_last(state: TrainerState, control: TrainerControl) -> None:
    if state.global_step >= state.max_steps:
        control.should_evaluate = True
