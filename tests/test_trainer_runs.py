"""The trainer of gates: every relaxation, budgets, resuming, precision, odd data, several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BARE_ROW, LM_ROW, build, gate
from gate_runs import DATA, LABELLED, TARGET, StopAt, logged, thetas, trainer_of
from pairs import in_two
from peft import PeftModel
from torch.utils.data import IterableDataset
from toys import StoppedClock, by_table, once, toy_table
from transformers import TrainerCallback

from hawada_peft import HawAdaTrainer, LatencyBudget, collect_gates, find_plan, init_gates
from hawada_peft.distil.divergence import kl_divergence
from hawada_peft.errors import HawAdaError, InfeasibleBudgetError
from hawada_peft.gates.relaxation import RELAXATIONS
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.table import LatencyTable
from hawada_peft.training.saved_state import STATE_FILE
from hawada_peft.vanilla.family import locate

BUDGET = LatencyBudget(speedup=1.5, mode="prefill", seq_len=8)
DRAWN = [name for name, each in RELAXATIONS.items() if each.draws_to_size]
SAVED = {"save_strategy": "steps", "lr_scheduler_type": "linear"}


def small(folder: Path, *, args: Any = None, model: PeftModel | None = None, **options: Any) -> HawAdaTrainer:
    return trainer_of(folder, model, args={"max_steps": 4} | (args or {}), **options)


def fresh() -> PeftModel:
    return gate(build(LM_ROW), shuffle=False)


def table_of(model: PeftModel) -> LatencyTable:
    layout = locate(model.get_base_model())
    return toy_table(layout.dense, launch=0.2, arithmetic=1.0, base_sizes=layout.base_sizes())


def effort_of(**changes: Any) -> Effort:
    """A machine on which all but the dense shape take 1.2 times what the table says."""
    return once(by_table(table_of(fresh()), 1.2), **changes)


@pytest.fixture
def law() -> LatencyTable:
    """That table."""
    return table_of(fresh())


def divergence(student: torch.Tensor, model: PeftModel) -> float:
    with torch.no_grad(), model.disable_adapter():
        teacher = model.eval()(input_ids=torch.stack([row["input_ids"] for row in DATA])).logits
    return kl_divergence(student, teacher).item()


def masked_logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.stack([row["input_ids"] for row in DATA])).logits


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action, self.found = step, action, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.found = self.action()


# ------------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_relaxation_ends_with_the_target_plan_applied(tmp_path: Path, relaxation: str) -> None:
    trainer = small(tmp_path, relaxation=relaxation, warmup_fraction=0.25)
    trainer.train()
    assert trainer.model.applied_plan().shape == TARGET
    assert all(found.relaxation is None for found in collect_gates(trainer.model).values())
    assert trainer.model.merge_and_unload().config.num_hidden_layers == 2
    assert len(logged(trainer, "size")) == (1 if relaxation in DRAWN else 0)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_warm_up_leaves_the_gates_open(tmp_path: Path, relaxation: str) -> None:
    model = gate(build(LM_ROW))
    expected = divergence(masked_logits(model), model)
    args = {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    trainer = small(tmp_path, model=model, relaxation=relaxation, warmup_fraction=0.5, soft_fraction=1.0, args=args)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[:2] == pytest.approx([expected] * 2, rel=1e-4)
    assert abs(kl[3] - expected) > 0.01 * expected  # the gates move then
    sizes = [entry.get("size") for entry in trainer.state.log_history[:4]]
    assert sizes[:2] == [None, None]
    assert (sizes[2] is not None) == (relaxation in DRAWN)


@pytest.mark.parametrize(("warmup", "soft", "open_steps"), [(0.5, 0.5, 2), (0.0, 0.0, 0), (1.0, 1.0, 4)])
def test_without_a_soft_part(tmp_path: Path, warmup: float, soft: float, open_steps: int) -> None:
    model = gate(build(LM_ROW))
    kl_open = divergence(masked_logits(model), model)
    args = {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    options = {"warmup_fraction": warmup, "soft_fraction": soft, "relaxation": "hard_concrete"}
    trainer = small(tmp_path, model=model, args=args, **options)
    trainer.train()
    kl_hard = divergence(masked_logits(model), model)
    assert logged(trainer, "kl") == pytest.approx([kl_open] * open_steps + [kl_hard] * (4 - open_steps), rel=1e-4)
    assert logged(trainer, "size") == []
    assert trainer.model.applied_plan().shape == TARGET


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_evaluation_while_soft_is_that_of_the_slim_model_of_that_moment(tmp_path: Path, relaxation: str) -> None:
    trainer = small(tmp_path, relaxation=relaxation, soft_fraction=1.0)

    def look() -> tuple[float, float]:
        found = trainer.evaluate()["eval_loss"]
        copy = gate(build(LM_ROW))
        for name, theta in thetas(trainer.model).items():
            collect_gates(copy)[name].theta.data.copy_(theta)
        copy.apply_plan(trainer.phases.plan(trainer.target))
        tokens = torch.stack([row["input_ids"] for row in DATA])
        with torch.no_grad():
            return found, divergence(copy.merge_and_unload()(input_ids=tokens).logits, gate(build(LM_ROW)))

    callback = At(2, look)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.found[0] == pytest.approx(callback.found[1], rel=1e-4)


@pytest.mark.parametrize("relaxation", ["straight_through", "closing"])
def test_evaluation_changes_nothing_of_training(tmp_path: Path, relaxation: str) -> None:
    ends = []
    for evaluate in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = small(tmp_path, relaxation=relaxation, args=evaluate)
        trainer.train()
        ends.append((thetas(trainer.model), logged(trainer, "kl"), logged(trainer, "keep_heads")))
    torch.testing.assert_close(ends[1][0], ends[0][0], rtol=0, atol=0)
    assert ends[1][1:] == ends[0][1:]


def test_callbacks_see_the_logs(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    options = {"bimodality_weight": 0.5, "floor_weight": 2.0, "keep_floor": 1.0, "relaxation": "hard_concrete"}
    small(tmp_path, callbacks=[Log()], **options).train()
    weights = {"kl": 1.0, "size": 10.0, "bimodality": 0.5, "floor": 2.0}
    for logs in seen[:2]:
        assert logs["loss"] == pytest.approx(sum(weight * logs[name] for name, weight in weights.items()), rel=1e-4)
    assert seen[1]["floor"] > 0
    assert not {"size", "bimodality", "floor"} & set(seen[2])
    keep = [[logs[name] for name in ("keep_heads", "keep_ffn", "keep_layers")] for logs in seen[:4]]
    assert keep[2] == keep[3] == [4 / 8, 40 / 96, 2 / 4]
    assert all(0 < ratio <= 1 for ratio in keep[0])
    assert keep[0] != keep[1] != keep[2]


# ------------------------------------------------------------------------------------------------------------ budgets


def test_a_budget_becomes_a_shape_by_the_search(tmp_path: Path, law: LatencyTable) -> None:
    options = {"table": law, "effort": effort_of(candidates=2, search_rounds=4), "rotate": False}
    trainer = small(tmp_path, shape=None, budget=BUDGET, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-5)  # no goal yet: open
    with pytest.raises(HawAdaError, match="when `train` begins"):
        _ = trainer.goal
    trainer.train()
    shape = trainer.model.applied_plan().shape
    assert shape == trainer.target != law.dense
    assert 1.2 * law.estimate(shape) <= law.dense_ms / 1.5


def test_a_limit_on_size_is_kept(tmp_path: Path, law: LatencyTable) -> None:
    budget = LatencyBudget(max_parameters=120_000, mode="prefill", seq_len=8)
    effort = effort_of(candidates=1, search_rounds=2)
    trainer = small(tmp_path, shape=None, budget=budget, table=law, effort=effort)
    trainer.train()
    assert trainer.model.merge_and_unload().num_parameters() <= 120_000


def test_a_trained_budget_keeps_the_layers_that_the_search_kept(tmp_path: Path) -> None:
    search = {
        "table": table_of(fresh()),
        "refit": False,
        "rotate": False,
        "effort": effort_of(candidates=1, search_rounds=2),
    }
    budget = LatencyBudget(max_parameters=110_000, mode="prefill", seq_len=8)
    model = gate(build(LM_ROW), shuffle=False, gates=("layers",))
    trainer = small(tmp_path, model=model, shape=None, budget=budget, **search)
    batches = trainer._calibration()
    found = find_plan(model, budget, batches, **search)
    trainer._prepare()
    assert len(found.plan.layers) < 4
    assert trainer.model.plan(trainer.target).layers == found.plan.layers


def test_a_budget_cuts_fresh_gates_by_their_importance(tmp_path: Path) -> None:
    search = {
        "table": table_of(fresh()),
        "refit": False,
        "rotate": False,
        "effort": effort_of(candidates=1, search_rounds=2),
    }
    trainer = small(tmp_path, model=fresh(), shape=None, budget=BUDGET, **search)
    trainer._prepare()
    plan = trainer.model.plan(trainer.target)
    units = [*plan.heads, *plan.channels]
    assert any(kept != tuple(range(len(kept))) for kept in units)  # alike, all would lose their last ones


def test_an_unreachable_latency_fails_before_training(tmp_path: Path) -> None:
    search = {"table": table_of(fresh()), "rotate": False, "effort": effort_of(search_rounds=2)}
    budget = LatencyBudget(speedup=1000, mode="prefill", seq_len=8)
    trainer = small(tmp_path, shape=None, budget=budget, **search)
    with pytest.raises(InfeasibleBudgetError, match="binding: latency"):
        trainer.train()
    assert trainer.state.global_step == 0


# ------------------------------------------------------------------------------------------------------------- resume


def ends_of(trainer: HawAdaTrainer) -> tuple[Any, ...]:
    names = ("kl", "loss", "keep_ffn")
    history = [[entry.get(name) for name in names] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model.applied_plan(), trainer.goal.state_dict(), torch.get_rng_state().tolist(), history


@pytest.mark.parametrize("interrupted", [1, 3], ids=["while soft", "after the decision"])
@pytest.mark.parametrize("relaxation", ["straight_through", "closing", "hard_concrete"])
def test_every_relaxation_resumes_bit_exactly(tmp_path: Path, relaxation: str, interrupted: int) -> None:
    args = SAVED | {"save_steps": interrupted, "max_steps": 4}
    whole = small(tmp_path / "whole", relaxation=relaxation, args=args)
    whole.train()
    expected = ends_of(whole)
    torch.manual_seed(123)
    resumed = small(tmp_path / "resumed", relaxation=relaxation, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{interrupted}"))
    torch.testing.assert_close(thetas(resumed.model), thetas(whole.model), rtol=0, atol=0)
    assert ends_of(resumed) == expected


def test_a_searched_shape_is_not_searched_again(tmp_path: Path, law: LatencyTable) -> None:
    args = SAVED | {"save_steps": 1}
    options = {"shape": None, "budget": BUDGET, "table": law, "rotate": False, "args": args}
    whole = small(tmp_path / "whole", effort=effort_of(candidates=2, search_rounds=4), **options)
    whole.train()
    resumed = small(tmp_path / "resumed", effort=once(StoppedClock()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed.model.applied_plan() == whole.model.applied_plan()
    torch.testing.assert_close(thetas(resumed.model), thetas(whole.model), rtol=0, atol=0)


def test_incomplete_and_other_checkpoints_are_refused(tmp_path: Path) -> None:
    small(tmp_path / "whole", args=SAVED | {"save_steps": 1}, callbacks=[StopAt(1)]).train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(HawAdaError, match=r"hawada_state\.json is missing"):
        small(tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))


# -------------------------------------------------------------------------------------------------- start, optimizer


@pytest.mark.parametrize(
    ("part", "others"),
    [("lm_head", {"modules_to_save": ["lm_head"]}), ("lora_", {"lora": {"r": 2, "target_modules": ["q_proj"]}})],
)
def test_gates_have_a_learning_rate_of_their_own(tmp_path: Path, part: str, others: dict[str, Any]) -> None:
    model = gate(build(LM_ROW), shuffle=False, **others)
    args = {"learning_rate": 0.0, "weight_decay": 0.1, "max_steps": 4}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if part in name}
    trainer = small(tmp_path, model=model, gate_learning_rate=0.3, args=args)
    start = thetas(model)
    trainer.train()
    assert before
    groups = trainer.optimizer.param_groups
    gates = {id(found.theta) for found in collect_gates(model).values()}
    assert [{id(p) in gates for p in group["params"]} for group in groups] == [{False}] * (len(groups) - 1) + [{True}]
    assert (groups[-1]["lr"], groups[-1]["weight_decay"]) == (0.3, 0.0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(trained)
    assert all(not torch.equal(theta, start[name]) for name, theta in thetas(model).items())
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_gates_start_by_importance_at_the_target(tmp_path: Path) -> None:
    trainer = small(tmp_path, args={"learning_rate": 0.0})
    expected = fresh()
    init_gates(expected, trainer._calibration(), shape=TARGET)
    trainer.train()
    torch.testing.assert_close(thetas(trainer.model), thetas(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("model", "calibration"), [("user's", 64), ("fresh", 0)])
def test_started_gates_are_not_started_again(tmp_path: Path, model: str, calibration: int) -> None:
    own = fresh() if model == "fresh" else gate(build(LM_ROW))
    before = thetas(own)
    small(tmp_path, model=own, calibration_examples=calibration, args={"learning_rate": 0.0}).train()
    torch.testing.assert_close(thetas(own), before, rtol=0, atol=0)


def test_the_start_leaves_the_order_of_the_data(tmp_path: Path) -> None:
    found = []
    for calibration in (0, 4):
        trainer = small(tmp_path, calibration_examples=calibration)
        torch.manual_seed(7)
        trainer._prepare()
        found.append(torch.get_rng_state())
    assert torch.equal(*found)


def test_a_model_without_a_head_trains_as_well(tmp_path: Path) -> None:
    trainer = small(tmp_path, model=gate(build(BARE_ROW), shuffle=False), eval_dataset=DATA)
    trainer.train()
    assert trainer.model.applied_plan().shape == TARGET


# ---------------------------------------------------------------------------------------------------- precision, data


def test_autocast_and_checkpointing_agree_with_plain_training(tmp_path: Path) -> None:
    ends = {}
    for name, options in {
        "plain": {},
        "checkpointing": {"activation_checkpointing": True},
        "bf16": {"bf16": True},
    }.items():
        trainer = small(tmp_path, model=gate(build(LM_ROW)), relaxation="closing", args={"optim": "sgd"} | options)
        trainer.train()
        ends[name] = logged(trainer, "loss"), thetas(trainer.model)
    assert all(torch.tensor(losses).isfinite().all() for losses, _ in ends.values())
    assert ends["checkpointing"][0] == pytest.approx(ends["plain"][0], rel=1e-4)
    torch.testing.assert_close(ends["checkpointing"][1], ends["plain"][1], rtol=1e-4, atol=1e-5)
    assert ends["bf16"][0] == pytest.approx(ends["plain"][0], rel=0.05)
    assert ends["bf16"][0] != ends["plain"][0]


def test_checkpointing_draws_the_same_random_gates_again(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        options = {"model": gate(build(LM_ROW)), "relaxation": "hard_concrete", "soft_fraction": 1.0}
        trainer = small(tmp_path, args={"optim": "sgd", "activation_checkpointing": checkpointing}, **options)
        trainer.train()
        found.append(thetas(trainer.model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


class Stream(IterableDataset):
    """Examples one after the other, without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(DATA)


