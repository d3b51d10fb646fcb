"""
The race on real models: each run is a short recovery by the trainer of slim models.

Long because everything that a run needs of real models stands in one place.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ..basis.bases import Bases, plan_turn
from ..basis.basis import is_tied
from ..basis.find import find_basis
from ..basis.heads.find import find_in_heads
from ..basis.heads.projections import queries_of
from ..basis.proof import check_exact
from ..basis.rotation import warn_untied
from ..errors import HawAdaError, UnsupportedModelError
from ..planning.plan import Plan
from ..processes import in_main_process, of_this_rank
from ..race.candidates import DIRECTIONS, GENERATORS, GIVEN, TOGETHER, field_of, neighbours, searched
from ..race.fits import Fits, fits_of, no_larger, sizes_of
from ..race.judge import Judge
from ..race.preparations import PREPARATIONS
from ..race.race import Race, entrants_of, run_race
from ..race.record import NAME, Entrant, RaceRecord
from ..refit.fidelity import divergence
from ..search.reference import judged_predictions
from ..search.timed import check_regime, regime_of
from ..surgery.slimming import slim
from ..vanilla.batches import Batch
from ..vanilla.family import Layout, among, locate, locate_all, locate_every, together

logger = logging.getLogger(__name__)

FOLDER = "race"
"""In the output folder of the recovery."""

WARMUP = 10
"""A run warms up over this part of its steps."""

JUDGED = 16384
"""Predictions that plans are judged by before any training, at least, if there are so many."""

PARTS = 4
"""A batch of the race is this part of the recovery's, unless the race says otherwise."""

Train = Callable[[PreTrainedModel, TrainingArguments], PreTrainedModel]
"""Recovers a slim model by training arguments, in place, and returns it."""


