"""The sections of a recipe that are no class elsewhere: data, search, and what is refitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import HawAdaError
from ..latency.clock import Clock
from ..latency.effort import Effort
from ..latency.external import CommandLine, ExternalClock
from ..latency.toy import ToyClock

CLOCKS: dict[str, Callable[[], Clock]] = {"real": Clock, "toy": ToyClock}
"""What a recipe may name as the clock: by a toy's nothing depends on the machine."""


@dataclass(frozen=True)
class DataSource:
    """
    Where the examples are. Labels are not needed: the dense model is the teacher.

    Args:
        files (`str` or `list[str]`, *optional*): `.txt`, `.md`, `.jsonl` (a `text` or chat `messages` in every line),
            `.npy` or `.safetensors` files, or a folder of images or of `.wav` files.
        dataset (`str`, *optional*): instead of files, the name or folder of a dataset that the `datasets` library
            loads.
        config (`str`, *optional*): which one of the dataset's.
        split (`str`): of the dataset, as `"train[:10%]"`.
        column (`str`, *optional*): of the texts or images; `"text"` or `"image"` by the kind of model if left out.
        seq_len (`int`): tokens per window, for text and for streams of tokens.
        held_out (`int`): examples that are never trained on, but evaluated; drawn at random, but always the same.
        max_examples (`int`, *optional*): examples at most.

    Raises:
        HawAdaError: with every problem.
    """

    files: str | list[str] | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    column: str | None = None
    seq_len: int = 1024
    held_out: int = 64
    max_examples: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if (self.files is None) == (self.dataset is None):
            problems.append("give one of `files` and `dataset`")
        if self.files is not None and not self.paths():
            problems.append("files must name at least one")
        if self.files is not None and (self.config is not None or self.column is not None):
            problems.append("config and column are of a `dataset`, not of files")
        problems += [
            f"{name} must be a whole number of at least {least}, got {value!r}"
            for name, value, least in (
                ("seq_len", self.seq_len, 1),
                ("held_out", self.held_out, 1),
                ("max_examples", self.held_out + 1 if self.max_examples is None else self.max_examples, 2),
            )
            if not isinstance(value, int) or isinstance(value, bool) or value < least
        ]
        if problems:
            raise HawAdaError("\n".join(problems))

    def paths(self) -> list[str]:
        """The files, as a list."""
        return [self.files] if isinstance(self.files, str) else list(self.files or [])


@dataclass(frozen=True)
class SearchStep:
    """
    How a budget becomes a shape.

    Args:
        effort (`dict`, *optional*): fields of `Effort`.
        quick (`bool`): what `effort` leaves out is as in `Effort.quick`.
        clock (`str`): one of `CLOCKS`.
        clock_command (`str`, *optional*): a command line that times instead, as in `ExternalClock`.
        hidden_sizes (`list[int]`, *optional*): as in `find_plan`.
        rotate (`bool`, *optional*): as in `find_plan`: whether hidden sizes are searched, cut in a basis.
        refit (`bool`, *optional*): as in `find_plan`.

    Raises:
        HawAdaError: if there is no such clock, or the command line is none.
    """

    effort: dict[str, Any] | None = None
    quick: bool = False
    clock: str = "real"
    clock_command: str | None = None
    hidden_sizes: list[int] | None = None
    rotate: bool | None = None
    refit: bool | None = None

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise HawAdaError(f"clock must be one of {list(CLOCKS)}, got {self.clock!r}")
        if self.clock_command is not None:
            if self.clock != "real":
                raise HawAdaError(f"give either clock or clock_command, got clock={self.clock!r} and a command")
            CommandLine(self.clock_command)

    def made(self) -> Effort:
        """
        As an `Effort`.

        Raises:
            HawAdaError: with every impossible number.
        """
        make = Effort.quick if self.quick else Effort
        command = self.clock_command
        clock = CLOCKS[self.clock]() if command is None else ExternalClock(command)
        return make(clock=clock, **(self.effort or {}))


@dataclass(frozen=True)
class ReconstructionStep:
    """
    What the slim model's output projections are refitted on.

    Args:
        examples (`int`): of the training data.
        batch_size (`int`): examples per batch.

    Raises:
        HawAdaError: with every problem.
    """

    examples: int = 64
    batch_size: int = 8

    def __post_init__(self) -> None:
        wrong = {
            name: value
            for name, value, least in (("examples", self.examples, 2), ("batch_size", self.batch_size, 1))
            if not isinstance(value, int) or isinstance(value, bool) or value < least
        }
        if wrong:
            raise HawAdaError(f"examples must be at least 2, batch_size at least 1, both whole numbers, got {wrong}")
