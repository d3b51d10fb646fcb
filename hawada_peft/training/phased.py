"""Gates trained in phases towards a goal: the loss, the moment of decision, the log and the checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerControl, TrainerState

from ..distil.divergence import get_teacher_logits
from ..distil.events import Told
from ..distil.objective import Distillation
from ..distil.unlabelled import UnlabelledTrainer
from ..errors import CheckpointError, HawAdaError
from ..files.atomic import write_text
from ..gates.attach import collect_gates
from ..planning.plan import Plan
from ..planning.towers import Sizes
from ..vanilla.batches import position_mask
from ..vanilla.heads import head_of
from ..vanilla.outputs import get_student_logits
from .arguments import GateTrainingArguments
from .goal import Goal, target_of
from .history import GateHistory, keep_ratios
from .phases import Phases
from .rates import regroup
from .saved_state import STATE_FILE, read_state, restore_gates, restore_plan

logger = logging.getLogger(__name__)


class PhasedTrainer(UnlabelledTrainer):
    """
    Trains gates towards a goal, in three phases by the number of the step.

    Warm-up: the gates are open. Soft: the gates move towards the goal, as the `relaxation` says. Hard: the plan has
    been made and is applied, in training as well. Evaluation always computes what the slim model would: before the
    decision that of the plan as it would be now.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        args (`GateTrainingArguments`): how gates are trained.
        goal (`Goal`, *optional*): what they are trained towards; before the first step at the latest.
        kwargs: as in `Trainer`.

    Attributes:
        history (`GateHistory`): the gates of each layer at every logging step; `gate_history.json` in the output
            folder holds them.
    """

    args: GateTrainingArguments

    def __init__(self, model: PeftModel, args: GateTrainingArguments, goal: Goal | None, **kwargs: Any) -> None:
        self.objective: Distillation = Distillation(args.kd_temperature, args.kl_weight, args.mse_weight)
        self.phases: Phases = Phases(model, args.relaxation, args.warmup_fraction, args.soft_fraction)
        self._goal = goal
        self._terms: dict[str, list[torch.Tensor]] = {}
        self.gated: Any = model  # `self.model`, typed for what PEFT passes on to the tuner
        self.history = GateHistory(model)
        super().__init__(model, args, **kwargs)
        applied = self.gated.applied_plan()
        if applied is not None and (self._goal is None or applied.target != self._goal.target):
            logger.warning("the applied plan has other sizes than the goal; it is opened: %s", applied)
            self.gated.apply_plan(None)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch: divide by their number

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; no gate is relaxed afterwards."""
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.phases.relax(None)

    def _events(self) -> dict[str, Told]:
        return super()._events() | {
            "on_train_begin": self._on_begin,
            "on_step_begin": self._on_step,
            "on_save": self._on_save,
            "on_train_end": self._on_end,
        }

    def _begin(self) -> None:
        """Called before the first step, when all processes have the gates of the first one."""

    def _end(self) -> None:
        """Called after the last step, under the plan."""

    def _on_begin(self, state: TrainerState, control: TrainerControl) -> None:
        self._begin()
        if not self.history.entries:
            self._note()

    def _on_step(self, state: TrainerState, control: TrainerControl) -> None:
        if self.phases.begin_step(self.goal, state.global_step, state.max_steps):
            self.decide()

    def _on_save(self, state: TrainerState, control: TrainerControl) -> None:
        if state.is_world_process_zero:
            self._save_state(Path(str(self.args.output_dir)) / f"checkpoint-{state.global_step}")
            self._write_history()

    def _on_end(self, state: TrainerState, control: TrainerControl) -> None:
        if not self.decided:  # the whole training was soft
            self.decide()
        self._end()
        if not self.history.entries or self.history.entries[-1]["step"] < state.global_step:
            self._note()
        if state.is_world_process_zero:
            self._write_history()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The distillation loss, and while the gates are soft the penalties; arguments as in `Trainer`."""
        teacher = get_teacher_logits(self.accelerator.unwrap_model(model), inputs)
        student = get_student_logits(model, inputs)
        mask = position_mask(inputs, student.shape[:-1])
        terms = self.objective.terms(student, teacher, mask, head=head_of(self.gated, student))
        loss = self.objective.loss(terms)
        if model.training and not self.decided:
            for name, (weight, term) in self.phases.penalties(self.args, self.goal, self._progress()).items():
                terms[name] = term
                loss = loss + weight * term.to(loss)
        if model.training:
            for name, term in terms.items():
                self._terms.setdefault(name, []).append(term.detach())
        return (loss, {"logits": student}) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in `Trainer`; the gates get a learning rate of their own, and no weight decay, if one is given."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.args.gate_learning_rate is not None:
            thetas = [gate.theta for gate in collect_gates(self.gated).values() if gate.theta.requires_grad]
            regroup(optimizer, thetas, self.args.gate_learning_rate)
        return optimizer

    @property
    def goal(self) -> Goal:
        """
        What the gates are trained towards.

        Raises:
            HawAdaError: if a budget has not become a goal yet.
        """
        if self._goal is None:
            raise HawAdaError("the budget becomes a goal when `train` begins")
        return self._goal

    @property
    def target(self) -> Sizes:
        """The shape that the gates would get now; after the decision, the one they got. Of several towers one each."""
        applied = self.gated.applied_plan()
        return self.goal.target if applied is None else cast(Plan, applied).target

    @property
    def decided(self) -> bool:
        """Whether the plan has been made and applied."""
        return self.phases.decided

    def decide(self) -> None:
        """Make the plan from the gates as they are, and apply it in training as well."""
        self.phases.relax(None)
        plan = self.phases.plan(self.goal.target).rounded(self.goal.roundings)
        self.gated.apply_plan(plan, in_training=True)
        logger.info("step %d: %s", self.state.global_step, plan)

    def _progress(self) -> float:
        return self.phases.progress(self.state.global_step, self.state.max_steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss, averaged since the last time, and the keep ratios with it."""
        if "loss" in logs and self._terms:
            means = {name: torch.stack(terms).float().mean() for name, terms in self._terms.items()}
            logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            self._terms.clear()
            logs |= keep_ratios(self.gated, self.gated.applied_plan() or self.phases.approached)
            self._note(logs)
        super().log(logs, *args, **kwargs)

    def _note(self, figures: Mapping[str, float] | None = None) -> None:
        """The gates as they are, into the history."""
        step, plan = self.state.global_step, self.gated.applied_plan() or self.phases.approached
        self.history.record(step, self.phases.name(step, self.state.max_steps), plan, figures or {})

    def _write_history(self) -> None:
        self.history.write(Path(str(self.args.output_dir)), self._facts())

    def _facts(self) -> dict[str, Any]:
        """What stands beside the history, for JSON."""
        return {}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; before the decision under the plan that the gates would get now."""
        with nullcontext() if self._goal is None else self.phases.planned(self._goal):
            return super().evaluation_loop(*args, **kwargs)

    # ----------------------------------------------------------- checkpoints

    def _state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the adapter, for JSON."""
        return {"goal": self.goal.state_dict(), "phases": self.phases.state_dict(), "history": self.history.entries}

    def _save_state(self, folder: Path) -> None:
        write_text(folder / STATE_FILE, json.dumps(self._state()))

    def _read_state(self, folder: Path) -> dict[str, Any]:
        """What `_save_state` has written, read before anything is loaded."""
        return read_state(folder)

    def _restore_state(self, state: Mapping[str, Any]) -> None:
        self._goal = self._goal or Goal(self.gated, target_of(state["goal"]))
        self._goal.load_state_dict(state["goal"])
        self.phases.load_state_dict(state["phases"])
        self.history.entries = state.get("history", [])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = self._read_state(folder)
        restore_gates(self.gated, folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_plan(self.gated, folder)
        try:
            self._restore_state(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / STATE_FILE} is damaged: {type(error).__name__}: {error}") from error

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A model with soft gates is none that can be exported: it does not compete."""
        return self.decided and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            restore_plan(self.gated, Path(self.state.best_model_checkpoint))
