"""Processes of one training: what the first one does for all, an error in one of them, and how the group ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port

from hawada_peft.processes import in_main_process, run_program

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


def run(name: str) -> subprocess.CompletedProcess[str]:
    """What `torchrun` makes of a function of `group`, in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    script = str(Path(__file__).parent / "group.py")
    return subprocess.run([*launcher, script, name], capture_output=True, text=True, timeout=1800)


@linux
def test_what_the_first_process_found_is_known_to_all_and_no_thread_of_a_group_outlives_it() -> None:
    done = run("trains")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("trained, says 0") == 2
    assert done.stdout.splitlines().count("threads []") == 2


@linux
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("first_fails", ["process 0 failed", "no such table"]),
        ("second_fails", ["process 1 failed", "the second cannot"]),
    ],
)
def test_an_error_in_one_process_ends_all_with_its_message(name: str, facts: list[str]) -> None:
    done = run(name)
    assert done.returncode == 1
    assert [fact for fact in facts if fact not in done.stderr] == []
    assert "SIGABRT" not in done.stderr


def test_alone_the_function_is_just_called() -> None:
    assert in_main_process(lambda: 3) == run_program(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
