"""The bench on a real model, run in its tiny mode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import real_model as bench


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(out: Path, *more: str) -> int:
    """One budget, one seed, few steps."""
    return bench.main(["run", "--tiny", "--out", str(out), "--budgets", "1.2", "--seeds", "0", "--steps", "8", *more])


def test_the_most_telling_cells_come_first() -> None:
    options = bench.parser_of().parse_args(["run", "--out", "x"])
    cells = bench.cells_of(options)
    assert len(set(cells)) == len(cells)
    first, rest = cells[:18], cells[18:]
    assert {(cell.contestant, cell.steps) for cell in first} == {("race", 300), ("minitron_depth", 300)}
    assert {(cell.budget, cell.seed) for cell in first} == {(b, s) for b in (1.25, 1.5, 2.0) for s in (0, 1, 2)}
    assert {cell.contestant for cell in rest if cell.steps == 300} == set(bench.PEERS_ORDER)
    assert {cell.contestant for cell in rest if cell.steps == 1000} == set(bench.FIRST)


def test_shards_share_the_cells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parts = []
    for shard in range(3):
        run(tmp_path / "rows", "--dry-run", "--shard", f"{shard}/3")
        parts.append(capsys.readouterr().out.splitlines()[:-1])
    run(tmp_path / "rows", "--dry-run")
    whole = capsys.readouterr().out.splitlines()[:-1]
    assert sorted(line for part in parts for line in part) == sorted(whole)
    assert not (tmp_path / "rows").exists()


def test_a_cell_that_fails_leaves_its_error_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_work: Any) -> Any:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setitem(bench.PEERS, "flap", replace(bench.PEERS["flap"], prepare=broken))
        assert run(tmp_path / "rows", "--contestants", "flap", "no_race") == 1
    rows = {row["contestant"]: row for row in rows_of(tmp_path / "rows")}
    assert set(rows) == {"dense", "flap", "no_race"}
    assert "no such kernel" in rows["flap"]["error"]
    ours = rows["no_race"]
    assert ours["race_steps"] == 0
    assert all(ours[part]["perplexity"] > 1 for part in ("slice", "before", "after"))
    assert run(tmp_path / "rows", "--contestants", "flap", "no_race") == 0  # only what failed is made
    rows = [row["contestant"] for row in rows_of(tmp_path / "rows")]
    assert rows == ["dense", "flap", "no_race", "flap"]
    capsys.readouterr()
    assert bench.main(["summary", str(tmp_path / "rows")]) == 0
    printed = capsys.readouterr().out
    assert "| 8 | 1.2 | no_race | 1 |" in printed
    assert "failed after" in printed
