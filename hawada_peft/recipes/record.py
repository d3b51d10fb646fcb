"""What a recipe has done so far, on disk, so that an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import HawAdaError
from ..files.atomic import write_text
from ..training.history import HISTORY_FILE
from ..training.saved_state import STATE_FILE
from .digests import recipe_digests
from .recipe import Recipe

RECORD, RESULT = "recipe.json", "result.json"


class Record:
    """
    The output folder of a recipe. Only the main process writes.

    Args:
        recipe: what is done.
        resume: go on with what an interrupted run left.
        main: whether this is the main process.

    Raises:
        FileExistsError: if the folder holds something and `resume` is off, or another process works in it.
        HawAdaError: if it is of another recipe, or its model or data have changed since.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, main: bool) -> None:
        self.folder, self.main = Path(recipe.output), main
        self._lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
        self.adapter, self.slim = self.folder / "adapter", self.folder / "slim"
        before = _read(self.folder / RECORD)
        if before is None and self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} exists and is not empty; name another output, or empty it first")
        if before is not None and not resume:
            raise FileExistsError(f"{self.folder} is of an earlier run: resume it (--resume), or name another output")
        now = json.loads(json.dumps(recipe.to_dict()))
        old = now if before is None else before.get("recipe", {})
        differing = sorted(name for name in old | now if old.get(name) != now.get(name) and name != "output")
        if differing:  # but for where the folder is: it may have been moved
            raise HawAdaError(f"{self.folder} is of a recipe that differs in {differing}; name another output")
        seen = recipe_digests(recipe)
        known = {} if before is None else before.get("digests", {})
        if changed := sorted(name for name in seen.keys() & known.keys() if seen[name] != known[name]):
            raise HawAdaError(
                f"{self.folder} was begun with other content of {changed}: the rest would not fit it. Put it back, or "
                "name another output"
            )
        self._content: dict[str, Any] = before or {"recipe": now, "digests": seen}

    def begin(self) -> None:
        """Note the recipe, and remove what a killed run has not finished. Until `end` no other process may begin."""
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise FileExistsError(f"another process works in {self.folder}: wait for it, or end it") from None
            self._write(RECORD, self._content)
            if self.result() is None and self.slim.exists():
                shutil.rmtree(self.slim)  # complete, but nobody wrote down what came of it

    def end(self) -> None:
        """Others may begin."""
        if self._lock.is_locked:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """What came of a run that has ended."""
        return _read(self.folder / RESULT)

    def finish(self, result: dict[str, Any]) -> None:
        """Note what came of it."""
        if self.main:
            self._write(RESULT, result)

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a stage left, if it has ended."""
        return self._content.get(name)

    def end_stage(self, name: str, facts: dict[str, Any]) -> None:
        """Note that a stage has ended."""
        self._content[name] = facts
        if self.main:
            self._write(RECORD, self._content)

    def keep_history(self) -> None:
        """Copy how the gates moved out of the folder of their training, which may be removed."""
        if self.main:
            shutil.copyfile(self.folder / "gates" / HISTORY_FILE, self.folder / HISTORY_FILE)

    def search(self) -> dict[str, Any] | None:
        """How a budget became a shape, if it did."""
        history = _read(self.folder / HISTORY_FILE)
        return None if history is None else history["search"]

    def checkpoint(self, section: str) -> str | None:
        """The last checkpoint of a training that is complete: the file that is written last is there."""
        last = STATE_FILE if section == "gates" else TRAINER_STATE_NAME
        complete = [path.parent for path in (self.folder / section).glob(f"checkpoint-*/{last}")]
        return str(max(complete, key=lambda path: int(path.name.partition("-")[2]))) if complete else None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.folder / name, json.dumps(content, indent=2))


def _read(path: Path) -> dict[str, Any] | None:
    """A file of ours."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HawAdaError(f"{path} is damaged ({error}): name another output, or remove the folder") from None
    if not isinstance(found, dict) or not isinstance(found.get("recipe", {}), dict):
        raise HawAdaError(f"{path} is not of a recipe: name another output")
    return found
