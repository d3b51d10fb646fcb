"""A race before a recovery: real trainings of tiny models."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conftest import (
    LM_ROW,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    first_of,
    gate,
    scattered_plan,
)
from distil_runs import DATA, IMAGES, arguments, kl_of
from pairs import in_two
from peft import LoraConfig
from transformers import TrainerCallback

from hawada_peft import Effort, LatencyBudget, Race, init_basis, recover
from hawada_peft.distil.raced import parts_of, rows_of
from hawada_peft.errors import HawAdaError, UnsupportedModelError
from hawada_peft.latency.toy import ToyClock
from hawada_peft.race import GENERATORS, GIVEN, PREPARATIONS, RaceRecord
from hawada_peft.race.candidates import DIRECTIONS
from hawada_peft.refit.fidelity import divergence
from hawada_peft.surgery.slimming import slim as slim_of
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.resize import parameters_at
from hawada_peft.vanilla.shape import Shape

LAYERS = 6
TOKENS = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(9))
BATCHES = [{"input_ids": rows} for rows in TOKENS.split(4)]
PICTURES = [{"pixel_values": torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)]
"""Enough positions for all directions of the residual stream, also without those that are held out."""
SMALL = {"plans": 2, "steps": 1, "preparations": ("none", "least squares"), "rotate": False}
QUICK = {"max_steps": 40, "learning_rate": 0.01, "lr_scheduler_type": "cosine"}
FEW = {"max_steps": 4}
"""Where what the race finds counts, and not what becomes of it."""


def dense_model() -> Any:
    return build(LM_ROW, num_hidden_layers=LAYERS)


def budget(layers: int = 4) -> LatencyBudget:
    """A budget without a clock: the parameters of so many layers."""
    layout = locate(dense_model())
    return LatencyBudget(
        max_parameters=parameters_at(layout, replace(layout.dense, num_hidden_layers=layers)), seq_len=12
    )


def raced(folder: Path, model: Any = None, *, args: Any = None, **options: Any) -> tuple[Any, RaceRecord]:
    options = {"race": Race(budget(), **SMALL), "train_dataset": DATA, "calibration": BATCHES} | options
    args = arguments(folder, **(QUICK | (args or {})))
    slimmed = recover(dense_model() if model is None else model, args, **options)
    return slimmed.model, slimmed.race


@dataclass(frozen=True)
class Whole:
    """A race from its beginning to the end of the recovery: what it began with and what it came to."""

    race: Race
    folder: Path
    dense: Any
    slim: Any
    record: RaceRecord
    steps: list[int]
    """Of the recovery, as it ended."""


class Count(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


@pytest.fixture(scope="module", params=first_of(["continued", "anew"], "continued"))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A race that nothing disturbs."""
    race, folder, dense, count = (
        Race(budget(), onward=request.param, **SMALL),
        tmp_path_factory.mktemp("whole"),
        dense_model(),
        Count(),
    )
    slim, record = raced(folder, dense, race=race, callbacks=[count])
    return Whole(race, folder, dense, slim, record, count.seen)


def test_the_winner_is_recovered(whole: Whole) -> None:
    slim, record, winner = whole.slim, whole.record, whole.record.best
    assert winner is not None
    assert slim.config.num_hidden_layers == winner.plan.shape.num_hidden_layers
    assert slim.num_parameters() <= budget().max_parameters
    assert_same_state(whole.dense.state_dict(), dense_model().state_dict())
    assert all(parameter.requires_grad for parameter in slim.parameters())
    state = json.loads((whole.folder / "race" / "race.json").read_text())
    assert state["winner"] == winner.key
    assert not list((whole.folder / "race").glob("*.safetensors"))
    losses = [run.loss for run in record.standing(len(record.lengths) - 1)]
    assert losses == sorted(losses)
    assert kl_of(slim, whole.dense) < 1.2 * losses[0]