def test_streams_train_as_well(tmp_path: Path) -> None:
    trainer = small(tmp_path, train_dataset=Stream(), calibration_examples=6)
    batches = trainer._calibration()
    assert torch.equal(
        torch.cat([batch["input_ids"] for batch in batches]), torch.stack([r["input_ids"] for r in DATA])
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.model.applied_plan().shape == TARGET


def test_calibration_stops_when_it_has_enough(tmp_path: Path) -> None:
    sizes = {0: 4, 1: 4, 4: 4, 5: 8, 1000: 8}
    for wanted, expected in sizes.items():
        batches = small(tmp_path, calibration_examples=wanted, train_dataset=LABELLED)._calibration()
        assert sum(len(batch["input_ids"]) for batch in batches) == expected
        assert set(batches[0]) == {"input_ids", "labels"}


def test_calibration_on_dropped_remainders(tmp_path: Path) -> None:
    args = {"dataloader_drop_last": True}
    assert [
        len(batch["input_ids"]) for batch in small(tmp_path, args=args, train_dataset=DATA[:6])._calibration()
    ] == [4]
    with pytest.raises(HawAdaError, match="dataloader_drop_last"):
        small(tmp_path, args=args, train_dataset=DATA[:3]).train()


# ---------------------------------------------------------------------------------------------------------- processes


def process(folder: Path) -> None:
    """What each of two processes does."""
    for name in ("shape", "budget"):
        trainer = parallel(name, folder, {"per_device_train_batch_size": 2, "ddp_backend": "gloo"})
        trainer.train()
        found = {"world": trainer.args.world_size, "plan": trainer.model.applied_plan().to_dict()}
        found |= {"goal": trainer.goal.state_dict(), "eval_loss": trainer.evaluate()["eval_loss"]}
        found |= {each: logged(trainer, each) for each in ("loss", "kl")}
        found["comparison"] = None if trainer.comparison is None else trainer.comparison.to_dict()
        found["thetas"] = {each: theta.tolist() for each, theta in thetas(trainer.model).items()}
        (folder / f"{name}-{trainer.args.process_index}.json").write_text(json.dumps(found))


def parallel(name: str, folder: Path, args: dict[str, Any]) -> HawAdaTrainer:
    args = {"optim": "sgd", "max_grad_norm": 0.0, "ddp_find_unused_parameters": False} | args
    if name == "shape":
        return small(folder, model=gate(build(LM_ROW)), relaxation="straight_through", args=args)
    main = os.environ.get("RANK", "0") == "0"  # only the main process has a clock
    effort = effort_of(candidates=1, search_rounds=3) if main else once(StoppedClock())
    search = {"table": table_of(fresh()), "refit": False, "rotate": False, "effort": effort}
    return small(folder, shape=None, budget=BUDGET, keep_better="both", args=args, **search)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    in_two(process, tmp_path)
    found = {
        name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("shape", "budget")
    }
    for first, second in found.values():
        assert first["world"] == 2
        for each in ("thetas", "plan", "eval_loss", "kl", "goal", "comparison"):
            assert first[each] == second[each], each
    assert found["budget"][0]["comparison"]["kept"] in ("start", "trained")  # the first process has compared for both
    one = parallel("shape", tmp_path / "one", {})
    one.train()
    two = found["shape"][0]
    assert two["plan"] == json.loads(json.dumps(one.model.applied_plan().to_dict()))
    for each in ("loss", "kl"):
        assert two[each] == pytest.approx(logged(one, each), rel=1e-3)
    for each, theta in thetas(one.model).items():
        torch.testing.assert_close(torch.tensor(two["thetas"][each]), theta, rtol=1e-3, atol=1e-4)
    assert two["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-3)
