"""
The trainer of gates: `transformers.Trainer` with a distillation loss, a goal and a moment of decision.

Long because transformers asks one class for all of a training: loss, phases, checkpoints, log.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..basis.find import ensure_basis
from ..distil.divergence import get_teacher_logits
from ..distil.objective import Distillation
from ..distil.unlabelled import UnlabelledTrainer, adapter_folder
from ..errors import CheckpointError, HawAdaError
from ..files.atomic import write_text
from ..gates.adapter import GateAdapter
from ..gates.attach import collect_gates
from ..gates.reading import are_fresh, axes_of, open_probabilities
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.table import LatencyTable
from ..planning.plan import Plan
from ..processes import in_main_process
from ..search.budgeted import search_plan
from ..search.result import SearchResult
from ..search.timed import dense_model
from ..vanilla.batches import Batch, main_input, position_mask
from ..vanilla.family import locate
from ..vanilla.heads import head_of
from ..vanilla.outputs import get_student_logits
from ..vanilla.shape import SIZES, Shape
from .arguments import GateTrainingArguments
from .comparison import Comparison, StartingPoint, compare, set_aside
from .goal import Goal
from .history import GateHistory
from .penalties import bimodality_penalty, floor_penalty
from .phases import Phases
from .start import init_gates

logger = logging.getLogger(__name__)

STATE_FILE = "hawada_state.json"
"""Beside the adapter in a checkpoint: the goal, the approached plan, the history, the search."""


class HawAdaTrainer(UnlabelledTrainer):
    """
    Trains the gates of a PEFT model by distillation from the same model with the adapter disabled.

    Three phases, by the number of the step. Warm-up: the gates are open. Soft: the gates move towards the goal, as the
    `relaxation` says. Hard: the plan has been made and is applied, in training as well, so that the rest runs under
    exactly the mask that is exported. Evaluation always computes what the slim model would: before the decision that
    of the plan as it would be now.

    Untrained gates are started by `init_gates` on the first examples of the training data. When the training ends, the
    gates are compared with that start, at the same shape, on examples set aside, and the better is kept
    (`keep_better`), with whatever was trained with the gates: never worse than no training. The goal is a shape, or a
    budget, which becomes a shape by `find_plan` before training.

    Args:
        model (`PeftModel`): made by `get_peft_model(base, HawAdaConfig(...))`.
        args (`GateTrainingArguments`): how gates are trained; plain `TrainingArguments` mean the defaults.
        shape (`Shape`, *optional*): the sizes of the slim model. One of `shape`, `keep_ratio` and `budget` is given.
        keep_ratio (`float` or `dict`, *optional*): instead of a shape, as in `HawAdaModel.plan`.
        budget (`LatencyBudget`, *optional*): instead of a shape.
        effort (`Effort`, *optional*): how hard latency is measured and the shape for a budget searched.
        table (`LatencyTable`, *optional*): measured here before; measured or taken from the disk cache if left out.
        hidden_sizes (*optional*): as in `find_plan`.
        refit (*optional*): as in `find_plan`.
        kwargs: as in `Trainer`.

    Attributes:
        search (`SearchResult`, *optional*): how a budget became a shape, once that is known. For `ExportFacts`.
        comparison (`Comparison`, *optional*): the trained gates against their start, once the training has ended.
        set_aside (`Dataset`, *optional*): the examples of the training data that decide it; they are not trained on.
        history (`GateHistory`): the gates of each layer at every logging step; `gate_history.json` in the output
            folder holds them.

    Raises:
        HawAdaError: listing everything that is wrong with the arguments; if no gate can be trained.
    """

    args: GateTrainingArguments

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments | None = None,
        *,
        shape: Shape | None = None,
        keep_ratio: float | Mapping[str, float] | None = None,
        budget: LatencyBudget | None = None,
        effort: Effort | None = None,
        table: LatencyTable | None = None,
        hidden_sizes: Sequence[int] | None = None,
        refit: bool | None = None,
        **kwargs: Any,
    ) -> None:
        problems = _model_problems(model)
        if sum(given is not None for given in (shape, keep_ratio, budget)) != 1:
            problems.append("give one of `shape`, `keep_ratio` and `budget`: what the gates are trained towards")
        options: GateTrainingArguments | None = None
        try:
            options = GateTrainingArguments.of(args)
        except HawAdaError as error:
            problems.append(str(error))
        if problems or options is None:
            raise HawAdaError("\n".join(problems))
        self.objective: Distillation = Distillation(options.kd_temperature, options.kl_weight, options.mse_weight)
        self.phases: Phases = Phases(model, options.relaxation, options.warmup_fraction, options.soft_fraction)
        self._goal: Goal | None = None
        if budget is None:
            # A shape that is illegal or has no gates fails here, before any training.
            plan = model.plan(shape, keep_ratio=keep_ratio)
            self._goal = Goal(model, plan.shape, plan.roundings)
        self.budget, self.effort, self.table = budget, effort or Effort(), table
        self.hidden_sizes, self.refit = hidden_sizes, refit
        self._terms: dict[str, list[torch.Tensor]] = {}
        self.gated: Any = model  # `self.model`, typed for what PEFT passes on to the tuner
        self.history = GateHistory(model)
        self.layout = locate(dense_model(model))
        self.search: SearchResult | None = None
        self.comparison: Comparison | None = None
        self._start: StartingPoint | None = None
        super().__init__(model, options, **kwargs)
        count = 0 if options.keep_better == "never" else -(-options.calibration_examples // 4)
        self.train_dataset, self.set_aside = set_aside(self.train_dataset, count)
        applied = self.gated.applied_plan()
        if applied is not None and (self._goal is None or applied.shape != self._goal.shape):
            logger.warning("the applied plan has another shape than the goal; it is opened: %s", applied)
            self.gated.apply_plan(None)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch: divide by their number
        self.add_callback(_Phases(self))

    # ------------------------------------------------------------------ loss

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
            for name, (weight, term) in self._penalties().items():
                terms[name] = term
                loss = loss + weight * term.to(loss)
        if model.training:
            for name, term in terms.items():
                self._terms.setdefault(name, []).append(term.detach())
        return (loss, {"logits": student}) if return_outputs else loss

    def _penalties(self) -> dict[str, tuple[float, torch.Tensor]]:
        """The penalties that apply: name to weight and value."""
        found: dict[str, tuple[float, torch.Tensor]] = {}
        gates = [gate for axis in axes_of(self.gated).values() for gate in axis]
        if self.phases.relaxation.draws_to_size and self._progress() > 0 and (weight := self.args.size_weight):
            found["size"] = (weight, self.goal.penalty(self._progress()))
        if weight := self.args.bimodality_weight:
            found["bimodality"] = (weight, bimodality_penalty([gate.open_probability() for gate in gates]))
        if weight := self.args.floor_weight:
            layers = [gate.open_probability() for gate in gates if gate.units > 1]
            found["floor"] = (weight, floor_penalty(layers, self.args.keep_floor))
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in `Trainer`; the gates get a learning rate of their own, and no weight decay, if one is given."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.args.gate_learning_rate is not None:
            thetas = [gate.theta for gate in collect_gates(self.gated).values() if gate.theta.requires_grad]
            known = {id(theta) for theta in thetas}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            optimizer.add_param_group({"params": thetas, "lr": self.args.gate_learning_rate, "weight_decay": 0.0})
        return optimizer

    # ---------------------------------------------------------------- phases

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
    def target(self) -> Shape:
        """The shape that the gates would get now; after the decision, the one they got."""
        applied = self.gated.applied_plan()
        return self.goal.shape if applied is None else applied.shape

    @property
    def decided(self) -> bool:
        """Whether the plan has been made and applied."""
        return self.phases.decided

    def decide(self) -> None:
        """Make the plan from the gates as they are, and apply it in training as well."""
        self.phases.relax(None)
        plan = dataclasses.replace(self.phases.plan(self.goal.shape), roundings=tuple(self.goal.roundings))
        self.gated.apply_plan(plan, in_training=True)
        logger.info("step %d: %s", self.state.global_step, plan)

    def _progress(self) -> float:
        return self.phases.progress(self.state.global_step, self.state.max_steps)

    # ----------------------------------------------------------------- start

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, after the start: the shape for a budget, and gates in the order of their importance."""
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.phases.relax(None)

    def _prepare(self) -> None:
        """Find the shape for a budget, and start gates that nobody has started."""
        self._start, self.comparison = None, None
        start = are_fresh(self.gated) and self.args.calibration_examples > 0 and not self.decided
        batches = self._calibration() if start or self._goal is None else []
        if batches:
            ensure_basis(self.gated, batches)
        importance, plan = None, None
        if self._goal is None:
            self._goal, importance, plan = self._goal_of_budget(cast(LatencyBudget, self.budget), batches)
        if start:
            shape = self.goal.shape if plan is None else None
            init_gates(self.gated, batches, shape=shape, plan=plan, importance=importance)

    def _goal_of_budget(
        self, budget: LatencyBudget, batches: Sequence[Batch]
    ) -> tuple[Goal, Mapping[str, torch.Tensor] | None, Plan | None]:
        """The goal, and what a search for it has learnt: the importance of fresh gates, and its plan."""
        progress = None if self.args.disable_tqdm else partial(tqdm, disable=None)

        def find_shape() -> tuple[Mapping[str, torch.Tensor] | None, SearchResult]:
            found, importance = search_plan(
                self.gated,
                budget,
                batches,
                table=self.table,
                hidden_sizes=self.hidden_sizes,
                refit=self.refit,
                effort=self.effort,
                progress=progress,
            )
            return importance, found

        importance, self.search = in_main_process(find_shape)
        return Goal(self.gated, self.search.best.shape), importance, self.search.plan

    def _calibration(self) -> list[Batch]:
        """
        The first examples of the training data, in batches; the random state is left as it was.

        Raises:
            HawAdaError: if there are none.
        """
        batches: list[Batch] = []
        count = 0
        with torch.random.fork_rng(devices=[]):  # data is drawn on the CPU
            torch.default_generator.manual_seed(self.args.seed)
            for batch in self.get_train_dataloader():
                batches.append(batch)
                count += len(main_input(self.gated.get_base_model(), batch))
                if count >= max(1, self.args.calibration_examples):
                    break
        if not batches:
            raise HawAdaError(
                "the training data gives no batch to start the gates by: give more examples than "
                f"per_device_train_batch_size={self.args.per_device_train_batch_size}, or switch dataloader_drop_last "
                "off"
            )
        return batches

    # ---------------------------------------------------------- never worse

    def _begin(self) -> None:
        """Keep what is trained as it is, before the first step: after all processes have the first one's gates."""
        if self._start is None and self.set_aside is not None:
            plan = self.gated.applied_plan() or self.phases.plan(self.goal.shape)
            self._start = StartingPoint.of(self.gated, plan)

    def _keep_better(self) -> None:
        """Compare what was trained with what it was before, and go on with the better."""
        if self._start is None or self.set_aside is None:
            return
        start, keep, held_out = self._start, self.args.keep_better, self._held_out()
        calibration = [] if keep == "sliced" else self._calibration()
        self.comparison = in_main_process(lambda: compare(self.gated, start, held_out, calibration, keep))
        logger.info("%s", self.comparison)
        if self.comparison.kept == "start":
            start.put_into(self.gated)
            self._note()

    def _data_sets(self) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
        yield from super()._data_sets()
        if self.set_aside is not None:
            yield "train_dataset", self.set_aside, partial(self.get_eval_dataloader, cast(Any, self.set_aside))

    def _held_out(self) -> list[Batch]:
        """What was set aside, in batches; the random state is left as it was."""
        with torch.random.fork_rng(devices=[]):  # data is drawn on the CPU
            torch.default_generator.manual_seed(self.args.seed)
            return list(self.get_eval_dataloader(cast(Any, self.set_aside)))

    # ------------------------------------------------------ logs, evaluation

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss, averaged since the last time, and the keep ratios with it."""
        if "loss" in logs and self._terms:
            means = {name: torch.stack(terms).float().mean() for name, terms in self._terms.items()}
            logs |= {name: self.accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            self._terms.clear()
            logs |= self._keep_ratios()
            self._note(logs)
        super().log(logs, *args, **kwargs)

    def _note(self, figures: Mapping[str, float] | None = None) -> None:
        """The gates as they are, into the history."""
        step = self.state.global_step
        soft = self.phases.progress(step - 1, self.state.max_steps) > 0
        phase = "hard" if self.decided else "soft" if soft else "warm-up"
        plan = self.gated.applied_plan() or self.phases.approached
        self.history.record(step, phase, plan, figures or {})

    def _write_history(self) -> None:
        comparison = None if self.comparison is None else self.comparison.to_dict()
        search = None if self.search is None else self.search.figures()
        self.history.write(Path(str(self.args.output_dir)), {"search": search, "comparison": comparison})

    @torch.no_grad()
    def _keep_ratios(self) -> dict[str, float]:
        """Per axis what stays of it: by the plan that is applied or approached; without one what is expected."""
        names = {axis.field: axis.name for axis in SIZES}
        ratios = {}
        plan = self.gated.applied_plan() or self.phases.approached
        for axis, probabilities in open_probabilities(self.gated, self.layout).items():
            if plan is None:
                ratio = torch.cat([each.flatten().cpu() for each in probabilities]).mean().item()
            else:
                kept, dense = plan.shape.to_dict(), plan.dense.to_dict()
                ratio = kept[axis] / dense[axis] if axis in kept else 1.0
            ratios[f"keep_{names[axis]}"] = ratio
        return ratios

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; before the decision under the plan that the gates would get now."""
        with nullcontext() if self._goal is None else self.phases.planned(self._goal):
            return super().evaluation_loop(*args, **kwargs)

    # ----------------------------------------------------------- checkpoints

    def _save_state(self, folder: Path) -> None:
        state = {
            "goal": self.goal.state_dict(),
            "phases": self.phases.state_dict(),
            "history": self.history.entries,
            "search": None if self.search is None else self.search.to_dict(),
        }
        write_text(folder / STATE_FILE, json.dumps(state))
        if self._start is not None:
            self._start.save(folder)

    def _load_state(self, folder: Path) -> None:
        path, state = folder / STATE_FILE, self._read_state(folder)
        try:
            self._restore_state(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def _restore_state(self, state: Mapping[str, Any]) -> None:
        self._goal = self._goal or Goal(self.gated, Shape.from_dict(state["goal"]["shape"]))
        self._goal.load_state_dict(state["goal"])
        self.phases.load_state_dict(state["phases"])
        self.history.entries = state.get("history", [])
        self.search = None if state.get("search") is None else SearchResult.from_dict(state["search"])

    def _read_state(self, folder: Path) -> dict[str, Any]:
        path = folder / STATE_FILE
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the checkpoint is not one of this trainer, or not complete")
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        known = isinstance(state, dict) and all(isinstance(state.get(name), dict) for name in ("goal", "phases"))
        if not known or not all(isinstance(entry, dict) for entry in _entries(state.get("history", []))):
            raise CheckpointError(f"{path} holds no 'goal', 'phases' and 'history': it is not of this trainer")
        return state

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A model with soft gates is none that can be exported: it does not compete."""
        return self.decided and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_plan(Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._read_state(folder)  # before anything is loaded
        self._start = None if self.set_aside is None else StartingPoint.load(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_plan(folder)
        self._load_state(folder)

    def _load_plan(self, checkpoint: Path) -> None:
        """PEFT loads the weights of an adapter that exists already, but not its config, where the plan is."""
        (name,) = self.gated.active_adapters
        config = PeftConfig.from_pretrained(str(adapter_folder(checkpoint, name)))
        plan = None if config.plan is None else Plan.from_dict(config.plan)
        self.gated.apply_plan(plan, in_training=config.plan_in_training)


def _entries(history: Any) -> Any:
    return history if isinstance(history, list) else [None]


def _model_problems(model: Any) -> list[str]:
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, BaseTuner) or tuner.tuner_layer_cls is not GateAdapter:
        return [f"model must be made by get_peft_model(base, HawAdaConfig(...)), got {type(model).__name__}"]
    if len(model.active_adapters) != 1:
        return [f"one adapter must be active, got {model.active_adapters}; see `model.set_adapter`"]
    (name,) = model.active_adapters
    if any(gate.theta.requires_grad for gate in collect_gates(model, name).values()):
        return []
    return [
        f"no gate of adapter {name!r} requires gradients: nothing would be trained. The adapter was loaded for "
        "inference: PeftModel.from_pretrained(..., is_trainable=True); or its config says inference_mode=True; or its "
        "gates were frozen"
    ]


class _Phases(TrainerCallback):
    """Tells the trainer where it is."""

    def __init__(self, trainer: HawAdaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The gates as they are before the first step."""
        self.trainer._begin()
        if not self.trainer.history.entries:
            self.trainer._note()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The phase of the step."""
        if self.trainer.phases.begin_step(self.trainer.goal, state.global_step, state.max_steps):
            self.trainer.decide()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The goal's state, into the checkpoint."""
        if state.is_world_process_zero:
            self.trainer._save_state(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            self.trainer._write_history()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide if the whole training was soft, and what is kept; the gates as they are in the end."""
        if not self.trainer.decided:
            self.trainer.decide()
        self.trainer._keep_better()
        if not self.trainer.history.entries or self.trainer.history.entries[-1]["step"] < state.global_step:
            self.trainer._note()
        if state.is_world_process_zero:
            self.trainer._write_history()
