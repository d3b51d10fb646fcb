"""Processes of one training: what the first one does for all, an error in one of them, and how the group ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import start_two
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hawada_peft.processes import in_main_process, run_program

PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_several_processes as tests
from hawada_peft.processes import run_program
print(run_program(getattr(tests, sys.argv[2])))
print("threads", tests.group_threads())
"""


def group_threads() -> list[str]:
    """The threads of a process group that run in this process."""
    names = [Path(each, "comm").read_text().strip() for each in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def trains() -> str:
    """A model that holds its group, and is in a cycle, as in a trainer."""
    distributed.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]
    model(torch.ones(1, 2)).sum().backward()
    assert group_threads()
    return "trained"


def asks_the_first() -> str:
    distributed.init_process_group("gloo")
    return in_main_process(lambda: f"from {os.environ['RANK']}")


def first_fails() -> None:
    distributed.init_process_group("gloo")

    def fails() -> None:
        raise KeyError("no such table")

    in_main_process(fails)


def second_fails() -> None:
    distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise RuntimeError("the second cannot")
    distributed.all_reduce(torch.ones(1))


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "process.py"
    script.write_text(PROCESS)
    return start_two(str(script), str(Path(__file__).parent), name)


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


@linux
def test_no_thread_of_a_group_outlives_it(tmp_path: Path) -> None:
    done = run("trains", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("trained") == 2
    assert done.stdout.splitlines().count("threads []") == 2


@linux
def test_what_the_first_process_found_is_known_to_all(tmp_path: Path) -> None:
    done = run("asks_the_first", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("from 0") == 2


@linux
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("first_fails", ["process 0 failed", "no such table"]),
        ("second_fails", ["process 1 failed", "the second cannot"]),
    ],
)
def test_an_error_in_one_process_ends_all_with_its_message(tmp_path: Path, name: str, facts: list[str]) -> None:
    done = run(name, tmp_path)
    assert done.returncode == 1
    assert [fact for fact in facts if fact not in done.stderr] == []
    assert "SIGABRT" not in done.stderr


def test_alone_the_function_is_just_called() -> None:
    assert in_main_process(lambda: 3) == run_program(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
