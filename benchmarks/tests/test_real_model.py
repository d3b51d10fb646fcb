"""The bench on a real model, run in its tiny mode."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import real_model as bench
import real_work
import torch
from real_cells import OURS, RIVALS, Cell, groups_of, unmade
from real_setups import SETUPS


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(out: Path, *more: str) -> int:
    """One budget, one seed, few steps."""
    return bench.main(["run", "--tiny", "--out", str(out), "--budgets", "1.2", "--seeds", "0", "--steps", "8", *more])


def test_the_most_telling_cells_come_first() -> None:
    groups = list(groups_of([1.25, 1.5], [0, 1], [300, 1000]))
    cells = [cell for group in groups for cell in group.cells]
    peers = [cell for cell in dict.fromkeys(cells) if cell.contestant not in OURS]
    assert cells[: len(RIVALS) * 4] == [cell for cell in peers if (cell.seed, cell.steps) == (0, 300)]
    ours = cells[len(RIVALS) * 4 :][:4]
    assert {(cell.contestant, cell.steps) for cell in ours} == {("race", 300)}
    assert {(cell.budget, cell.seed) for cell in ours} == {(b, s) for b in (1.25, 1.5) for s in (0, 1)}
    names = {*OURS, *RIVALS, *(f"{name}+muon" for name in RIVALS)}
    assert {cell.contestant for cell in cells} == names - {"race_long", "race_prepared", "race_tenth", "searched"}
    assert {cell.contestant for cell in cells if cell.steps == 1000} == {"race", RIVALS[0], f"{RIVALS[0]}+muon"}
    first, second, *rest = groups_of([1.5], [0], [300], ("searched", "race"))
    assert (first.contestants, second.contestants) == (("searched",), ("race",))
    assert rest[0].contestants[0] == RIVALS[0]


@pytest.mark.parametrize("name", SETUPS)
def test_setups_say_how_they_are_timed(name: str) -> None:
    setup = replace(SETUPS[name], device="cuda")
    regime = setup.conditions
    assert regime.device == ("cpu" if name.endswith("cpu") else "cuda")
    assert setup.budget(1.5).regime(generates="vit" not in name, dtype=torch.float32, device="cpu") == regime
    assert SETUPS[name].conditions.device == "cpu"


def test_what_is_made_is_left_out() -> None:
    groups = list(groups_of([1.25], [0], [300]))
    assert len(set(groups)) < len(groups)
    assert unmade(groups, ()) == list(dict.fromkeys(groups))
    done = groups[0].cells
    assert unmade(groups, done[:1])[0] == groups[0]
    assert unmade(groups, done) == list(dict.fromkeys(groups))[1:]


def test_jobs_print_the_command_lines_of_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "known.jsonl"
    common = ["jobs", "--tiny", "--out", str(tmp_path / "rows"), "--known", str(known)]
    bench.main([*common, "--steps", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert all("{until}" in line and "{turns}" in line for line in lines)
    parts = []
    for shard in range(3):
        bench.main([*common, "--steps", "8", "--shard", f"{shard}/3"])
        parts += capsys.readouterr().out.splitlines()
    assert sorted(parts) == sorted(lines)
    words = shlex.split(lines[0].replace("{until}", "1").replace("{turns}", "x"))
    first = bench.chosen(bench.parser_of().parse_args(words[2:]))[0]
    known.write_text("".join(json.dumps(vars(cell)) + "\n" for cell in first.cells))
    bench.main([*common, "--steps", "8"])
    assert capsys.readouterr().out.splitlines() == lines[1:]


def test_a_cell_that_fails_leaves_its_error_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_work: Any) -> Any:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setitem(real_work.PEERS, "flap", replace(real_work.PEERS["flap"], prepare=broken))
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


def test_what_was_timed_is_what_is_measured_and_a_race_times_nothing_itself(tmp_path: Path) -> None:
    out = tmp_path / "rows"
    assert (
        run(out, "--contestants", "searched", "minitron_depth", "minitron_depth+muon", "--turns", str(out) + ".t") == 0
    )
    race, adamw, muon = rows_of(out)[1:]
    ledger = [row for row in rows_of(tmp_path / "timings.jsonl") if "model" in row]
    timed = {row["parameters"]: row for row in ledger}
    assert len(timed) == len(ledger)  # no model twice, be it built with random weights or cut
    for row in (race, adamw, muon):
        assert row["met"]
        assert row["speedup"] == timed[row["parameters"]]["dense_ms"] / timed[row["parameters"]]["ms"]
    assert adamw["before"] == muon["before"]
    assert adamw["after"] != muon["after"]
    assert (adamw["optimizer"], muon["optimizer"]) == ("adamw", "muon")


def test_what_was_timed_before_is_not_timed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "rows", tmp_path / "timings.jsonl"
    asked = ["--tiny", "--out", str(out), "--budgets", "1.2", "--seeds", "0", "1", "--steps", "8"]
    names = ["--contestants", "flap+muon", "flap", "no_race"]
    bench.main(["jobs", *asked, *names, "--only-time"])
    lines = [shlex.split(line.partition(" --until")[0]) for line in capsys.readouterr().out.splitlines()]
    assert [words[words.index("--contestants") + 1] for words in lines] == ["flap", "race"]
    for words in lines:
        assert bench.main(words[2:]) == 0
    before = file.read_text()
    assert '"peer": "flap"' in before
    run(out, *names)
    assert file.read_text() == before
    assert bench.main(["run", *asked, *names, "--known", str(file), "--until", "1"]) == 0  # a row of a peer is no cell


def test_nothing_is_begun_for_which_there_is_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "rows", "--contestants", "no_race", "--until", "1") == 0
    assert [row["contestant"] for row in rows_of(tmp_path / "rows")] == ["dense"]
    assert "no time left" in capsys.readouterr().out
    assert Cell.of(rows_of(tmp_path / "rows")[0]) in bench.made(
        bench.parser_of().parse_args(["run", "--out", str(tmp_path / "rows")])
    )
