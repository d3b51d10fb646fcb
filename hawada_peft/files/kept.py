"""Results of long work on disk as they come, so that work which was interrupted goes on where it was."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .atomic import write_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESULTS = "results.jsonl"
"""One result in a line; a line that a kill has cut off does not count."""


class Kept:
    """
    What a piece of work has found so far. Begun anew with the same key it finds that, and makes the rest.

    A name may be asked for several times: the n-th result is then given to who asks for the n-th time, so the work
    must ask in the same order each time.

    Args:
        folder (`str` or `Path`, *optional*): where; nothing is kept if left out.
        key (`Mapping`, *optional*): all that the results depend on, for JSON. Those of another key are left alone.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, key: Mapping[str, Any] | None = None) -> None:
        self.folder: Path | None = None
        self._found: dict[str, Any] = {}
        self._asked: Counter[str] = Counter()
        self._before = ""
        if folder is not None:
            self.folder = Path(folder) / f"work-{digest_of_key(key or {})}"
            self.folder.mkdir(parents=True, exist_ok=True)
            self._read(self.folder / RESULTS)

    @property
    def count(self) -> int:
        """Results that are there, besides tensors."""
        return len(self._found)

    def under(self, name: str) -> Kept:
        """The same, for a part of the work whose names others have as well: they go with the part's name before."""
        part = copy.copy(self)
        part._before = f"{self._before}{name} " if name else self._before
        return part

    def value(self, name: str, make: Callable[[], T]) -> T:
        """
        A result that JSON holds: the one that was kept, or what is made now.

        Args:
            name: of the result.
            make: makes it.
        """
        if self.folder is None:
            return make()
        name = self._next(name)
        if name not in self._found:
            self._found[name] = result = make()
            with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, result]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return self._found[name]

    def tensors(self, name: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        A result of tensors by names, on the CPU.

        Args:
            name: of the result.
            make: makes it.
        """
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{self._next(name)}.safetensors"
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):
            made = {key: tensor.detach().cpu().contiguous() for key, tensor in make().items()}
        beside = path.with_suffix(".part")
        save_file(made, beside)
        beside.replace(path)
        return made

    def _next(self, name: str) -> str:
        name = self._before + name
        self._asked[name] += 1
        count = self._asked[name]
        return name if count == 1 else f"{name} {count}"

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        whole = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                name, result = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            self._found[name] = result
            whole.append(line + "\n")
        write_text(path, "".join(whole))  # without what was cut off, as lines are added to it
        logger.info("%d results of an interrupted run are in %s", self.count, path.parent)


def clear_kept(folder: str | os.PathLike[str]) -> None:
    """Remove all that is kept in a folder, and the folder if nothing else is in it."""
    root = Path(folder)
    for each in root.glob("work-*"):
        shutil.rmtree(each, ignore_errors=True)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def digest_of_key(key: Any) -> str:
    """A short name of what can be written as JSON; of what cannot, its words."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest_of_tensors(tensors: Mapping[str, Any]) -> str:
    """The SHA-256 of tensors with their names, dtypes and shapes; of other values their words."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor!r};".encode())
            continue
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
