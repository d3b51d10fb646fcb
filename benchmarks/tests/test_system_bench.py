"""The system bench, run for real on tiny models: its rows, what a second run skips, and the section it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system import main

PARTS = ("budgets", "steps", "export", "search", "scaling")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(path: Path, *options: str) -> int:
    return main(["run", "--preset", "tiny", "--out", str(path), "--work-dir", str(path.parent), *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a whole run. Tests that add to them copy them."""
    path = tmp_path_factory.mktemp("system") / "rows.jsonl"
    assert run(path) == 0
    return path


def test_every_part_gives_rows_with_their_circumstances(made: Path) -> None:
    rows = rows_of(made)
    assert {row["part"] for row in rows} == set(PARTS)
    for row in rows:
        assert row["error"] is None, row
        assert all(row["circumstances"][name] for name in ("date", "device", "versions", "command"))
    keys = [(row["part"], row["name"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert not list(made.parent.glob("tmp*")), "checkpoints are left behind"


def test_measured_budgets_agree_with_themselves(made: Path) -> None:
    found = [row["result"] for row in rows_of(made) if row["part"] == "budgets" and "asked" in row["result"]]
    assert any(result["of_ancestor"] for result in found)
    assert any("infeasible" in result for result in found), "no machine is a thousand times faster on one layer"
    for result in (result for result in found if "infeasible" not in result):
        assert result["over_asked"] == pytest.approx(result["ms"] / result["limit_ms"])
        assert result["limit_ms"] == pytest.approx(result["dense_ms"] / result["speedup_asked"])
        assert all(0 < size <= result["dense"][axis] for axis, size in result["shape"].items())
        assert result["losses"] == "an illustration"


def test_exports_shrink_the_model(made: Path) -> None:
    found = [row["result"] for row in rows_of(made) if row["part"] == "export"]
    assert {result["what"].split(",")[0] for result in found} == {
        "`merge_and_unload`",
        "`reconstruct`",
        "`save_slim`",
        "`slim_checkpoint`",
    }
    assert all(0 < result["slim_mib"] < result["dense_mib"] for result in found)
    streamed, merged = (
        next(result["slim_mib"] for result in found if what in result["what"]) for what in ("checkpoint", "merge")
    )
    assert streamed == merged


def test_a_second_run_makes_only_what_is_missing(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = made.read_text(encoding="utf-8").splitlines()
    gone = next(number for number, line in enumerate(lines) if json.loads(line)["part"] == "steps")
    path.write_text("\n".join(lines[:gone] + lines[gone + 1 :]) + "\n", encoding="utf-8")
    assert run(path) == 0
    again = path.read_text(encoding="utf-8").splitlines()
    assert again[:-1] == lines[:gone] + lines[gone + 1 :]
    assert json.loads(again[-1])["name"] == json.loads(lines[gone])["name"]


def test_what_fails_leaves_its_error_and_is_tried_again(tmp_path: Path) -> None:
    path, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    assert run(path, "--parts", "search", "--curves", str(tmp_path / "missing.json")) == 1
    (row,) = rows_of(path)
    assert row["result"] is None
    assert row["error"].startswith("FileNotFoundError")
    main(["write", "--rows", str(path), "--page", str(page)])
    assert "FileNotFoundError" in page.read_text(encoding="utf-8")
    assert run(path, "--parts", "search") == 0
    main(["write", "--rows", str(path), "--page", str(page)])
    assert "FileNotFoundError" not in page.read_text(encoding="utf-8")


def test_the_section_is_replaced_and_its_numbers_are_those_of_the_rows(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("# Before\n\n<!-- begin other -->\nkept\n<!-- end other -->\n", encoding="utf-8")
    texts = []
    for _ in range(2):
        assert main(["write", "--rows", str(made), "--page", str(page)]) == 0
        texts.append(page.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert texts[0].count("<!-- begin system -->") == texts[0].count("## System bench") == 1
    assert "kept" in texts[0]
    pictures = sorted((page.parent / "pictures").iterdir())
    assert len(pictures) == 2
    for picture in pictures:
        assert f"(pictures/{picture.name})" in texts[0]
        assert picture.stat().st_size < 80_000
    step = next(row["result"] for row in rows_of(made) if row["part"] == "steps")
    for adapter in step["adapters"]:
        assert f"| {adapter['adapter']} | {adapter['trainable']:,} | {adapter['ms']:.1f} (" in texts[0]


def test_no_rows_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no rows in"):
        main(["write", "--rows", str(tmp_path / "none.jsonl"), "--page", str(tmp_path / "page.md")])
