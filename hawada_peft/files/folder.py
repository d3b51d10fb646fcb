"""A folder that appears complete, or not at all, also when the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

MARK = ".hawada"
"""Ends the name of the hidden folder, beside the target, that an unfinished one is in."""


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """
    An empty folder to fill. Once the block is left it is flushed to the disk and renamed to the name asked for.

    It lies in `.NAME.hawada`, beside the target. If the block raises, nothing is left. If the process is killed, that
    hidden folder is left, and the next call for the same target removes it; a lock keeps it from one still in use.

    Args:
        folder: must not exist yet, or be empty.

    Raises:
        FileExistsError: if the folder holds something, or another process is writing it.
    """
    target = Path(folder).absolute()
    work = target.with_name(f".{target.name}{MARK}")
    occupied = target.exists() and any(target.iterdir())
    if occupied and not work.exists():
        raise _occupied(folder)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"another process is writing {folder}; wait for it, or choose another folder") from None
    inside = work / target.name
    try:
        _remove(inside)  # of a process that was killed
        if occupied:
            raise _occupied(folder)
        inside.mkdir()
        yield inside
        _flush(inside)
        if target.exists():
            target.rmdir()
        inside.rename(target)
        _flush_entry(target.parent)
    finally:
        _remove(inside)
        Path(lock.lock_file).unlink(missing_ok=True)
        with suppress(OSError):  # another process may have come to look
            work.rmdir()
        lock.release()


def check_free(folder: str | os.PathLike[str]) -> None:
    """
    Check that `new_folder` could make this one, before long work.

    Raises:
        FileExistsError: if the folder holds something.
    """
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise _occupied(folder)


def _occupied(folder: str | os.PathLike[str]) -> FileExistsError:
    return FileExistsError(f"{folder} exists and is not empty; choose another folder, or empty it first")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(folder: Path) -> None:
    """Files first, then the folders that name them: a rename must not reach the disk before what it shows."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush_entry(Path(parent, name))
        _flush_entry(Path(parent))


def _flush_entry(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
