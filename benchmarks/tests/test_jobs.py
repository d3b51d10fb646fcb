"""Command lines spread over devices, and the turns that they take there."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
from turns import Turns


def line(code: str, *arguments: str) -> str:
    """A command line of some Python."""
    return f'python -c "{code}" {" ".join(arguments)}'


def test_jobs_run_in_their_order_on_all_devices(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[2])"
    lines = [line(code, f"job{number}", "{device}") for number in range(6)]
    with (tmp_path / "log").open("w") as log:
        done = jobs.run_jobs(lines, ["3", "7"], 2, time.time() + 60, jobs.Log(log))
    assert sorted(each.number for each in done) == list(range(6))
    assert {each.status for each in done} == {0}
    assert {each.device for each in done} == {"3", "7"}
    printed = (tmp_path / "log").read_text()
    for each in done:
        assert f"[{each.number}] job{each.number} {each.device} {each.device}" in printed
    with (tmp_path / "log").open("w") as log:
        done = jobs.run_jobs(lines[:3], ["3"], 1, time.time() + 60, jobs.Log(log))
    assert [each.number for each in done] == [0, 1, 2]


def test_nothing_is_started_when_the_time_is_up_and_what_still_runs_is_stopped(tmp_path: Path) -> None:
    endless = line("import time, sys; print(sys.argv[1], flush=True); time.sleep(600)", "{until}")
    until = time.time()
    with (tmp_path / "log").open("w") as log:
        assert jobs.run_jobs([endless], ["0"], 1, until, jobs.Log(log)) == []
        until = time.time() + 0.2
        done = jobs.run_jobs([endless, endless], ["0"], 1, until, jobs.Log(log), grace=0.0)
    assert [(each.number, each.status) for each in done] == [(0, -9)]


def test_the_exit_status_tells_failures_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, log = tmp_path / "jobs.txt", tmp_path / "log"
    run = ["--log", str(log), "--devices", "0", "--per-device", "1", "--seconds"]
    file.write_text(f"# first\n{line('pass')}\n\n{line('raise SystemExit(2)')}\n")
    assert jobs.main([str(file), *run, "60"]) == 1
    assert "2 of 2 jobs ran, 1 of them failed" in capsys.readouterr().out
    assert jobs.main([str(file), *run, "0"]) == 3
    file.write_text(line("pass"))
    assert jobs.main([str(file), *run, "60"]) == 0


def held(path: Path, kind: int) -> bool:
    """Whether another process could not have a lock of a kind."""
    code = f"import fcntl; fcntl.flock(open({str(path)!r}, 'a'), {kind | fcntl.LOCK_NB})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def test_many_take_turns_together_and_one_alone(tmp_path: Path) -> None:
    ended: list[str] = []
    turns = Turns(tmp_path / "turns", lambda: ended.append("ended"))
    room, gate = tmp_path / "turns.room", tmp_path / "turns.gate"
    with turns.together(), turns.together():
        assert not held(room, fcntl.LOCK_SH)
        assert held(room, fcntl.LOCK_EX)
        assert not held(gate, fcntl.LOCK_EX)
    assert ended == ["ended", "ended"]
    with turns.alone():
        assert held(room, fcntl.LOCK_SH)
        assert held(gate, fcntl.LOCK_EX)
    assert not held(room, fcntl.LOCK_EX)
    with pytest.raises(KeyError), turns.alone():
        raise KeyError
    assert not held(gate, fcntl.LOCK_EX)


def test_without_a_path_nobody_waits() -> None:
    with Turns().alone(), Turns().alone(), Turns().together():
        pass
