"""
The trainer of gates: from a budget or a shape to gates that are no worse than untrained ones.

Long because its start, its end and its checkpoints are those of one class of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from tqdm import tqdm
from transformers import TrainingArguments

from ..basis.find import ensure_basis
from ..distil.sharded import same_everywhere
from ..errors import HawAdaError
from ..files.kept import clear_kept
from ..gates.adapter import GateAdapter
from ..gates.attach import collect_gates
from ..gates.reading import are_fresh
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..planning.plan import Plan
from ..planning.towers import Ratio, Sizes
from ..processes import all_reduced, in_main_process
from ..progress import Progress
from ..search.budgeted import Tables, search_plan
from ..search.directions import Found, with_directions
from ..search.result import SearchResult
from ..vanilla.batches import Batch, main_input
from .arguments import GateTrainingArguments
from .comparison import Comparison, StartingPoint, compare, set_aside
from .goal import Goal
from .phased import PhasedTrainer
from .start import init_gates

logger = logging.getLogger(__name__)

SEARCH = "search"
"""In the output folder: what a search for a budget has found, until the training has ended."""


class HawAdaTrainer(PhasedTrainer):
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
        shape (`Shape` or `dict`, *optional*): the sizes of the slim model, as in `HawAdaModel.plan`. One of `shape`,
            `keep_ratio` and `budget` is given.
        keep_ratio (`float` or `dict`, *optional*): instead of a shape, as in `HawAdaModel.plan`.
        budget (`LatencyBudget`, *optional*): instead of a shape.
        effort (`Effort`, *optional*): how hard latency is measured and the shape for a budget searched.
        table (`LatencyTable` or `dict`, *optional*): measured here before, of several towers one for each by its name;
            measured or taken from the disk cache if left out.
        hidden_sizes (*optional*): as in `find_plan`.
        rotate (*optional*): as in `find_plan`.
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

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments | None = None,
        *,
        shape: Sizes | None = None,
        keep_ratio: Ratio | None = None,
        budget: LatencyBudget | None = None,
        effort: Effort | None = None,
        table: Tables | None = None,
        hidden_sizes: Sequence[int] | None = None,
        rotate: bool | None = None,
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
        goal: Goal | None = None
        if budget is None:
            # A shape that is illegal or has no gates fails here, before any training.
            plan = cast(Any, model).plan(shape, keep_ratio=keep_ratio)
            goal = Goal(model, plan.target, plan.all_roundings)
        self.budget, self.effort, self.table = budget, effort or Effort(), table
        self.hidden_sizes, self.rotate, self.refit = hidden_sizes, rotate, refit
        self.search: SearchResult | None = None
        self.comparison: Comparison | None = None
        self._start: StartingPoint | None = None
        super().__init__(model, options, goal, **kwargs)
        count = 0 if options.keep_better == "never" else -(-options.calibration_examples // 4)
        self.train_dataset, self.set_aside = set_aside(self.train_dataset, count)

    # ----------------------------------------------------------------- start

    def _prepare(self) -> None:
        """Find the shape for a budget, and start gates that nobody has started."""
        self._start, self.comparison = None, None
        if not self.is_fsdp_enabled:
            self._start_gates()
        elif self._goal is None:
            raise HawAdaError(
                "a budget becomes a shape by measuring on one device: find the plan with `find_plan` in a process of "
                "its own, and pass shape=plan.shape to the sharded training"
            )

    def _start_gates(self) -> None:
        start = are_fresh(self.gated) and self.args.calibration_examples > 0 and not self.decided
        searching = self._goal is None
        batches = self._calibration(together=not searching) if start or searching else []
        if batches:
            ensure_basis(self.gated, batches)
        importance, plan = None, None
        if self._goal is None:
            self._goal, importance, plan = self._goal_of_budget(cast(LatencyBudget, self.budget), batches)
        if start:
            shape = self.goal.target if plan is None else None
            init_gates(
                self.gated,
                batches,
                shape=shape,
                plan=plan,
                importance=importance,
                reduce=all_reduced,
                progress=self._bars(),
            )

    def _bars(self) -> Progress | None:
        """What makes progress bars before the first step: in one process, on a terminal."""
        return partial(tqdm, disable=None) if self.is_world_process_zero() and not self.args.disable_tqdm else None

    def _goal_of_budget(
        self, budget: LatencyBudget, batches: Sequence[Batch]
    ) -> tuple[Goal, Mapping[str, torch.Tensor] | None, Plan | None]:
        """The goal, and what a search for it has learnt: the importance of fresh gates, and its plan."""
        progress = self._bars()

        def find_shape() -> Found:
            return search_plan(
                self.gated,
                budget,
                batches,
                table=self.table,
                hidden_sizes=self.hidden_sizes,
                rotate=False,
                refit=self.refit,
                effort=self.effort,
                progress=progress,
                work=Path(str(self.args.output_dir)) / SEARCH,
            )

        search = partial(in_main_process, find_shape)  # gates come and go in every process
        self.search, importance = with_directions(self.gated, batches, self.rotate, search, progress=progress)
        return Goal(self.gated, self.search.plan.target), importance, self.search.plan

    def _calibration(self, *, together: bool = False) -> list[Batch]:
        """
        The first examples of the training data, in batches; the random state is left as it was.

        Args:
            together: this process's share of them; as many for each process if left out.

        Raises:
            HawAdaError: if there are none.
        """
        batches: list[Batch] = []
        count = 0
        wanted = max(1, -(-self.args.calibration_examples // (self.args.world_size if together else 1)))
        with torch.random.fork_rng(devices=[]):  # data is drawn on the CPU
            torch.default_generator.manual_seed(self.args.seed)
            for batch in self.get_train_dataloader():
                batches.append(batch)
                count += len(main_input(self.gated.get_base_model(), batch))
                if count >= wanted:
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
        if self.is_fsdp_enabled and not self.state.global_step:
            self._start_gates()
            same_everywhere(self._whole)
        if self._start is None and self.set_aside is not None:
            plan = self.gated.applied_plan() or self.phases.plan(self.goal.target)
            self._start = StartingPoint.of(self.gated, plan)

    def _end(self) -> None:
        """Compare what was trained with what it was before, and go on with the better."""
        if self.is_world_process_zero():
            clear_kept(Path(str(self.args.output_dir)) / SEARCH)
        if self._start is None or self.set_aside is None:
            return
        start, keep, held_out = self._start, self.args.keep_better, self._held_out()
        if self.is_fsdp_enabled:  # every process takes part in a pass of the model, which cannot be sliced here
            self.comparison = compare(self.gated, start, held_out, [], "sliced", reduce=all_reduced)
        else:
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

    # ----------------------------------------------------------- checkpoints

    def _facts(self) -> dict[str, Any]:
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return {"search": None if self.search is None else self.search.figures(), "comparison": comparison}

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"search": None if self.search is None else self.search.to_dict()}

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        if self._start is not None:
            self._start.save(folder)

    def _read_state(self, folder: Path) -> dict[str, Any]:
        state = super()._read_state(folder)
        self._start = None if self.set_aside is None else StartingPoint.load(folder)
        return state

    def _restore_state(self, state: Mapping[str, Any]) -> None:
        super()._restore_state(state)
        self.search = None if state.get("search") is None else SearchResult.from_dict(state["search"])


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
