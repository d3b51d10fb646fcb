"""The moments of a training, told to methods of its trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Told = Callable[[TrainerState, TrainerControl], None]


class Events(TrainerCallback):
    """
    Calls a function at each moment of a training that it is given one for.

    Args:
        told: by the names of `TrainerCallback`'s methods, as `on_step_begin`.
    """

    def __init__(self, **told: Told) -> None:
        for name, function in told.items():
            setattr(self, name, _method(function))


def _method(function: Told) -> Callable[..., None]:
    def told(args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        function(state, control)

    return told
