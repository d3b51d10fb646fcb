"""Folders that appear complete, or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from hawada_peft.files import folder as new_folder_module
from hawada_peft.files.folder import check_free, new_folder

DIE = """
import os, runpy, signal, sys  # the file itself: importing the package takes seconds
new_folder = runpy.run_path(sys.argv[2])["new_folder"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started the tests in the background
with new_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_appears_when_the_block_is_left(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        assert not (tmp_path / "deep" / "new").exists()
    assert names(tmp_path) == ["deep", "deep/new", "deep/new/sub", "deep/new/sub/file"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("text")
    assert names(tmp_path) == ["new", "new/file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_block_that_raises(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("text")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_a_name_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder("new") as folder:
        (folder / "file").write_text("text")
    assert names(tmp_path) == ["new", "new/file"]


def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIE, str(tmp_path / "new"), new_folder_module.__file__], check=False)
    assert died.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".new.hawada", ".new.hawada/lock", ".new.hawada/new", ".new.hawada/new/half"]
    (tmp_path / ".other.hawada").mkdir()
    with new_folder(tmp_path / "new") as folder:
        assert names(folder) == []
        (folder / "file").write_text("text")
    assert names(tmp_path) == [".other.hawada", "new", "new/file"]


def test_leftovers_are_removed_even_if_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("new", ".new.hawada/new"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("text")
    with pytest.raises(FileExistsError, match="not empty"), new_folder(tmp_path / "new"):
        raise AssertionError("entered")
    assert names(tmp_path) == ["new", "new/file"]


def test_a_folder_that_another_one_is_writing_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / ".new.hawada" / "new").mkdir(parents=True)
    with FileLock(tmp_path / ".new.hawada" / "lock"):
        with pytest.raises(FileExistsError, match="another process is writing"), new_folder(tmp_path / "new"):
            raise AssertionError("entered")
        assert names(tmp_path) == [".new.hawada", ".new.hawada/lock", ".new.hawada/new"]


def test_others_may_read_it(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "new"):
        pass
    assert os.stat(tmp_path / "new").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_no_folder_can_replace_is_refused_before_the_work(tmp_path: Path, kind: str) -> None:
    (tmp_path / "there").mkdir()
    if kind == "file":
        (tmp_path / "new").write_text("mine")
    else:
        (tmp_path / "new").symlink_to(tmp_path / ("there" if kind == "link" else "nowhere"))
    before = names(tmp_path)
    for enter in (lambda: check_free(tmp_path / "new"), lambda: new_folder(tmp_path / "new").__enter__()):
        with pytest.raises(FileExistsError, match=r"is a (link|file)"):
            enter()
    assert names(tmp_path) == before


INTERRUPTED = """
import json, os, runpy, shutil, signal, sys  # the file itself: importing the package takes seconds
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs behind it has them ignore it
new_folder = runpy.run_path(sys.argv[2])["new_folder"]
target = Path(sys.argv[1])

def fill(at):
    "Interrupted at the at-th use of a path."
    seen = []
    def watch(event, arguments):
        if watching and arguments and str(target.parent) in str(arguments[0]):
            seen.append(event)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGINT)
    watching.append(True)
    sys.addaudithook(watch)
    try:
        with new_folder(target) as folder:
            (folder / "file").write_text("whole")
        return False
    except KeyboardInterrupt:
        return True
    finally:
        watching.clear()

watching = []
found, at, interrupted = [], 1, True
while interrupted:
    interrupted = fill(at)
    left = sorted(str(path.relative_to(target.parent)) for path in target.parent.rglob("*"))
    found.append(left)
    shutil.rmtree(target, ignore_errors=True)
    at += 1
print(json.dumps(found))
"""


def test_interrupted_at_any_moment_it_leaves_nothing_or_everything(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "new"), new_folder_module.__file__]
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], check=True, stdout=subprocess.PIPE)
    found = json.loads(ran.stdout)
    assert len(found) > 10
    assert {tuple(left) for left in found} == {(), ("new", "new/file")}
