"""The demo, with trainings of a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from toys import once
from transformers import AutoTokenizer

from hawada_peft import Plan
from hawada_peft.demo import pipeline
from hawada_peft.demo.data import VOCABULARY, WINDOW, held_out_topics, load_digits, load_topics, stack
from hawada_peft.demo.measure import accuracy, agreement, one_thread, perplexity
from hawada_peft.demo.pipeline import run_demo
from hawada_peft.demo.table import Row, render
from hawada_peft.demo.tasks import TASKS, Schedule, Work
from hawada_peft.latency.budget import LatencyBudget

ONCE = once(depth=2, candidates=1, search_rounds=2)
TINY = Work(
    teacher=Schedule(3, 4, 1e-3),
    gates=Schedule(4, 4, 0.1),
    calibration=2,
    evaluation=1,
    search=ONCE,
    final=ONCE,
)
# A limit that does not depend on how fast this machine is just now.
BUDGETS = {
    "digits": LatencyBudget(max_parameters=200_000, batch_size=2, mode="forward"),
    "topics": LatencyBudget(max_parameters=600_000, batch_size=2, seq_len=WINDOW, mode="forward"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A run from end to end; its second process is a real one."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        tasks = {name: replace(task, quick=TINY, budget=BUDGETS[name]) for name, task in TASKS.items()}
        patch.setattr(pipeline, "TASKS", tasks)
        return folder, run_demo(folder, quick=True)


def test_three_forms_of_every_model(demo: tuple[Path, list[Row]]) -> None:
    assert [(row.task, row.form) for row in demo[1]] == [
        (name, form) for name in TASKS for form in ("dense", "masked", "slim")
    ]


def test_slim_folders_have_a_card_with_what_the_table_says(demo: tuple[Path, list[Row]]) -> None:
    for name in TASKS:
        report = json.loads((demo[0] / name / "slim" / "hawada_report.json").read_text())
        dense, _, slim = (row for row in demo[1] if row.task == name)
        assert (report["dense"]["parameters"], report["model"]["parameters"]) == (dense.parameters, slim.parameters)
        assert (report["latency"]["dense_ms"], report["latency"]["slim_ms"]) == (dense.latency_ms, slim.latency_ms)
        assert [(q["dense"], q["slim"]) for q in report["quality"]] == [(dense.quality, slim.quality)]
        assert report["base"]["name"] == "teacher"
        shape = Plan.from_dict(report["plan"]).shape.to_dict()
        assert shape in [point["shape"] for point in report["search"]["points"]]
        history = json.loads((demo[0] / name / "gate_history.json").read_text())
        assert len(history["entries"]) > 3
        assert (demo[0] / name / "slim" / "README.md").exists()


def test_slim_model_has_the_shape_and_computes_what_the_masked_one_did(demo: tuple[Path, list[Row]]) -> None:
    for name, budget in BUDGETS.items():
        dense, masked, slim = (row for row in demo[1] if row.task == name)
        assert budget.max_parameters is not None
        assert slim.parameters <= budget.max_parameters
        assert (masked.layers, masked.heads, masked.kv_heads, masked.ffn) == (
            slim.layers,
            slim.heads,
            slim.kv_heads,
            slim.ffn,
        )
        assert slim.parameters < masked.parameters == dense.parameters
        assert slim.difference is not None
        assert slim.difference < 1e-4
        assert slim.quality == pytest.approx(masked.quality, rel=1e-2)
        assert dense.agreement == 100


def test_folders_load_with_the_auto_classes(demo: tuple[Path, list[Row]]) -> None:
    for task in TASKS.values():
        slim = next(row for row in demo[1] if (row.task, row.form) == (task.name, "slim"))
        assert task.auto_class.from_pretrained(demo[0] / task.name / "slim").num_parameters() == slim.parameters
    tokenizers = [AutoTokenizer.from_pretrained(demo[0] / "topics" / folder) for folder in ("teacher", "slim")]
    assert tokenizers[0](topics["if"])["input_ids"] == tokenizers[1](topics["if"])["input_ids"]


def test_table_is_aligned_and_fits_a_terminal(demo: tuple[Path, list[Row]]) -> None:
    lines = render(demo[1]).splitlines()
    assert max(map(len, lines)) <= 100
    body = [line for line in lines if line.split(" ")[0] in ("dense", "masked", "slim") and "%" in line]
    assert len(body) == len(demo[1])
    assert len({line.index("%") for line in body}) == 1


def test_speedup_is_dense_over_slim(demo: tuple[Path, list[Row]]) -> None:
    dense, masked, slim = demo[1][:3]
    text = render([replace(dense, latency_ms=30.0), masked, replace(slim, latency_ms=20.0)])
    assert "30.0 ms    1.00x" in text
    assert "20.0 ms    1.50x" in text


def test_own_folders_are_replaced_and_others_refused(tmp_path: Path) -> None:
    for name in TASKS:
        (tmp_path / name).mkdir()
        (tmp_path / name / pipeline.MARKER).touch()
    pipeline.clear(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "digits").mkdir()
    with pytest.raises(FileExistsError, match="digits is not from an earlier demo"):
        run_demo(tmp_path)
    assert (tmp_path / "digits").exists()


def test_topics_are_windows_of_whole_topics() -> None:
    data = load_topics()
    assert {tuple(window["input_ids"].shape) for window in data.train + data.held_out} == {(WINDOW,)}
    assert len(data.processor) == VOCABULARY
    assert data.processor.decode(data.processor(topics["if"])["input_ids"]) == topics["if"]
    held_out = [topics[name] for name in held_out_topics(topics)]
    read = data.processor.decode(stack(data.held_out)["input_ids"].flatten())
    assert data.processor.eos_token.join(held_out).startswith(read.removesuffix(data.processor.eos_token))


def test_held_out_topics_are_not_in_the_training_text() -> None:
    held_out = held_out_topics(topics)
    trained = "\n".join(text for name, text in topics.items() if name not in held_out)
    lines = [line.strip() for name in held_out for line in topics[name].splitlines() if len(line) > 40]
    assert len(lines) > 100
    assert not [line for line in lines if line in trained]


def test_digits_are_split_by_class() -> None:
    data = load_digits()
    assert (len(data.train), len(data.held_out)) == (1400, 397)
    assert data.train[0]["pixel_values"].shape == (1, 8, 8)
    batch = stack(data.held_out)
    assert (batch["pixel_values"].min(), batch["pixel_values"].max()) == (-1, 1)
    assert batch["labels"].bincount().min() >= 34


def test_measures() -> None:
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert perplexity(torch.zeros(2, 3, 7), labels) == pytest.approx(7)
    logits = torch.eye(3)
    assert accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3)
    assert agreement(logits, logits.flip(0)) == pytest.approx(100 / 3)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
