"""The frontier bench: sizes by latency, quality before and after recovery, and the page, on tiny models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, assert_same_state, build, state_of
from torch import nn
from toys import once

from hawada_peft import Plan, Shape, slim
from hawada_peft.search.timed import measure_table
from hawada_peft.vanilla.family import locate

pytest.importorskip("matplotlib")

from frontier import main
from frontier_bench.entries import entries_of
from frontier_bench.page import comparison, out_of_reach, plain_commands
from frontier_bench.shapes import parse_regime
from peers.peer import Peer, Prepared, Work
from recipes import Recipe, gated
from rows import read_rows
from sizing import SHORT, Fit, Timed, fit_amount, sizes_of
from work import Bench, whole

SMALL = ["--length", "16", "--batch-size", "4", "--calibration", "8", "--steps", "8"]


def narrow(work: Work) -> Prepared:
    """The first channels of every FFN stay."""
    assert work.batches[0]["labels"].shape[0] == len(next(work.stream)["labels"])

    def cut(model: Any, amount: float) -> Any:
        dense = locate(model).dense
        kept = tuple(range(max(8, round(dense.intermediate_size * (1 - amount)))))
        layers = dense.num_hidden_layers
        return slim(model, Plan(dense, tuple(range(layers)), (tuple(range(dense.num_attention_heads)),) * layers,
                                (kept,) * layers))  # fmt: skip

    return Prepared(cut, steps=1)


BOTH = frozenset({"text", "image"})
PEERS = {
    "narrow": Peer("Narrow", "this test", BOTH, narrow, adapted="Nothing."),
    "blind": Peer("Blind", "this test", frozenset(), narrow),
}


def work_of(row: Row, folder: Path) -> list[str]:
    """A teacher and random data of its kind, as arguments."""
    build(row).save_pretrained(folder / "teacher")
    draw = np.random.default_rng(0)
    if row is VISION_ROW:
        for name in ("data", "eval"):
            pixels = draw.standard_normal((24, 3, 16, 16)).astype(np.float32)
            np.savez(folder / f"{name}.npz", pixel_values=pixels, labels=draw.integers(0, 3, 24))
        return ["--teacher", str(folder / "teacher"), "--data", str(folder / "data.npz")]
    for name in ("data", "eval"):
        np.save(folder / f"{name}.npy", draw.integers(0, 128, 16 * 24).astype(np.uint16))
    return ["--teacher", str(folder / "teacher"), "--data", str(folder / "data.npy")]


def coarse_table(row: Row, regime: str, path: Path) -> Path:
    """A latency table of few sizes, by the toy clock."""
    measure_table(build(row), parse_regime(regime, "cpu"), effort=once(whole_shapes=2)).save(path)
    return path


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "image"])
def test_all_stages_give_complete_rows_once_and_one_section(row: Row, tmp_path: Path) -> None:
    vision = row is VISION_ROW
    work = work_of(row, tmp_path)
    page, suffix = tmp_path / "docs" / "page.md", "npz" if vision else "npy"
    page.parent.mkdir()
    page.write_text("# Before\n", encoding="utf-8")
    command = ["all", *work, *SMALL, "--regime", "forward:1:float32:eager" if vision else "prefill:1x8:float32:eager"]
    command += ["--eval", str(tmp_path / f"eval.{suffix}"), "--eval-length", "16", "--budgets", "1.02", "--seeds", "0"]
    command += [
        "--timing-seconds",
        "0",
        "--timing-rounds",
        "2",
        "--clock",
        "toy",
        "--threads",
        "1",
        "--folder",
        str(tmp_path / "rows"),
        "--page",
        str(page),
    ]
    command += ["--pictures", str(tmp_path / "docs" / "pictures"), "--name", "tiny", "--title", "A tiny one"]
    names = ["hawada_one_shot", "hawada_joint", "narrow", "blind"] if vision else ["hawada_trained", "narrow"]
    command += ["--table", str(coarse_table(row, command[command.index("--regime") + 1], tmp_path / "table.json"))]
    main([*command, "--contestants", *names], PEERS)
    shapes, quality = (read_rows(tmp_path / "rows" / f"{stage}.jsonl") for stage in ("shapes", "quality"))
    assert [row["contestant"] for row in shapes] == ["hawada", "narrow"]
    assert [row["contestant"] for row in quality] == ["dense", *(name for name in names if name != "blind")]
    for found in shapes:
        assert {"amount", "shape"} & set(found)
        assert found["speedup"] == pytest.approx(found["dense_ms"] / found["ms"])
        assert found["met"] == (found["speedup"] >= SHORT * found["budget"])
        assert len(found["sizes"]) == 4
        assert found["date"]
        assert found["regime"].endswith("cpu")
    for found in quality:
        assert found["before"].keys() == found["after"].keys()
        assert found["contestant"] == "dense" or found["as_timed"]
    assert all(found["before"] != found["after"] for found in quality[1:]) or vision
    used = {found["contestant"]: found["steps"] for found in quality[1:]}
    assert used["narrow"] == 1
    assert all(used[name] == (0 if "one" in name else 2) for name in used if "hawada" in name)

    text = page.read_text(encoding="utf-8")
    main([*command, "--contestants", *names, "--seeds", "0"], PEERS)
    assert page.read_text(encoding="utf-8") == text, "nothing is added, and the section is replaced"
    assert text.count("A tiny one") == 1
    assert text.startswith("# Before")
    assert str(tmp_path) not in text, "commands without folders"
    for stage in ("before", "after"):
        picture = tmp_path / "docs" / "pictures" / f"tiny-{stage}.png"
        assert 0 < picture.stat().st_size < 80_000
        assert f"](pictures/tiny-{stage}.png)" in text
    main([*command, "--contestants", "narrow", "--seeds", "0", "1"], PEERS)
    more = [read_rows(tmp_path / "rows" / f"{stage}.jsonl") for stage in ("shapes", "quality")]
    assert [(row["contestant"], row["seed"]) for row in more[0][len(shapes) :]] == [("narrow", 1)]
    assert [(row["contestant"], row["seed"]) for row in more[1][len(quality) :]] == [("narrow", 1)]


class Sized(nn.Module):
    """Stands for a cut model whose latency is known."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


