"""The processes of one training: what only the first one does, and how their group ends."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from .errors import HawAdaError

T = TypeVar("T")

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""What makes one sum of those of all ranks."""


def all_reduced(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place, where `torch.distributed` is in use."""
    if _in_group():
        distributed.all_reduce(tensor)
    return tensor


def of_this_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The sum as it is: for what one rank does while the others wait."""
    return tensor


def rank_of(reduce: Reduce) -> int:
    """Whose data this process has, of what `reduce` sums up."""
    return 0 if reduce is of_this_rank or not _in_group() else distributed.get_rank()


def in_main_process(function: Callable[[], T]) -> T:
    """
    The result of a function that only the first process calls, in every process.

    Every process has to call this. The result travels by pickle between the processes of one training.

    Raises:
        HawAdaError: in the other processes, if the function raises; in the first one, whatever it raises. Nobody waits
            for a result that does not come.
    """
    if not _in_group() or distributed.get_world_size() == 1:
        return function()
    told: list[Any] = [None, None]
    try:
        if distributed.get_rank() == 0:
            told[0] = function()
    finally:
        if (error := sys.exc_info()[1]) is not None:
            told[1] = f"{type(error).__name__}: {error}"
        distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise HawAdaError(f"the first process failed: {told[1]}")
    return cast(T, told[0])


def run_program(main: Callable[[], T]) -> T:
    """
    Call what a program does, as one of the processes of a training, and leave their group afterwards.

    `DistributedDataParallel` keeps its group, whose threads run on when the group is destroyed while a trainer is
    still there; one that drops a tensor while the interpreter shuts down ends the process by SIGABRT. So whatever
    `main` made is collected first. If it raises while other processes take part, the error is printed and the process
    ends at once, without a teardown that could wait for the others; their launcher ends them.

    Args:
        main: the program; it should keep no trainer in a global variable.

    Returns:
        What `main` does.
    """
    try:
        result = main()
    except BaseException as error:
        if not _in_group():
            raise
        told = str(error) if isinstance(error, HawAdaError) else "".join(traceback.format_exception(error))
        print(f"process {distributed.get_rank()} failed: {told}", file=sys.stderr, flush=True)
        os._exit(1)
    gc.collect()  # trainers are in cycles
    if _in_group():
        distributed.destroy_process_group()
    return result


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
