"""The command line."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from hawada_peft.cli.program import app

run = CliRunner().invoke


def test_help_names_the_commands() -> None:
    result = run(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output


def test_demo_does_not_overwrite(tmp_path: Path) -> None:
    for name in ("digits", "topics"):
        (tmp_path / name).mkdir()
    result = run(app, ["demo", "--output", str(tmp_path), "--quick"])
    assert result.exit_code == 1
    assert "choose another output folder" in result.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["digits", "topics"]
