"""A folder that appears complete, or not at all, also when the process is killed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
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
        FileExistsError: as `check_free`; or if another process is writing it.
    """
    target = Path(folder).absolute()
    work = target.with_name(f".{target.name}{MARK}")
    inside, lock = work / target.name, FileLock(work / "lock")
    if not work.exists():
        check_free(folder)
    try:
        _lock(work, lock, folder)
        _remove(inside)  # of a process that was killed
        check_free(folder)
        inside.mkdir()
        yield inside
        _flush(inside)
        with _uninterrupted():
            if target.exists():
                target.rmdir()
            inside.rename(target)
        _flush_entry(target.parent)
    finally:
        with _uninterrupted():
            if lock.is_locked:
                _remove(inside)
                Path(lock.lock_file).unlink(missing_ok=True)
                with suppress(OSError):  # another process may have come to look
                    work.rmdir()
                lock.release()


def check_free(folder: str | os.PathLike[str]) -> None:
    """
    Check that `new_folder` could make this one, before long work.

    Raises:
        FileExistsError: if the folder holds something, or is a file or a link.
    """
    path = Path(folder)
    if path.is_symlink():
        raise FileExistsError(f"{folder} is a link, and a new folder cannot take its place; name the folder itself")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or empty it first")


def _lock(work: Path, lock: FileLock, folder: str | os.PathLike[str]) -> None:
    with _uninterrupted():
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FileExistsError(
                f"another process is writing {folder}; wait for it, or choose another folder"
            ) from None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block, which is short, is left. Only the main thread is ever interrupted by it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


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