def test_the_steps_of_the_race_are_taken_off(whole: Whole) -> None:
    assert whole.record.share == 0.25  # of a step: 1 example instead of 4
    assert whole.steps == [QUICK["max_steps"] - -(-sum(run.steps for run in whole.record.runs) // 4)]


def test_a_race_that_leaves_nothing_of_the_recovery_is_refused(tmp_path: Path) -> None:
    few = {"max_steps": 2}  # runs of the first rung alone cost as much
    with pytest.raises(HawAdaError, match="leaves nothing"):
        raced(tmp_path, race=Race(budget(), **(SMALL | {"steps": 4})), args=few)


def test_where_the_first_preparation_cannot_be_done_plans_run_as_they_were_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("not this one")

    monkeypatch.setitem(PREPARATIONS, "cosine", refuse)
    losses = []
    for name in ("none", "cosine"):
        race = Race(budget(), **(SMALL | {"preparations": (name,)}))
        _, record = raced(tmp_path / name, race=race, args=FEW)
        losses.append([run.loss for run in record.runs])
    assert losses[0] == losses[1]
    both = Race(budget(), **(SMALL | {"preparations": ("none", "cosine")}))
    _, record = raced(tmp_path / "further", race=both, args=FEW)
    assert [math.isnan(run.loss) for run in record.runs if record.entrant(run.entrant).preparation == "cosine"] == [
        True
    ]


class KilledError(Exception):
    pass


def test_a_race_gives_the_same_again_and_loses_one_run_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    write, runs = RaceRecord.write, [replace(run, seconds=0) for run in whole.record.runs]
    for killed_at, written in ((0, True), (2, False), (4, True), (5, False)):

        def killed(self: RaceRecord, killed_at: int = killed_at, written: bool = written) -> None:
            """Before or after the record of a run is there; the weights that it left are."""
            if written:
                write(self)
            if len(self.runs) == killed_at:
                raise KilledError
            write(self)

        monkeypatch.setattr(RaceRecord, "write", killed)
        with pytest.raises(KilledError):
            raced(tmp_path, race=whole.race)
        kept = json.loads((tmp_path / "race" / "race.json").read_text())["runs"]
        assert len(kept) == killed_at - (not written)
        assert [run["loss"] for run in kept] == [run.loss for run in runs[: len(kept)]]
    monkeypatch.setattr(RaceRecord, "write", write)
    again, resumed = raced(tmp_path, race=whole.race)
    assert [replace(run, seconds=0) for run in resumed.runs] == runs
    assert_same_state(again.state_dict(), whole.slim.state_dict())


def test_the_plan_of_trained_gates_enters_with_its_folded_weights(tmp_path: Path) -> None:
    model = gate(dense_model(), gates=("heads", "ffn", "blocks", "layers"))
    plan = scattered_plan(model, Shape(8, 4, 64, 3))
    model.apply_plan(plan)
    base = model.get_base_model()
    slim, record = raced(tmp_path, model, race=Race(plans=2, steps=1, preparations=("none",)))
    given = [each for each in record.entrants if each.source == "given"]
    assert [each.plan for each in given] == [plan]
    assert_same_state(base.state_dict(), dense_model().state_dict())
    most = parameters_at(locate(base), plan.shape)
    assert all(parameters_at(locate(base), each.plan.shape) <= most for each in record.entrants if not each.neighbour)
    assert slim.num_parameters() <= most


def test_gates_without_a_plan_are_taken_off(tmp_path: Path) -> None:
    model = gate(dense_model())
    base = model.get_base_model()
    slim, record = raced(tmp_path, model, race=Race(budget(), plans=1, preparations=("none",)), args={"max_steps": 2})
    assert [each.plan.shape.num_hidden_layers for each in record.entrants if not each.neighbour] == [4]
    assert not record.runs
    assert slim.num_parameters() <= budget().max_parameters
    assert_same_state(base.state_dict(), dense_model().state_dict())


def test_lora_races_too(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    slim, record = raced(tmp_path, lora=lora, args=FEW)
    assert slim.num_parameters() <= budget().max_parameters
    assert not any("lora" in name for name in slim.state_dict())
    assert record.best is not None


def test_images(tmp_path: Path) -> None:
    dense = build(VISION_ROW)
    batches = [{"pixel_values": torch.stack([row["pixel_values"] for row in IMAGES])}]
    layout = locate(dense)
    limit = LatencyBudget(
        max_parameters=parameters_at(layout, replace(layout.dense, num_hidden_layers=3)), image_size=16
    )
    race = Race(limit, plans=2, steps=1, preparations=tuple(PREPARATIONS))
    slim, record = raced(tmp_path, dense, race=race, train_dataset=IMAGES, calibration=batches)
    assert slim.num_parameters() <= limit.max_parameters
    assert {each.preparation for each in record.entrants} == set(race.preparations)


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    dense = dense_model().model
    trained, record = raced(tmp_path, dense)
    assert record.best is not None
    data = [{name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}]
    cut = slim_of(dense, record.best.plan)
    assert divergence(dense, trained.eval(), data)[1] < 0.5 * divergence(dense, cut.eval(), data)[1]


@pytest.mark.parametrize("row", first_of([LM_ROW, VISION_ROW], LM_ROW))
def test_a_rotated_stream_races_is_prepared_and_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    monkeypatch.setattr("hawada_peft.distil.raced.GENERATORS", {DIRECTIONS: GENERATORS[DIRECTIONS]})
    dense, clock = build(row, tie_word_embeddings=False), ToyClock()
    images = row is VISION_ROW
    limit = LatencyBudget(speedup=1.2, **({"image_size": 16} if images else {"seq_len": 12}))
    data = IMAGES if images else DATA
    batches = PICTURES if images else BATCHES
    race = Race(limit, preparations=tuple(PREPARATIONS), steps=1, effort=Effort.quick(clock=clock))
    options: dict[str, Any] = {"train_dataset": data, "calibration": batches, "race": race}
    slim, record = raced(tmp_path, dense, **options)
    assert record.best is not None
    assert record.best.plan.rotated
    assert slim.config.hidden_size == record.best.plan.shape.hidden_size < dense.config.hidden_size
    runs = {record.entrant(run.entrant).preparation: run.loss for run in record.runs if run.rung == 0}
    assert set(runs) == set(PREPARATIONS)
    assert {name for name, loss in runs.items() if math.isnan(loss)} == {"magnitude", "cosine"}
    with pytest.raises(HawAdaError, match="no plan meets the budget"):
        raced(tmp_path / "not", dense, **(options | {"race": replace(race, rotate=False)}))


@pytest.mark.parametrize("narrower", [Shape(hidden_size=32), Shape(head_dim=4)], ids=["stream", "heads"])
def test_the_plan_of_gates_in_a_basis_races_in_it(tmp_path: Path, narrower: Shape) -> None:
    dense, batches = build(VISION_ROW), PICTURES
    model = gate(dense, shuffle=False, gates=("heads", "ffn", "layers", "hidden"), rotate=True, narrow_heads=True)
    init_basis(model, batches)
    model.apply_plan(model.plan(narrower))
    race = Race(plans=1, steps=1, preparations=("none", "least squares"), rotate=False)
    slim, record = raced(tmp_path, model, race=race, train_dataset=IMAGES, calibration=batches)
    (given,) = {each.plan for each in record.entrants if each.source == GIVEN}
    assert given.in_bases
    assert all(math.isfinite(run.loss) for run in record.runs if record.entrant(run.entrant).plan == given)
    assert slim.num_parameters() <= parameters_at(locate(dense), given.shape)


def test_all_that_is_wrong_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    dense = dense_model()
    for options, words in (
        ({"race": "yes"}, "race must be a Race"),
        ({"calibration": None}, "needs `calibration`"),
        ({"race": True}, "no plan"),
        ({"calibration": [{"input_ids": TOKENS[:1]}]}, "two rows"),
    ):
        with pytest.raises(HawAdaError, match=words):
            raced(tmp_path, dense, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "whole", "expected"),
    [
        (None, (16, 1), (4, 0.25)),
        (None, (4, 16), (16, 0.25)),
        (3, (16, 1), (3, 3 / 16)),
        (64, (16, 2), (32, 1.0)),
        (None, (1, 1), (1, 1.0)),
    ],
)
def test_rows_of_a_step(
    tmp_path: Path, given: int | None, whole: tuple[int, int], expected: tuple[int, float]
) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=whole[0], gradient_accumulation_steps=whole[1])
    assert rows_of(Race(batch_size=given), args) == expected


def test_calibration_batches_are_parted() -> None:
    batches = [{"input_ids": TOKENS[i : i + 1], "labels": TOKENS[:1]} for i in range(8)]
    fitted, held = parts_of(batches, 0.25, "input_ids")
    assert [int(batch["input_ids"][0, 0]) for batch in held] == [int(TOKENS[i, 0]) for i in (3, 7)]
    assert len(fitted) == 6
    assert all("labels" not in batch for batch in (*fitted, *held))
    fitted, held = parts_of([{"input_ids": TOKENS}], 0.25, "input_ids")
    assert (len(fitted[0]["input_ids"]), len(held[0]["input_ids"])) == (12, 4)


def process(folder: Path) -> None:
    """What each of two processes does."""
    args = arguments(folder, ddp_backend="gloo", ddp_find_unused_parameters=False, **QUICK)
    rank = PartialState().process_index
    slimmed = recover(
        dense_model(),
        args,
        train_dataset=DATA,
        calibration=BATCHES[2 * rank : 2 * rank + 2],
        race=Race(budget(), plans=2, steps=1, preparations=("none", "least squares")),
    )
    record = slimmed.race.to_dict()
    for run in record["runs"]:
        del run["seconds"]
    digest = hashlib.sha256()
    for tensor in slimmed.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    (folder / f"rank{rank}.json").write_text(json.dumps([record, digest.hexdigest()]))


def test_all_processes_run_one_race(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    in_two(process, out)
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0][0]["winner"] is not None
    assert json.loads((out / "race" / "race.json").read_text())["winner"] == found[0][0]["winner"]