@dataclass
class RacedRecovery:
    """
    A race before a recovery, and the model that it is won with.

    Args:
        race (`Race`): how plans race.
        dense (`PreTrainedModel`): the teacher.
        args (`TrainingArguments`): of the recovery that comes after the race.
        train: a recovery.
        calibration: batches, keyword arguments of the forward pass: what plans are judged, prepared and compared on.
        given (`Plan`, *optional*): a plan that enters.
        start (`PreTrainedModel`, *optional*): its slim model, if that is not what `slim(dense, given)` gives.
        optimizer (`str`): what `train` trains with; a race that goes on has to have the same.
        gated (`Bases`, *optional*): of the residual stream and inside of heads, if the plan that is given may keep
            directions of them.

    Raises:
        HawAdaError: if the race would leave nothing of the recovery, or there is too little calibration data.
    """

    race: Race
    dense: PreTrainedModel
    args: TrainingArguments
    train: Train
    calibration: Iterable[Batch]
    given: Plan | None = None
    start: PreTrainedModel | None = None
    optimizer: str = "auto"
    gated: Bases | None = None
    fitted: list[Batch] = field(init=False)
    held_out: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.args.output_dir or "tmp_trainer") / FOLDER
        self.dense.to(self.args.device)  # type: ignore[arg-type]
        batches = [
            {name: value.to(self.args.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            for batch in self.calibration
        ]
        self.fitted, self.held_out = parts_of(batches, self.race.held_out, self.dense.main_input_name)
        self.rows, self.share = rows_of(self.race, self.args)

    @property
    def judged(self) -> list[Batch]:
        """What plans are judged by before any training; fewer on a CPU, as some hundred plans are."""
        most = judged_predictions(self.dense) if self.args.device.type == "cpu" else JUDGED
        return first_of(self.fitted, self.dense.main_input_name, most)

    @cached_property
    def layout(self) -> Layout:
        """The dense model's."""
        return locate(self.dense)

    @cached_property
    def bases(self) -> Bases:
        """The gates', or the first process's; none of what cannot be cut along directions."""
        given = self.gated or Bases()
        stream, heads = given.stream, given.heads
        batches = first_of(self.fitted, self.dense.main_input_name)
        try:
            if stream is None and self.race.rotate:
                if len(locate_all(self.dense)) > 1:
                    raise UnsupportedModelError("a basis is of one stream, and plans of several towers race")
                check_exact(self.layout)
                stream = in_main_process(lambda: find_basis(self.dense, batches))
        except HawAdaError as error:
            logger.info("no plan cuts the residual stream along directions: %s", error)
        try:
            if heads is None and self.race.rotate and self.race.search is not None:  # plans of other sources cut none
                queries_of(self.layout)
                heads = in_main_process(lambda: find_in_heads(self.dense, batches))
        except HawAdaError as error:
            logger.info("no plan cuts inside of heads: %s", error)
        return Bases(stream, heads)

    def run(self) -> tuple[RaceRecord, PreTrainedModel]:
        """The race, from where it stopped, and the winner's model, ready for the rest of the recovery."""
        state = PartialState()
        self.bases  # noqa: B018  # every process takes part
        settings = self.race.settings() | {
            "seed": self.args.seed,
            "batch_size": self.rows * self.args.world_size,  # of all processes: another number of them may go on
            "recovery_steps": self.args.max_steps,
            "optimizer": self.optimizer,
            "recovery_batch_size": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "race_learning_rate": self.race.learning_rate or self.args.learning_rate,
            "given": None if self.given is None else hashlib.sha256(self.given.to_json().encode()).hexdigest(),
        }
        record = in_main_process(lambda: self._record(settings))
        if not state.is_main_process:
            record.path = None
        winner = run_race(record, self._trial, retire=self._retire)
        state.wait_for_everyone()
        last = max((run.rung for run in record.runs if run.entrant == winner.key), default=-1)
        turn = plan_turn(self.dense, winner.plan, self.bases)
        if turn is not None and turn.write is not None and is_tied(self.dense) and not turn.tied:
            warn_untied(self.dense, turn.write.shape[1])
        return record, self._after(winner, last)

    def clean(self) -> None:
        """Remove the weights of the race, once the recovery is over."""
        if PartialState().is_main_process:
            for file in self.folder.glob("*.safetensors"):
                file.unlink()

    def steps_left(self, record: RaceRecord) -> int:
        """
        What the race left of the recovery's steps; -1, as the recovery has it, if it is bounded by epochs.

        Raises:
            HawAdaError: if that is nothing.
        """
        if self.args.max_steps <= 0:
            return -1
        left = self.args.max_steps - math.ceil(record.cost)
        if left < 1:
            raise HawAdaError(
                f"the race costs {record.cost:.0f} of max_steps={self.args.max_steps} and leaves nothing for the "
                "recovery: give it a smaller `share`, fewer `steps` or `plans`, or the recovery more steps"
            )
        return left

    def _record(self, settings: Mapping[str, Any]) -> RaceRecord:
        """The record at hand, or a new one with the entrants of the first rung."""
        path = self.folder / NAME
        record = RaceRecord.read(path, settings)
        if record is not None:
            logger.info("the race goes on after %d runs", len(record.runs))
            return record
        started = time.perf_counter()
        race, judge = self.race, Judge(self.dense, self.judged, self.bases, bf16=bool(self.args.bf16))
        fits = self._fits()
        generators, of_all = dict(GENERATORS), dict(TOGETHER)
        if not race.rotate:
            del generators[DIRECTIONS]
        if race.search is not None:
            of_all["search"] = searched(race.search)
        given = () if self.given is None else (self.given,)
        field = field_of(judge, fits, generators, together=of_all, given=given, most=race.plans, few=race.few)
        beside = neighbours(judge, fits) if race.neighbours else []
        total = self._total_steps() * race.share / self.share
        plans, others, neighbouring, lengths = race.affordable(len(field), len(beside), total)
        entrants = entrants_of(field[:plans], race, beside)
        timed = fits.time is not None
        record = RaceRecord(
            settings=dict(settings),
            entrants=entrants,
            preparations=list(race.preparations[: 1 + others]),
            lengths=lengths,
            dense_ms=fits.dense_ms if timed else None,
            limit_ms=fits.limit_ms if timed else None,
            share=self.share,
            latencies=dict(fits.measured),
            beside=neighbouring > 0,
            seconds=round(time.perf_counter() - started, 3),
            path=path,
        )
        record.write()
        if plans + others == 1:
            logger.info("%s: there are too few steps, or too few plans, for a race", entrants[0].name)
        else:
            logger.info(
                "%d plans race, and %d preparations of the best: rungs of %s steps of %d examples; that costs about "
                "%.0f steps of the recovery. Found in %.0f s: %s",
                *(plans, others, lengths, self.rows, race.share * self._total_steps()),
                *(record.seconds, "; ".join(each.name for each in entrants)),
            )
        return record

    def _fits(self) -> Fits:
        race = self.race
        if race.budget is not None:
            fits = fits_of(self.dense, race.budget, tolerance=race.tolerance, effort=race.effort)
            fits.measured |= race.latencies or {}
            return fits
        if self.given is None:
            raise HawAdaError("a race needs a budget, or a plan that sets the number of parameters")
        return no_larger(self.dense, sizes_of(locate_all(self.dense), self.given))

    def _total_steps(self) -> int:
        """Of the recovery; where it is bounded by epochs those are not known here, and a usual number is taken."""
        return self.args.max_steps if self.args.max_steps > 0 else 1000

    def _trial(self, entrant: Entrant, rung: int, steps: int) -> float:
        """Train an entrant's model for a rung; its divergence from the dense model on the held-out batches."""
        try:
            model = self._after(entrant, rung - 1)
        except UnsupportedModelError as error:
            logger.info("%s does not run: %s", entrant.name, error)
            return math.nan
        trained = self.train(model, self._arguments(rung, steps))
        loss = [divergence(self.dense, trained, self.held_out, of_this_rank)[1]]
        if self.race.onward == "continued" and not entrant.neighbour:
            self._keep(entrant, rung, trained)
        del model, trained
        if self.args.device.type != "cpu":
            clear_device_cache(garbage_collection=True)
        return float(broadcast_object_list(loss)[0])

    def _arguments(self, rung: int, steps: int) -> TrainingArguments:
        """Those of the recovery, with a complete cosine of its own, writing and reporting nothing."""
        args = copy.copy(self.args)
        args.max_steps = steps
        args.lr_scheduler_type, args.lr_scheduler_kwargs = SchedulerType.COSINE, {}
        args.warmup_steps = steps // WARMUP
        args.learning_rate = self.race.learning_rate or self.args.learning_rate
        args.per_device_train_batch_size = min(self.rows, self.args.per_device_train_batch_size)
        args.gradient_accumulation_steps = self.rows // args.per_device_train_batch_size
        args.seed = args.data_seed = self.args.seed + 1 + rung  # each rung has other batches than the recovery
        args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
        args.save_strategy = SaveStrategy.NO
        args.eval_on_start = args.load_best_model_at_end = args.push_to_hub = False
        args.logging_first_step, args.report_to, args.disable_tqdm = False, [], True
        return args

    def _built(self, entrant: Entrant) -> PreTrainedModel:
        """The slim model of an entrant, as it was cut."""
        if self.start is not None and entrant.source == GIVEN:
            return copy.deepcopy(self.start).to(self.args.device)  # type: ignore[arg-type]
        turn = plan_turn(self.dense, entrant.plan, self.bases)
        return slim(self.dense, entrant.plan, turn=turn, layout=self.layout)

    def _prepared(self, entrant: Entrant) -> PreTrainedModel:
        model, turn = self._built(entrant), plan_turn(self.dense, entrant.plan, self.bases)
        coordinates = None if turn is None else turn.write
        try:
            PREPARATIONS[entrant.preparation](self.dense, model, entrant.plan, self.fitted, coordinates)
        except UnsupportedModelError as error:
            if entrant.preparation != self.race.preparations[0]:
                raise
            logger.info("%s runs as it was cut: %s", entrant.name, error)
        return model

    def _after(self, entrant: Entrant, rung: int) -> PreTrainedModel:
        """The model of an entrant as a rung left it; as it was prepared, before the first rung or to start anew."""
        if rung < 0 or self.race.onward == "anew":
            return self._prepared(entrant)
        model = self._built(entrant)
        load_model(model, self._kept(entrant.key, rung))
        return model

    def _kept(self, key: str, rung: int) -> Path:
        return self.folder / f"{key}-{rung}.safetensors"

    def _keep(self, entrant: Entrant, rung: int, model: PreTrainedModel) -> None:
        """Write an entrant's weights, whole or not at all."""
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = self.folder / f"{entrant.key}.{os.getpid()}"
            save_model(model, str(beside))
            beside.replace(self._kept(entrant.key, rung))
        PartialState().wait_for_everyone()

    def _retire(self, needed: Sequence[tuple[str, int]]) -> None:
        """Remove the weights that nobody needs any more."""
        if PartialState().is_main_process:
            names = {self._kept(*each).name for each in needed}
            for file in self.folder.glob("*.safetensors"):
                if file.name not in names:
                    file.unlink()
        PartialState().wait_for_everyone()


def racing_towers(base: PreTrainedModel, race: Race, plan: Plan | None) -> Sequence[Layout]:
    """
    The towers that plans of a race may cut: those that a plan speaks of, else those with gates, of a model without
    gates all. Where latency is limited, of these what runs in the calls that are timed, and what the plan cuts.
    """
    if plan is None:
        every = together(locate_every(base))
    else:
        every = together([locate(base, part.tower or None) for part in plan.parts])
    if len(every) == 1 or race.budget is None or not math.isfinite(race.budget.limit_ms(1.0)):
        return every
    with among(base, every):
        running = {layout.tower for layout in check_regime(base, regime_of(base, race.budget))}
    if plan is not None:
        running |= {part.tower for part in plan.cut_parts}
    logger.info("plans of %s race", sorted(running))
    return together([layout for layout in every if layout.tower in running])


def rows_of(race: Race, args: TrainingArguments) -> tuple[int, float]:
    """The examples per device of a step of the race, and the part of the recovery's step that they are."""
    whole = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = min(race.batch_size or max(1, whole // PARTS), whole)
    if rows > args.per_device_train_batch_size:
        rows -= rows % args.per_device_train_batch_size
    return rows, rows / whole


def first_of(batches: Sequence[Batch], main_input: str, most: int = JUDGED) -> list[Batch]:
    """The first batches that hold enough predictions: one for each token, or for each example of another kind."""
    chosen: list[Batch] = []
    found = 0
    for batch in batches:
        if found >= most:
            break
        main: Tensor = batch[main_input]
        found += main.numel() if main.ndim == 2 else len(main)
        chosen.append(batch)
    return chosen


def parts_of(batches: Sequence[Batch], held_out: float, main_input: str) -> tuple[list[Batch], list[Batch]]:
    """
    Calibration batches without labels, and those of them that a race is decided on: every so many, or, of a single
    batch, its last rows.

    Raises:
        HawAdaError: if there are less than two rows.
    """
    plain: list[Batch] = [{name: value for name, value in each.items() if name != "labels"} for each in batches]
    if len(plain) == 1:
        total = len(plain[0][main_input])
        cut = total - max(1, round(held_out * total))
        parts: list[Batch] = [
            {
                name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value
                for name, value in plain[0].items()
            }
            for rows in (slice(cut), slice(cut, total))
        ]
        plain = parts if cut else []
    period = max(2, round(1 / held_out))
    held = [batch for index, batch in enumerate(plain) if index % period == period - 1] or plain[-1:]
    fitted = [batch for batch in plain if all(batch is not other for other in held)]
    if not fitted or not held:
        raise HawAdaError("a race needs two rows of calibration data at least: some to judge by, some to decide by")
    return fitted, held
