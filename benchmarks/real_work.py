"""What is done for a cell of the bench on a real model: a peer cut and recovered, or our race and its recovery."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from document import circumstances
from peers.peer import Prepared, Work
from peers.registry import PEERS
from real_cells import MUON, OURS, Cell
from rows import Row, append_row, read_rows
from sizing import SHORT, Fit, Stopwatch, Timed
from timings import Timings, Untimed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from turns import Turns
from work import Batch, Bench, whole

from hawada_peft import Effort, LatencyBudget, Plan, Race, Shape, recover, slim
from hawada_peft.basis.basis import Basis, plan_turn
from hawada_peft.basis.find import find_basis
from hawada_peft.basis.proof import check_exact
from hawada_peft.distil.raced import first_of, parts_of
from hawada_peft.errors import HawAdaError
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.toy import ToyClock
from hawada_peft.race import PREPARATIONS, Fits, Judge, field_of
from hawada_peft.race.candidates import neighbours
from hawada_peft.search.timed_models import realiser
from hawada_peft.vanilla.family import locate

RATE, LENGTH, EVAL_WINDOWS, CALIBRATION = 5e-4, 512, 120, 64

PACE, FIXED = 0.15, 30.0
"""Seconds of a step of recovery, and of what else a cell needs, until one was made."""


@dataclass(frozen=True)
class Conditions:
    """What is the same for all cells, the tiny mode's sizes instead of the real ones."""

    device: str
    batch_size: int = 16
    rate: float = RATE
    length: int = LENGTH
    calibration: int = CALIBRATION
    eval_windows: int = EVAL_WINDOWS
    rows: int = 8
    effort: Effort = field(
        default_factory=lambda: Effort(min_rounds=15, max_rounds=60, max_seconds=4.0, tolerance=0.004)
    )

    @property
    def regime(self) -> Regime:
        """Of all timings."""
        gpu = self.device.startswith("cuda")
        return Regime(
            mode="prefill",
            batch_size=self.rows,
            seq_len=self.length,
            dtype="bfloat16" if gpu else "float32",
            backend="cuda_graph" if gpu else "eager",
            device=self.device,
        )

    def budget(self, speedup: float) -> LatencyBudget:
        """The same conditions as a budget."""
        names = ("mode", "batch_size", "seq_len", "dtype", "backend", "device")
        return LatencyBudget(speedup=speedup, **{name: getattr(self.regime, name) for name in names})


def tiny(folder: Path) -> tuple[str, Path, Conditions]:
    """A tiny model, timed by a law of sizes, and data that repeat themselves: something to lose and to win back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    generator = np.random.default_rng(0)
    for name, count in (("train", 200), ("eval", 8)):
        starts, strides = generator.integers(0, 250, (count, 1)), generator.integers(1, 9, (count, 1))
        np.save(folder / f"{name}.npy", ((starts + strides * np.arange(32)) % 251).astype(np.uint16))
    effort = Effort(warmup=1, lead_in=0, min_rounds=3, max_rounds=5, max_seconds=0.5, clock=ToyClock())
    conditions = Conditions("cpu", 8, 1e-3, 32, 16, 8, 4, effort)
    return str(folder / "teacher"), folder, conditions


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
        teacher, data: folders; the second has train.npy and eval.npy.
        conditions: of all cells.
        timings: rows of timed models are added to this file.
        turns: of the device.
        earlier: files of rows and of timed models from before.
    """

    def __init__(
        self,
        teacher: str,
        data: Path,
        conditions: Conditions,
        timings: Path,
        turns: Turns,
        earlier: Sequence[Path] = (),
    ) -> None:
        self.conditions, self.turns, self.regime = conditions, turns, conditions.regime
        turns.finish = torch.cuda.synchronize if conditions.device.startswith("cuda") else turns.finish
        with turns.together():
            self.bench = Bench(
                teacher,
                str(data / "train.npy"),
                str(data / "eval.npy"),
                device=conditions.device,
                length=conditions.length,
                eval_length=conditions.length,
                batch_size=conditions.batch_size,
                eval_examples=conditions.eval_windows,
            )
            dense = self.bench.load().to(device=self.regime.device, dtype=self.regime.torch_dtype)
        self.about: Row = {"device": circumstances(conditions.device)["device"], "regime": str(self.regime)}
        watch = Stopwatch(dense, self.regime, conditions.effort)
        self.timings = Timings(watch, timings, self.about, turns, earlier)
        self.amounts = [row for file in (*earlier, timings) for row in read_rows(file) if "amount" in row]
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
            self.bench.distil(model, steps, self.conditions.rate, cell.seed, optimizer)
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
                batches = self.bench.examples(self.conditions.calibration, cell.seed, labels=True)
                stream = self.bench.stream(cell.seed)
                work = Work(self.bench.load, batches, stream, cell.budget, cell.steps, cell.seed)
                self._prepared = key, PEERS[cell.peer].prepare(work)
        return self._prepared[1]

    def latencies(self, cell: Cell) -> dict[Shape, float]:
        """Milliseconds of all shapes that a race asks about, and of the dense one, each timed as a peer's model is."""
        try:
            with self.turns.together():
                return self._latencies(cell, self.timings.known)
        except Untimed:
            with self.turns.alone():
                return self._latencies(cell, self.timings.time)

    def _latencies(self, cell: Cell, time_of: partial[Timed]) -> dict[Shape, float]:
        budget, layout = self.conditions.budget(cell.budget), locate(self.bench.model)
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
        judge = Blind(self.bench.model, self.bench.examples(1, cell.seed), self._any_basis())
        field_of(judge, fits, most=OURS[cell.contestant].get("plans", Race.plans))
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

    def _fitted(self, seed: int) -> list[Batch]:
        """The calibration batches that a race prepares models on."""
        batches = self.bench.examples(self.conditions.calibration, seed)
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
        bench, known = self.bench, self.latencies(cell)
        options = OURS[cell.contestant]
        race = Race(
            budget=self.conditions.budget(cell.budget),
            tolerance=1 / SHORT - 1,
            effort=self.conditions.effort,
            latencies=known,
            **options,
        )
        with self.turns.together(), tempfile.TemporaryDirectory() as folder:
            calibration = bench.examples(self.conditions.calibration, cell.seed)
            started = time.perf_counter()
            slimmed = recover(
                bench.load(),
                bench.arguments(folder, cell.steps, self.conditions.rate, cell.seed),
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
            turn = plan_turn(bench.model, winner.plan, self._basis(cell.seed) if winner.plan.rotated else None)
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
