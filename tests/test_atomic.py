"""Files that appear complete, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hawada_peft.files.atomic import write_text


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    for text in ("first", "ü\n"):
        write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(descriptor: int) -> None:
        raise error

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        write_text(tmp_path / "file", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_modes_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o600)
    (tmp_path / "link").symlink_to("plain")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "plain").read_text() == "text"
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o600
