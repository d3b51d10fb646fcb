"""One training at a time writes to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import HawAdaError
from ..processes import in_main_process

LOCK_FILE = ".training.lock"
"""In the output folder while a training writes there."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    A folder, made and held by the first process for as long as the block runs.

    Raises:
        HawAdaError: if another training holds it.
    """
    lock = FileLock(folder / LOCK_FILE)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise HawAdaError(
                f"another training writes to {folder}; wait for it, or choose another output_dir"
            ) from None

    in_main_process(acquire)
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
