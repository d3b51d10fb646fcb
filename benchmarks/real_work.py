"""What is done for a cell of the bench on a real model: a peer cut and recovered, or our race and its recovery."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from document import circumstances
from peers.peer import Prepared, Work
from peers.registry import PEERS
from peft import PeftModel, get_peft_model
from real_cells import MUON, OURS, Cell
from real_setups import Setup
from rows import Row, append_row, read_rows
from sizing import SHORT, Fit, Stopwatch, Timed
from timings import Timings, Untimed
from transformers import PreTrainedModel
from turns import Turns
from work import Batch, Bench, whole

from hawada_peft import HawAdaConfig, Plan, Race, Shape, find_plan, recover, slim
from hawada_peft.basis.bases import Bases, gated_bases, plan_turn
from hawada_peft.basis.basis import Basis
from hawada_peft.basis.find import find_basis
from hawada_peft.basis.proof import check_exact
from hawada_peft.distil.raced import first_of, parts_of
from hawada_peft.errors import HawAdaError
from hawada_peft.race import PREPARATIONS, Fits, Judge, field_of
from hawada_peft.race.candidates import neighbours
from hawada_peft.search.timed_models import realiser
from hawada_peft.vanilla.family import locate

PACE, FIXED = 0.15, 30.0
"""Seconds of a step of recovery, and of what else a cell needs, until one was made."""


class Blind(Judge):
    """Takes all plans for equal: for asking the sources of plans which shapes they would have timed."""

    def loss(self, plan: Plan) -> float:
        """Of no plan known."""
        return 0.0


@dataclass(frozen=True)
class Cut:
    """A peer's model at a budget, and its quality before any recovery."""

    model: PreTrainedModel
    fit: Fit
    timed: Timed
    before: Mapping[str, float]
    steps: int


