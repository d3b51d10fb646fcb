"""What the page of the bench on a real model says of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import real_page
from peers.registry import PEERS


def row(name: str, budget: float, seed: int, before: float, after: float | None, **more: Any) -> dict[str, Any]:
    found = {"contestant": name, "budget": budget, "seed": seed, "steps": 300, "before": {"perplexity": before}}
    found |= {} if after is None else {"after": {"perplexity": after}}
    found |= {
        "speedup": budget,
        "met": after is not None,
        "parameters": 1,
        "device": "one",
        "date": "1",
        "versions": "2",
    }
    return found | {"regime": "prefill"} | more


ROWS = [
    row("dense", 1.0, 0, 15.0, 15.0) | {"budget": None, "seed": None, "steps": None},
    *(row("race", 1.5, seed, 25.0, 16.0 + seed / 10, race_steps=30, led_throughout=seed == 0) for seed in range(3)),
    *(row("minitron_depth+muon", 1.5, seed, 90.0, 15.5) for seed in range(3)),
    row("race", 2.0, 0, 60.0, 18.0, race_steps=30, led_throughout=True),
    row("minitron_depth", 2.0, 0, 900.0, 20.0),
    row("flap", 2.0, 0, 900.0, None, speedup=1.4),
]


def test_claims_say_first_where_we_are_behind() -> None:
    entries = real_page.entries_of(ROWS[1:], 300, PEERS)
    lines = real_page.claims(entries, 300)
    assert [("Behind" in line) for line in lines] == [True, False, False, False]
    assert "by 0.60 at 1.5x, after recovery (300 steps), outside the spread of 0.10" in lines[0]
    assert "by 2.00 at 2x, after recovery (300 steps), one seed" in lines[-1]


def test_the_table_and_the_races() -> None:
    lines = real_page.table(real_page.entries_of(ROWS[1:], 300, PEERS)).splitlines()
    assert "16.10 ±0.10" in lines[2]
    assert "**15.50**" in next(line for line in lines if line.startswith("| Minitron depth, Muon"))
    assert "out of reach (1.40x)" in next(line for line in lines if "FLAP" in line)
    assert real_page.leaders(ROWS) == (2, 4)


def test_rows_are_kept_once_and_the_page_is_made_of_them(tmp_path: Path) -> None:
    first, second, kept = tmp_path / "a", tmp_path / "b", tmp_path / "kept"
    first.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    again = row("flap", 2.0, 0, 800.0, None, speedup=1.5, race={"much": 1}, command="python /a/b.py")
    second.write_text("".join(json.dumps(each) + "\n" for each in (again, {"peer": "flap"}, again | {"error": "no"})))
    real_page.main(["keep", str(first), str(second), "--into", str(kept)])
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(found) == len(ROWS)
    assert found[-1]["speedup"] == 1.5
    assert not any("race" in each or each.get("command") for each in found)
    page, readme, picture = tmp_path / "page.md", tmp_path / "README.md", tmp_path / "pictures" / "p.png"
    page.write_text("# Page\n")
    places = ["--page", str(page), "--readme", str(readme), "--picture", str(picture)]
    real_page.main(["write", str(kept), *places])
    text = page.read_text()
    assert text.index("**Behind**") < text.index("Ahead")
    assert "won 2 of 4 races" in text
    assert picture.exists()
    assert "**Behind** by 0.60 at 1.5x" in readme.read_text()
    real_page.main(["write", str(kept), *places])
    assert page.read_text() == text
