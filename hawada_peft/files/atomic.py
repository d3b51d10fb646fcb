"""Files that appear complete, or not at all, also when the process is killed or the disk is full."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """
    Write a text file (UTF-8) beside its place, flush it to the disk, and rename it over what is there.

    Args:
        path: the file; its folder must exist. A link is followed, and stays one.
        text: all of it.

    Raises:
        OSError: if it cannot be written; what was there before is still there, and nothing is left beside it.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.is_file():
            shutil.copymode(target, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)  # Ctrl-C too leaves nothing
