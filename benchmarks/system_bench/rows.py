"""Results as JSON lines: one per piece of work, written when it is done, never made twice."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def key_of(row: Row) -> tuple[str, str, str]:
    """What a row is about: part, name and device."""
    return row["part"], row["name"], row["circumstances"]["device"]


def read_rows(*paths: Path) -> list[Row]:
    """The last row of every key in files that may not exist yet, in the order in which the keys appeared."""
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines if line]
    return list({key_of(row): row for row in rows}.values())


class Rows:
    """
    A file of rows that a run adds to.

    Args:
        path: the file; rows in it are not made again, but those that hold an error are.
        circumstances: of this run, for each of its rows.
    """

    def __init__(self, path: Path, circumstances: dict[str, str]) -> None:
        self.path, self.circumstances = path, circumstances
        self.done = {key_of(row): row["result"] for row in read_rows(path) if row["error"] is None}
        self.failed: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def has(self, part: str, name: str) -> bool:
        """Whether the row is there."""
        return (part, name, self.circumstances["device"]) in self.done

    def make(self, part: str, name: str, work: Callable[[], Row]) -> Row | None:
        """
        The result of a piece of work: from the file, or by doing it.

        Work that fails leaves a row with the error's text, and the run goes on: whatever goes wrong in one, the others
        are still worth having.

        Returns:
            The result; None if the work failed.
        """
        key = (part, name, self.circumstances["device"])
        if key in self.done:
            return self.done[key]
        started, result, problem = time.perf_counter(), None, None
        try:
            result = work()
        except Exception as error:
            problem = error
        self._write(part, name, result, problem, time.perf_counter() - started)
        if result is not None:
            self.done[key] = result
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return result

    def attempt(self, part: str, work: Callable[[], None]) -> None:
        """Do all of a part; if it fails outside of its rows, leave a row of that."""
        try:
            work()
        except Exception as error:
            self._write(part, "set-up", None, error, 0.0)

    def _write(self, part: str, name: str, result: Row | None, problem: Exception | None, seconds: float) -> None:
        text = None if problem is None else f"{type(problem).__name__}: {problem}"
        row = {"part": part, "name": name, "result": result, "error": text, "seconds": round(seconds, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"circumstances": self.circumstances}) + "\n")
        print(f"{seconds:7.1f} s  {part}: {name}{'' if text is None else f'  FAILED: {text}'}", file=sys.stderr)
        if problem is not None:
            traceback.print_exception(problem)
            self.failed.append(f"{part}: {name}")
