"""Who may use a device: many together, or one alone who times something. Between processes, by locked files."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO


class Turns:
    """
    A lock of readers and writers on a device. Who waits to be alone keeps newcomers out, so nobody waits for ever.
    A process that dies leaves nothing locked.

    Args:
        path: of the lock's files, the same for all processes on a device; no one is waited for if left out.
        finish: called before a turn ends, to wait for what still runs on the device.
    """

    def __init__(self, path: str | Path | None = None, finish: Callable[[], None] = lambda: None) -> None:
        self.path, self.finish = path, finish

    @contextmanager
    def together(self) -> Iterator[None]:
        """A turn beside others."""
        with ExitStack() as turn:
            with self._file("gate", fcntl.LOCK_EX):
                turn.enter_context(self._file("room", fcntl.LOCK_SH))
            yield
            self.finish()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A turn with nobody else on the device. Not to be asked for within another turn."""
        with self._file("gate", fcntl.LOCK_EX), self._file("room", fcntl.LOCK_EX):
            yield
            self.finish()

    @contextmanager
    def _file(self, name: str, kind: int) -> Iterator[TextIO | None]:
        if self.path is None:
            yield None
            return
        with Path(f"{self.path}.{name}").open("a", encoding="utf-8") as file:
            fcntl.flock(file, kind)
            yield file  # closing it opens the lock
