"""The choice of units and of a recovery's loss, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LM_ROW, build
from unit_choice import OBJECTIVES, Case, kl_of, main, plan_of

from hawada_peft import Shape
from hawada_peft.vanilla.family import locate

CASE = "1:4x2x40"
SMALL = ["--length", "16", "--batch-size", "4", "--calibration", "8", "--gate-steps", "2", "--steps", "4"]


@pytest.fixture
def work(tmp_path: Path) -> list[str]:
    """A teacher and random tokens, as arguments."""
    build(LM_ROW).save_pretrained(tmp_path / "teacher")
    draw = np.random.default_rng(0)
    for name in ("train", "eval"):
        np.save(tmp_path / f"{name}.npy", draw.integers(3, 128, 16 * 24).astype(np.int32))
    return [str(tmp_path / "teacher"), str(tmp_path / "train.npy"), str(tmp_path / "eval.npy")]


def run(monkeypatch: pytest.MonkeyPatch, study: str, work: list[str], out: Path, *contestants: str) -> list[dict]:
    more = ["--case", CASE, "--seeds", "0", "--eval-examples", "4", "--out", str(out), "--contestants", *contestants]
    monkeypatch.setattr("sys.argv", ["unit_choice.py", study, *work, *SMALL, *more])
    main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contestant"] for row in rows] == list(contestants)
    assert [row.get("error") for row in rows] == [None] * len(rows)
    return rows


def test_every_contestant_is_measured_at_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("kl", "fisher", "text", "wanda", "energy", "swaps", "random", "straight_through .02", "closing .01")
    rows = run(monkeypatch, "criteria", work, tmp_path / "rows.jsonl", *names)
    assert [row["steps"] for row in rows] == [2 if " " in name else 0 for name in names]
    for row in rows:
        stages = ("slice", "least squares", "after", "least squares, after")
        assert all(row[stage]["perplexity"] > 1 for stage in stages)
    assert rows[0]["slice"] != rows[6]["slice"]
    run(monkeypatch, "criteria", work, tmp_path / "rows.jsonl", *names)  # what stands there is not made again
    monkeypatch.setattr("sys.argv", ["unit_choice.py", "table", str(tmp_path / "rows.jsonl")])
    capsys.readouterr()
    main()
    assert capsys.readouterr().out.count(CASE) == len(names)


def test_every_objective_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: list[str]) -> None:
    names = [name for name in OBJECTIVES if name != "written"]  # that model writes no 600 windows here
    rows = run(monkeypatch, "objectives", work, tmp_path / "rows.jsonl", *names)
    found = [row["after"]["perplexity"] for row in rows]
    assert len({row["slice"]["perplexity"] for row in rows}) == 1
    assert len(set(found)) == len(names)


def test_a_case_says_which_layers_and_sizes_stay() -> None:
    layout = locate(build(LM_ROW))
    case = Case.of("1+3:4x2x40", layout)
    assert (case.layers, case.shape) == ((0, 2), Shape(4, 2, 40, 2))
    assert Case.of("none:8x4x96", layout).layers == (0, 1, 2, 3)
    assert plan_of(case, layout).shape == Shape(8, 4, 96, 2)  # without scores whole layers alone go


@pytest.mark.parametrize("kind", ["kl", "top", "entropy", "sure"])
def test_losses_are_zero_for_the_teacher_itself_and_above_it_otherwise(kind: str) -> None:
    logits = torch.randn(2, 5, 128)
    teacher, other = logits.log_softmax(-1), torch.randn(2, 5, 128).log_softmax(-1)
    assert float(kl_of(teacher, teacher, kind)) == pytest.approx(0, abs=1e-6)
    assert float(kl_of(other, teacher, kind)) > 0.1
