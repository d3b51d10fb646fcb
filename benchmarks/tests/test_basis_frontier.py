"""What the frontier with hidden sizes in a basis keeps and shows of its rows."""

from __future__ import annotations

from pathlib import Path

import basis_frontier
import pytest
from rows import append_row, read_rows

from hawada_peft.errors import HawAdaError

SHAPE = {
    "contestant": "hawada_rotated",
    "budget": 2.0,
    "seed": 0,
    "shape": {"num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 96, "hidden_size": 128},
    "speedup": 2.01,
    "met": True,
    "device": "core",
    "command": "python of a folder",
}


def quality(seed: int, accuracy: float, **more: object) -> dict[str, object]:
    names = {"contestant": "hawada_rotated", "budget": 2.0, "seed": seed, "parameters": 1234, "kind": "image"}
    found = {"before": {"accuracy": accuracy, "agreement": 80.0}, "command": "python of a folder"}
    return names | found | {"device": "core", "date": "2026-01-01", "versions": "torch"} | more


def test_rows_are_kept_once_without_folders_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept, page = tmp_path / "out", tmp_path / "kept", tmp_path / "page.md"
    out.mkdir()
    append_row(out / "vit-cpu-shapes.jsonl", SHAPE)
    for row in (quality(0, 70.0), quality(1, 78.0), quality(0, 76.0, after={"accuracy": 79.0, "agreement": 90.0})):
        append_row(out / "vit-cpu-quality.jsonl", row)
    for _ in range(2):
        basis_frontier.main(["keep", "--folder", str(out), "--into", str(kept)])
    rows = read_rows(kept / "vit-cpu-quality.jsonl")
    assert [(row["seed"], row["before"]["accuracy"]) for row in rows] == [(0, 76.0), (1, 78.0)]
    assert {row["command"] for row in rows} == {""}
    basis_frontier.main(["table", "--folder", str(kept), "--page", str(page)])
    line = "| 2x | hawada_rotated | 2.01x | 1,234 | 8, 4, 96, 128 | 2 | 77.00 ±1.41 / 80.00 ±0.00 | 79.00 / 90.00 |"
    assert line in page.read_text()
    (kept / "vit-cpu-shapes.jsonl").unlink()
    with pytest.raises(HawAdaError, match="no shape"):
        basis_frontier.main(["table", "--folder", str(kept)])
