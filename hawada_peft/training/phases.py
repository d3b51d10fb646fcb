"""The phases of gate training: open, soft, hard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel

from ..gates.attach import collect_gates
from ..gates.reading import axes_of
from ..gates.relaxation import RELAXATIONS, Relaxation
from ..planning.plan import Plan
from ..planning.towers import Sizes
from .arguments import GateTrainingArguments
from .goal import Goal
from .penalties import bimodality_penalty, floor_penalty


class Phases:
    """
    Which gates are how open at which step.

    Warm-up: all are open. Soft: they move, as the relaxation says. Hard: the plan is applied, in training as well.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        relaxation (`str`): one of `RELAXATIONS`.
        warmup_fraction, soft_fraction (`float`): the parts of the steps before the gates move, and before the plan is
            made, in [0, 1].
    """

    def __init__(self, model: PeftModel, relaxation: str, warmup_fraction: float, soft_fraction: float) -> None:
        self.model: Any = model  # its tuner's methods come through PEFT
        self.relaxation = RELAXATIONS[relaxation]
        self.warmup_fraction, self.soft_fraction = warmup_fraction, soft_fraction
        self.approached: Plan | None = None

    @property
    def decided(self) -> bool:
        """Whether the plan has been made and applied."""
        return any(self.model.peft_config[name].plan is not None for name in self.model.active_adapters)

    def progress(self, step: int, steps: int) -> float:
        """How much of the soft part is over when a step of so many is; 0 in the warm-up."""
        first, last = self._first_soft(steps), self._first_hard(steps)
        return min(1.0, max(0.0, (step + 1 - first) / max(1, last - first)))

    def name(self, step: int, steps: int) -> str:
        """The phase after so many steps."""
        return "hard" if self.decided else "soft" if self.progress(step - 1, steps) > 0 else "warm-up"

    def _first_soft(self, steps: int) -> int:
        return _whole(self.warmup_fraction * steps)

    def _first_hard(self, steps: int) -> int:
        return _whole(self.soft_fraction * steps)

    def begin_step(self, goal: Goal, step: int, steps: int) -> bool:
        """Bring the gates into the phase of a step. Returns whether it is time to decide."""
        if self.decided or step >= self._first_hard(steps):
            return not self.decided
        progress = self.progress(step, steps)
        self.relax(self.relaxation.at(progress) if progress > 0 else None)
        if not self.relaxation.draws_to_size and (self.approached is None or self.relaxation.reorders):
            self.approach(goal)
        return False

    def approach(self, goal: Goal) -> None:
        """Make the plan that the gates would get now the one that they approach."""
        self.approached = self.plan(goal.target)
        self.model.set_masks(self.approached)

    def plan(self, target: Sizes) -> Plan:
        """The plan that the gates would get at some sizes; the approached one, where its order is settled."""
        settled = self.approached is not None and not self.relaxation.reorders and self.approached.target == target
        return cast(Plan, self.approached) if settled else self.model.plan(target)

    @contextmanager
    def planned(self, goal: Goal) -> Iterator[None]:
        """Evaluation computes the plan that the gates would get now. Training goes on as if nothing had been."""
        if self.decided:
            yield
            return
        self.model.set_masks(self.plan(goal.target))
        try:
            yield
        finally:
            self.model.set_masks(self.approached)

    def penalties(
        self, args: GateTrainingArguments, goal: Goal, progress: float
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """
        What is added to the loss while the gates are soft.

        Args:
            args: the weights.
            goal: what the gates are drawn to.
            progress: of the soft part of training, in [0, 1].

        Returns:
            By name the weight, and the penalty: (), differentiable.
        """
        found: dict[str, tuple[float, torch.Tensor]] = {}
        gates = [gate for axis in axes_of(self.model).values() for gate in axis]
        if self.relaxation.draws_to_size and progress > 0 and (weight := args.size_weight):
            found["size"] = (weight, goal.penalty(progress))
        if weight := args.bimodality_weight:
            found["bimodality"] = (weight, bimodality_penalty([gate.open_probability() for gate in gates]))
        if weight := args.floor_weight:
            layers = [gate.open_probability() for gate in gates if gate.units > 1]
            found["floor"] = (weight, floor_penalty(layers, args.keep_floor))
        return found

    def relax(self, relaxation: Relaxation | None) -> None:
        """Give all active gates a relaxation, or take it from them."""
        for name in self.model.active_adapters:
            for gate in collect_gates(self.model, name).values():
                gate.relaxation = relaxation

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for JSON."""
        return {"approached": None if self.approached is None else self.approached.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.approached = None if state["approached"] is None else Plan.from_dict(state["approached"])
        if not self.decided:
            self.model.set_masks(self.approached)


def _whole(steps: float) -> int:
    """Steps rounded up, where it is not a product of floats that exceeds a whole number by nothing."""
    return math.ceil(steps - 1e-9)
