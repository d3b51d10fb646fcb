"""What each of two processes does for `test_several_processes`, by the name of a function."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from hawada_peft.processes import in_main_process, run_program


def group_threads() -> list[str]:
    """The threads of a process group that run in this process."""
    names = [Path(each, "comm").read_text().strip() for each in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def trains() -> str:
    """A model that holds its group, and is in a cycle, as in a trainer; and what the first process knows."""
    distributed.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]
    model(torch.ones(1, 2)).sum().backward()
    assert group_threads()
    return in_main_process(lambda: f"trained, says {os.environ['RANK']}")


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


if __name__ == "__main__":
    found = run_program(globals()[sys.argv[1]])
    # One write, so that lines of two processes do not mix.
    os.write(sys.stdout.fileno(), f"{found}\nthreads {group_threads()}\n".encode())