def pretend(model: Any) -> Timed:
    """300 units take half the time, the rest of the model the other."""
    return Timed(0.5 + 0.5 * len(model.weight) / 300, 1.0, 0.0, len(model.weight), [])


@pytest.mark.parametrize("step", [1, 8, 60])
@pytest.mark.parametrize("speedup", [1.1, 1.5, 1.9])
def test_the_smallest_amount_that_meets_the_budget_is_found(speedup: float, step: int) -> None:
    def cut(amount: float) -> Any:
        return Sized(step * round((1 - amount) * 300 / step))

    fit = fit_amount(cut, pretend, speedup, timings=30)
    assert fit.met
    assert fit.timed.speedup >= SHORT * speedup
    larger = pretend(cut(fit.amount - step / 300))
    assert fit.timed.speedup <= 1.02 * speedup or larger.speedup < SHORT * speedup
    assert fit.timings <= 6
    again = fit_amount(cut, pretend, speedup, start=fit)
    assert again == Fit(fit.amount, fit.timed, True, 1)


def test_a_budget_out_of_reach_gives_the_fastest_and_says_so() -> None:
    fit = fit_amount(lambda amount: Sized(round((1 - amount) * 300)), pretend, 3.0)  # type: ignore[arg-type, return-value]
    assert (fit.amount, fit.timed.speedup, fit.met) == (1.0, 2.0, False)


def test_sizes_are_read_from_any_pruned_model() -> None:
    dense = build(LM_ROW)
    cut = copy.deepcopy(dense)
    del cut.model.layers[-1]
    cut.model.layers[0].mlp.down_proj = nn.Linear(40, 64)
    assert sizes_of(cut, dense) == [(8, 40), (8, 96), (8, 96), None]


def test_a_pool_gives_the_same_batches_by_seed(tmp_path: Path) -> None:
    options = work_of(VISION_ROW, tmp_path)
    bench = Bench(options[1], options[3], batch_size=4)
    one, two = (bench.pool(3).__getitems__([0, 5, 7, 9]) for _ in range(2))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert "labels" not in one
    assert whole(one) is one
    first, second = (next(bench.stream(1)) for _ in range(2))
    assert torch.equal(first["labels"], second["labels"])


