"""Importing the package: at no cost for the command line, and with everything in its place for anyone else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hawada_peft
from hawada_peft import latency

WITHOUT_TORCH = {
    ("--help",): 0,
    ("--version",): 0,
    ("plan", "--help"): 0,
    ("mesure",): 2,
    ("measure", "./nowhere"): 1,
    ("measure", "m", "--mode", "idle"): 2,
    ("plan", "m", "nowhere.txt"): 2,
    ("plan", "m", ".", "--speedup", "0.5"): 1,
    ("slim", "./nowhere", "out"): 2,
    ("train", "nowhere.yaml"): 2,
    ("verify", "nowhere"): 2,
}
"""Command lines and how they end."""


def test_what_is_only_read_is_answered_without_torch(tmp_path: Path) -> None:
    code = f"""
import json, sys
from hawada_command import main
codes = []
for arguments in {[list(line) for line in WITHOUT_TORCH]}:
    sys.argv = ["hawada", *arguments]
    try:
        main()
    except SystemExit as ended:
        codes.append(ended.code)
print(json.dumps([codes, sorted({{"torch", "transformers", "peft"}} & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert codes == list(WITHOUT_TORCH.values())
    assert imported == []
    assert "Traceback" not in done.stderr


def test_the_script_registers_before_it_works(tmp_path: Path) -> None:
    code = """
import hawada_command, sys
hawada_command.starting = True
import hawada_peft
assert "peft" not in sys.modules
from hawada_peft.cli.streams import working
with working():
    from peft import PeftType
    assert PeftType.HAWADA
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("package", [hawada_peft, latency], ids=lambda package: package.__name__)
def test_every_public_name_is_listed_and_found(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert set(names) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in names)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = package.nonesuch  # type: ignore[attr-defined]
