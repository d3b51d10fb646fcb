"""
Processes of one group, forked from a server that has imported everything once.

What a launcher does is tested by `test_several_processes`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from conftest import free_port

from hawada_peft.processes import run_program

PRELOADED = [
    "pytest",
    "transformers.models.llama.modeling_llama",
    "hawada_peft.distil.recovery",
    "hawada_peft.training.trainer",
]


def in_two(function: Callable[..., object], *arguments: Any) -> None:
    """Call a module's function in two processes, as `torchrun` would start them; nothing may fail."""
    in_several(2, function, *arguments)


def in_several(processes: int, function: Callable[..., object], *arguments: Any) -> None:
    """As `in_two`, in so many."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _member, (processes, free_port(), function, arguments), nprocs=processes, start_method="forkserver"
    )


def _member(rank: int, world: int, port: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    run_program(lambda: function(*arguments))