def test_recovery_is_the_same_for_the_same_seed_and_leaves_the_teacher(tmp_path: Path) -> None:
    options = work_of(LM_ROW, tmp_path)
    bench = Bench(options[1], options[3], length=16, batch_size=4)
    before = state_of(bench.model)
    students = [bench.load() for _ in range(3)]
    for student, seed in zip(students, (0, 0, 1), strict=True):
        nn.init.zeros_(student.model.layers[0].mlp.down_proj.weight)
        bench.distil(student, 2, None, seed)
    assert_same_state(state_of(bench.model), before)
    states = [state_of(student) for student in students]
    assert_same_state(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in before)


@pytest.mark.parametrize("hidden", [None, 48])
def test_a_basis_is_found_only_for_what_cuts_the_stream(tmp_path: Path, hidden: int | None) -> None:
    options = work_of(LM_ROW, tmp_path)
    bench = Bench(options[1], options[3], length=16, batch_size=4)
    shape = Shape(num_hidden_layers=3, hidden_size=hidden)
    model, _ = gated(bench, Recipe(rotate=True), shape, bench.examples(16, 0), 0)
    assert ("hidden" in model.peft_config["default"].gates) == (hidden is not None)
    assert locate(model.merge_and_unload()).hidden_size == (hidden or 64)


def test_the_comparison_counts_only_models_that_meet_the_budget() -> None:
    sizes = {"budget": 2.0, "speedup": 2.0, "met": True}
    shapes = [{"contestant": "hawada", "seed": 0, **sizes}, {"contestant": "narrow", "seed": 0, **sizes}]
    shapes += [{"contestant": "blind", "seed": 0, **sizes, "met": False}]
    found = {"hawada_one_shot": 12.0, "narrow": 13.5, "blind": 11.0}
    quality = [
        {"contestant": name, "budget": 2.0, "seed": 0, "parameters": 1, "before": {"perplexity": value}}
        for name, value in found.items()
    ]
    text = comparison(entries_of(shapes, json.loads(json.dumps(quality)), PEERS), "text")
    assert text == "- 2x, before recovery: hawada one-shot 12.00, Narrow 13.50: ahead by 1.50, one seed."


def test_commands_that_divide_one_work_are_one() -> None:
    commands = [
        f"python /a/benchmarks/frontier.py quality --data /b/x.npz --seeds {seeds} --shard {i}/2 --out o{i}"
        for i, seeds in enumerate(("0", "1 2"))
    ]
    assert plain_commands(commands) == ["python benchmarks/frontier.py quality --data x.npz --seeds 0 1 2"]
    assert len(plain_commands([commands[0], commands[0].replace("x.npz", "y.npz")])) == 2


def test_a_summary_tells_what_was_not_run_from_what_is_out_of_reach(tmp_path: Path) -> None:
    def shape(name: str, met: bool) -> dict[str, Any]:
        return {"contestant": name, "budget": 2.0, "seed": 0, "met": met, "speedup": 2.0 if met else 1.4}

    def value(name: str, budget: float | None, found: float) -> dict[str, Any]:
        both = {stage: {"perplexity": found} for stage in ("before", "after")}
        return {"contestant": name, "budget": budget, "seed": 0, "kind": "text", "parameters": 1} | both

    rows = {
        "s1": [shape("hawada", True), shape("narrow", False)],
        "q1": [value("dense", None, 9.0), value("hawada_one_shot", 2.0, 12.5)],
        "s2": [shape("hawada", True), shape("narrow", True)],
        "q2": [value("dense", None, 8.0), value("hawada_one_shot", 2.0, 13.5), value("narrow", 2.0, 11.5)],
    }
    for name, found in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    files = {name: str(tmp_path / name) for name in rows}
    page = tmp_path / "page.md"
    page.write_text("# Kept\n", encoding="utf-8")
    command = [
        "summary",
        "--shapes",
        files["s1"],
        files["s2"],
        "--quality",
        files["q1"],
        files["q2"],
        "--words",
        "A",
        "B",
    ]
    for _ in range(2):
        main([*command, "--picture", str(tmp_path / "p.png"), "--page", str(page)], PEERS)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Kept")
    assert text.count("begin frontier") == 1
    assert "| hawada one-shot | **12.50** | **12.50** | 13.50 | 13.50 |" in text
    assert "| out of reach | out of reach | **11.50** | **11.50** |" in text
    assert "blind" not in text  # neither tried nor measured
    shapes = rows["s1"]
    assert "(1.40x)" in out_of_reach(shapes, {"hawada_one_shot"}, 2.0, PEERS)
    assert out_of_reach(shapes, {"narrow"}, 2.0, PEERS) == ""