class Ground:
    """
    The work at hand: the teacher with its data, the clock, and what is known of latencies.

    Args:
        teacher, data: folders.
        setup: of all cells.
        timings: rows of timed models are added to this file.
        turns: of the device.
        earlier: files of rows and of timed models from before.
    """

    def __init__(
        self,
        teacher: str,
        data: Path,
        setup: Setup,
        timings: Path,
        turns: Turns,
        earlier: Sequence[Path] = (),
    ) -> None:
        self.setup, self.turns, self.regime = setup, turns, setup.conditions
        turns.finish = torch.cuda.synchronize if setup.device.startswith("cuda") else turns.finish
        with turns.together():
            self.bench = Bench(
                teacher,
                str(data / setup.train),
                str(data / setup.evaluation),
                device=setup.device,
                length=setup.length,
                eval_length=setup.eval_length,
                batch_size=setup.batch_size,
                eval_examples=setup.eval_examples,
            )
            dense = self.bench.load().to(device=self.regime.device, dtype=self.regime.torch_dtype)
        self.about: Row = {"device": circumstances(self.regime.device)["device"], "regime": str(self.regime)}
        watch = Stopwatch(dense, self.regime, setup.effort)
        clock = Turns() if setup.on_cpu else turns  # processor time of one thread is measured while others work
        self.timings = Timings(watch, timings, self.about, clock, earlier)
        rows = (row for file in (*earlier, timings) for row in read_rows(file))  # rows that are kept lack "timed"
        self.amounts = [row for row in rows if "amount" in row and "timed" in row]
        self.pace, self.fixed = PACE, FIXED
        self._bases: dict[int, Basis | None] = {}
        self._prepared: tuple[tuple[str, int], Prepared] | None = None
        self._cut: tuple[tuple[str, float, int], Cut] | None = None

    def expected(self, cell: Cell) -> float:
        """Seconds that a cell will take, by those before it."""
        return self.fixed + cell.steps * self.pace

    def row(self, cell: Cell | None) -> Row:
        """What a cell gives; without one the dense model."""
        if cell is None:
            with self.turns.together():
                quality = self.bench.quality(self.bench.model)
            return {"before": quality, "after": quality, "parameters": self.bench.model.num_parameters()}
        row = self.ours(cell) if cell.contestant in OURS else self.peer(cell)
        return row | self.about

    def peer(self, cell: Cell) -> Row:
        """A peer, cut to the budget and recovered; one that does not meet it is not recovered."""
        cut = self._cut_of(cell)
        row: Row = {
            "before": cut.before,
            "speedup": cut.timed.speedup,
            "met": cut.fit.met,
            "amount": cut.fit.amount,
            "timed": asdict(cut.timed),
            "timings": cut.fit.timings,
            "own_steps": cut.steps,
            "parameters": cut.model.num_parameters(),
            "optimizer": "muon" if cell.contestant.endswith(MUON) else "adamw",
        }
        if not cut.fit.met:
            return row
        with self.turns.together():
            model, steps = copy.deepcopy(cut.model), cell.steps - cut.steps
            started = time.perf_counter()
            optimizer = "muon" if cell.contestant.endswith(MUON) else "args"
            self.bench.distil(model, steps, self.setup.rate, cell.seed, optimizer)
            self.pace = (time.perf_counter() - started) / max(1, steps)
            return row | {"after": self.bench.quality(model)}

    def _cut_of(self, cell: Cell) -> Cut:
        """The peer's model, the same for all its recoveries."""
        bench, key = self.bench, (cell.peer, cell.budget, cell.seed)
        if self._cut is not None and self._cut[0] == key:
            return self._cut[1]
        self._cut = None
        prepared = self._prepare(cell)
        fit = self.timings.fit(lambda amount: prepared.cut(bench.load(), amount), cell.budget, self._start(cell))
        with self.turns.together():
            model = prepared.cut(bench.load(), fit.amount).to(bench.device)
            before = bench.quality(model)
        # Cutting again may have led to another model: scores of equal size on a GPU do not always sort alike.
        timed = self.timings.of(lambda: copy.deepcopy(model))
        self._cut = key, Cut(model, fit, timed, before, prepared.steps)
        return self._cut[1]

    def _start(self, cell: Cell) -> Fit | None:
        """What was found for the peer and the budget before."""
        return next(
            (
                Fit(row["amount"], Timed(**row["timed"]), row["met"], row["timings"])
                for row in self.amounts
                if (row.get("peer", row.get("contestant")).removesuffix(MUON), row["budget"])
                == (cell.peer, cell.budget)
                and all(row.get(name) == value for name, value in self.about.items())
            ),
            None,
        )

    def _prepare(self, cell: Cell) -> Prepared:
        key = cell.peer, cell.seed
        if self._prepared is None or self._prepared[0] != key or self._prepared[1].steps:
            with self.turns.together():
                batches = self.bench.examples(self.setup.calibration, cell.seed, labels=True)
                stream = self.bench.stream(cell.seed)
                work = Work(self.bench.load, batches, stream, cell.budget, cell.steps, cell.seed)
                self._prepared = key, PEERS[cell.peer].prepare(work)
        return self._prepared[1]

    def latencies(self, cell: Cell, given: Sequence[Plan] = ()) -> dict[Shape, float]:
        """Milliseconds of all shapes that a race asks about, and of the dense one, each timed as a peer's model is."""
        try:
            with self.timings.turns.together():
                return self._latencies(cell, given, self.timings.known)
        except Untimed:
            with self.timings.turns.alone():
                return self._latencies(cell, given, self.timings.time)

    def _latencies(
        self, cell: Cell, given: Sequence[Plan], time_of: Callable[[PreTrainedModel], Timed]
    ) -> dict[Shape, float]:
        budget, layout = self.setup.budget(cell.budget), locate(self.bench.model)
        realise = realiser(layout, self.regime)

        def build(shape: Shape) -> PreTrainedModel:
            model = realise(shape)
            model.tie_weights()  # so that its parameters have the names of a slim model's
            return model

        unit = time_of(build(layout.dense)).dense_ms
        fits = Fits(
            layout.dense,
            lambda shapes: {layout.dense: unit} | {each: unit / time_of(build(each)).speedup for each in shapes},
            budget.limit_ms,
            1 / SHORT - 1,
        )
        judge = Blind(self.bench.model, self.bench.examples(1, cell.seed), Bases(self._any_basis()))
        field_of(judge, fits, given=given)
        neighbours(judge, fits)
        return fits.measured

    def time(self, cell: Cell) -> None:
        """Time what a cell will ask about, and keep a peer's amount, so that the cell has not to wait for its turn."""
        if cell.contestant in OURS:
            self.latencies(cell)
            return
        prepared, start = self._prepare(cell), self._start(cell)
        fit = self.timings.fit(lambda amount: prepared.cut(self.bench.load(), amount), cell.budget, start)
        if start is None:
            row: Row = {
                "peer": cell.peer,
                "budget": cell.budget,
                "seed": cell.seed,
                "amount": fit.amount,
                "met": fit.met,
            }
            row |= {"timings": fit.timings, "timed": asdict(fit.timed)}
            append_row(self.timings.path, self.about | row)
            self.amounts.append(self.about | row)

    def _any_basis(self) -> Basis | None:
        """A basis where there can be one, the coordinates themselves: for who asks whether there is one."""
        layout = locate(self.bench.model)
        try:
            check_exact(layout)
        except HawAdaError:
            return None
        return Basis(torch.eye(layout.hidden_size), torch.ones(1, 1), torch.zeros(1), False)

    def _search(self, gated: PeftModel, cell: Cell) -> Plan:
        """The plan that `find_plan` finds for a budget, timed with the device to itself."""
        effort = replace(self.setup.effort, min_rounds=7, max_rounds=40)
        with self.timings.turns.alone():
            calibration = self.bench.examples(self.setup.calibration, cell.seed)
            return find_plan(gated, self.setup.budget(cell.budget), calibration, effort=effort).plan

    def _fitted(self, seed: int) -> list[Batch]:
        """The calibration batches that a race prepares models on."""
        batches = self.bench.examples(self.setup.calibration, seed)
        return parts_of(batches, Race.held_out, self.bench.model.main_input_name)[0]

    def _basis(self, seed: int) -> Basis | None:
        """That of a race; None where there is none."""
        if seed not in self._bases:
            batches = first_of(self._fitted(seed), self.bench.model.main_input_name)
            try:
                check_exact(locate(self.bench.model))
                self._bases[seed] = find_basis(self.bench.model, batches)
            except HawAdaError:
                self._bases[seed] = None
        return self._bases[seed]

    def ours(self, cell: Cell) -> Row:
        """A race and the recovery after it."""
        bench, options = self.bench, dict(OURS[cell.contestant])
        start: PreTrainedModel | PeftModel = bench.load()
        given: list[Plan] = []
        gated = Bases()
        if options.pop("searched", False):
            start = get_peft_model(bench.load(), HawAdaConfig())
            given = [self._search(start, cell)]
            start.apply_plan(given[0])
            base = start.get_base_model()
            gated = gated_bases(base, locate(base), ["default"])
        known = self.latencies(cell, given)
        race = Race(
            budget=self.setup.budget(cell.budget),
            tolerance=1 / SHORT - 1,
            effort=self.setup.effort,
            latencies=known,
            **options,
        )
        with self.turns.together(), tempfile.TemporaryDirectory() as folder:
            calibration = bench.examples(self.setup.calibration, cell.seed)
            started = time.perf_counter()
            slimmed = recover(
                start,
                bench.arguments(folder, cell.steps, self.setup.rate, cell.seed),
                train_dataset=bench.pool(cell.seed),
                data_collator=whole,
                calibration=calibration,
                race=race,
            )
            recovering = time.perf_counter() - started
            record, small = slimmed.race, slimmed.model
            if set(record.latencies) - set(known):
                raise HawAdaError("the race timed shapes that were not timed alone")
            winner = record.entrant(record.winner or "")
            after = bench.quality(small)
            stream = gated.stream or (self._basis(cell.seed) if winner.plan.rotated else None)
            turn = plan_turn(bench.model, winner.plan, Bases(stream, gated.heads))
            plain = slim(bench.model, winner.plan, turn=turn).to(bench.device)
            cut = bench.quality(plain)
            fitted = self._fitted(cell.seed)
            coordinates = None if turn is None else turn.write
            PREPARATIONS[winner.preparation](bench.model, plain, winner.plan, fitted, coordinates)
            before = bench.quality(plain)
        raced = record.seconds + sum(run.seconds for run in record.runs)
        self.fixed, self.pace = FIXED + raced, max(0.0, recovering - raced) / cell.steps
        timed = self.timings.of(lambda: slim(bench.model, winner.plan, turn=turn))
        return {
            "slice": cut,
            "before": before,
            "after": after,
            "speedup": timed.speedup,
            "met": timed.speedup >= SHORT * cell.budget,
            "timed": asdict(timed),
            "winner": winner.name,
            "source": winner.source,
            "layers": list(winner.plan.layers),
            "race_steps": record.cost,
            "race_seconds": raced,
            "led_throughout": record.led_throughout,
            "race": record.to_dict() if record.runs else None,
            "parameters": small.num_parameters(),
            "optimizer": "muon",
        }
