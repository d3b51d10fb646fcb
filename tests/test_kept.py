"""Results of long work: kept as they come, found again by the same work, and by no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_basis import calibration
from test_directions import LM_ROW, fresh, searched
from tqdm import tqdm

from hawada_peft import SearchResult
from hawada_peft.files.kept import RESULTS, Kept, clear_kept, digest_of_tensors
from hawada_peft.latency.build import TABLE
from hawada_peft.search.budgeted import IMPORTANCE
from hawada_peft.search.timed import TIMING

STAGES = (TABLE, "basis", IMPORTANCE, "loss", "refitted", TIMING)
"""What is kept of a search, in its order."""


def never() -> float:
    raise AssertionError("made again")


def test_what_was_kept_is_not_made_again(tmp_path: Path) -> None:
    first = Kept(tmp_path, {"seed": 1})
    assert [first.value("loss", lambda each=each: each) for each in (1 / 3, 2.0)] == [1 / 3, 2.0]
    made = first.tensors("basis", lambda: {"vectors": torch.eye(3).double().T})
    again = Kept(tmp_path, {"seed": 1})
    assert again.count == 2
    assert [again.value("loss", never) for _ in range(2)] == [1 / 3, 2.0]  # in the order of asking
    assert again.value("loss", lambda: 3.0) == 3.0
    assert torch.equal(again.tensors("basis", never)["vectors"], made["vectors"])
    assert Kept(tmp_path, {"seed": 2}).count == 0


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    first = Kept(tmp_path)
    for name in ("a", "b"):
        first.value(name, lambda: 1.5)
    file = first.folder / RESULTS  # type: ignore[operator]
    file.write_text(file.read_text()[:-4])
    again = Kept(tmp_path)
    assert (again.value("a", never), again.value("b", lambda: 2.5)) == (1.5, 2.5)
    assert Kept(tmp_path).count == 2


def test_clearing_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    Kept(tmp_path / "work").value("a", lambda: 1)
    clear_kept(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    Kept(tmp_path / "work").value("a", lambda: 1)
    (tmp_path / "work" / "mine").write_text("")
    clear_kept(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mine"]
    clear_kept(tmp_path / "nothing")


def test_tensors_are_told_apart() -> None:
    ones = torch.ones(2, 3)
    given = [{"x": ones}, {"y": ones}, {"x": ones.T}, {"x": ones.int()}, {"x": 2 * ones}, {"x": ones, "more": 1}]
    assert len({digest_of_tensors(each) for each in given}) == len(given)
    assert digest_of_tensors({"x": ones}) == digest_of_tensors({"x": ones.clone()})


def test_a_search_goes_on_wherever_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(folder: str) -> SearchResult:
        model = fresh(LM_ROW, "ffn", "layers")
        batches = calibration(model, rows=4)
        options = {"refit": True, "hidden_sizes": [48], "progress": bars}
        return searched(model, batches, work=tmp_path / folder, **options)

    def bars(**options: Any) -> Any:
        seen.append(options["desc"])
        return tqdm(**options, disable=True)

    asked, made, seen = Kept._next, list[str](), list[str]()
    stopped_at = ""

    def next_name(kept: Kept, name: str) -> str:
        """What is asked for that is not there is noted, the second of a stage interrupts, or the only one."""
        found, folder = asked(kept, name), cast(Path, kept.folder)
        if found not in kept._found and not (folder / f"{found}.safetensors").exists():
            begun = any(each.startswith(stopped_at) for each in made) or name == stopped_at
            if stopped_at and name.startswith(stopped_at) and begun:
                raise KeyboardInterrupt
            made.append(found)
        return found

    monkeypatch.setattr(Kept, "_next", next_name)
    whole, names = search("whole"), made.copy()
    assert [each.split(" of")[0] for each in seen] == [f"step {count}" for count in range(1, 11)]  # all, in order
    made.clear()
    for stopped_at in STAGES:  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            search("parts")
    stopped_at = ""
    again = search("parts")
    assert again.plan == whole.plan
    assert (again.best, again.measured, again.frontier) == (whole.best, whole.measured, whole.frontier)
    assert made == names  # everything once, and in the same order
