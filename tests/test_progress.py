"""Progress bars: none by default, and one per step."""

from __future__ import annotations

from io import StringIO
from typing import Any

from tqdm import tqdm

from hawada_peft.progress import in_steps, progress_bar


def test_a_step_has_one_bar_that_grows() -> None:
    made: list[Any] = []

    def bars(**options: Any) -> Any:
        made.append(tqdm(**options, file=StringIO()))
        return made[-1]

    steps = in_steps(bars, ["table", "depth"])
    for count in (2, 3):
        with progress_bar(steps, total=count, desc="table") as bar:
            bar.update(count)
    assert list(progress_bar(steps, iterable=[1, 2], desc="depth")) == [1, 2]
    with progress_bar(steps, total=1, desc="another"):
        pass
    assert [bar.desc.removesuffix(": ") for bar in made] == ["step 1 of 2: table", "step 2 of 2: depth", "another"]
    assert [(bar.n, bar.total) for bar in made[:2]] == [(5, 5), (2, 2)]


def test_without_bars_there_are_no_steps() -> None:
    assert in_steps(None, ["table"]) is None
    assert list(progress_bar(None, iterable=[1], desc="table")) == [1]
