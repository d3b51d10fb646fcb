"""How gates moved: every logging step, every layer, and on after a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LM_ROW, build, gate
from gate_runs import StopAt, trainer_of

from hawada_peft import HawAdaTrainer, collect_gates
from hawada_peft.training.history import HISTORY_FILE, MOST_ENTRIES, GateHistory, layer_means

SAVED = {"save_strategy": "steps", "save_steps": 2}


def test_every_logging_step_is_in_the_file(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    history = json.loads((tmp_path / HISTORY_FILE).read_text())
    assert [entry["step"] for entry in history["entries"]] == list(range(trainer.state.max_steps + 1))
    assert history["entries"][-1]["phase"] == "hard"
    plan, last = trainer.gated.applied_plan(), history["entries"][-1]
    layers = plan.dense.num_hidden_layers
    assert last["layers"]["keep"] == [float(layer in plan.layers) for layer in range(layers)]
    kept = plan.shape.intermediate_size / plan.dense.intermediate_size
    assert last["ffn"]["keep"] == pytest.approx([kept * there for there in last["layers"]["keep"]], abs=1e-4)
    assert all(
        len(entry[axis]["gate"]) == layers for entry in history["entries"] for axis in ("heads", "ffn", "layers")
    )
    assert "kl" in last["figures"]


def test_a_resumed_training_goes_on_with_its_history(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", args=SAVED)
    whole.train()
    first = trainer_of(tmp_path / "parts", args=SAVED, callbacks=[StopAt(2)])
    first.train()
    second: HawAdaTrainer = trainer_of(tmp_path / "parts", args=SAVED)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    same = [{name: each[name] for name in ("step", "phase", "heads", "ffn")} for each in whole.history.entries]
    found = [{name: each[name] for name in ("step", "phase", "heads", "ffn")} for each in second.history.entries]
    assert found == same


def test_without_a_plan_what_stays_is_what_gates_expect() -> None:
    model = gate(build(LM_ROW), shuffle=False)
    means = layer_means(model, None)
    assert all(value == pytest.approx(1, abs=0.05) for axis in means.values() for value in axis["keep"])
    start = next(iter(collect_gates(model).values())).value().mean().item()
    assert all(value == pytest.approx(start, abs=1e-3) for axis in means.values() for value in axis["gate"])


def test_a_long_history_is_thinned_and_keeps_its_ends() -> None:
    history = GateHistory(gate(build(LM_ROW), gates=("ffn",)))
    for step in range(MOST_ENTRIES + 50):
        history.record(step, "soft", None, {"loss": float("nan"), "kl": 0.5})
    steps = [entry["step"] for entry in history.entries]
    assert len(steps) <= MOST_ENTRIES
    assert (steps[0], steps[-1]) == (0, MOST_ENTRIES + 49)
    assert history.entries[0]["figures"] == {"kl": 0.5}
    history.record(steps[-1], "hard", None, {})
    assert [entry["step"] for entry in history.entries] == steps
    assert history.entries[-1]["phase"] == "hard"
