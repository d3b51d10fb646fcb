"""The page of the command line, replayed from top to bottom on what `hawada demo` leaves, but tiny."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, build, gate, scattered_plan
from safetensors.torch import save_file
from typer.testing import CliRunner

from hawada_peft.cli import errors
from hawada_peft.cli.program import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
ELSEWHERE = "./qwen3-30b-a3b/config.json"
"""What a reader has to bring."""

INSTEAD = {"train recipe.yaml": "train recipe.yaml --dry-run", " --training topics": ""}
"""What would take long, and the history of a training that there was none of."""


def commands() -> list[str]:
    """The lines behind `$`; one that comes again, or is only quieter, is run once."""
    found = re.findall(r"^\$ hawada (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [line for line in dict.fromkeys(line.removesuffix(" --quiet") for line in found) if ELSEWHERE not in line]


@pytest.mark.filterwarnings("ignore:the slim model keeps its plain weights")  # so little is fitted here
@pytest.mark.usefixtures("toy_machine")
def test_every_command_of_the_page_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(3)
    for name, row in (("digits", VISION_ROW), ("topics", LM_ROW)):
        build(row).save_pretrained(f"{name}/teacher")
        gated = gate(build(row))
        gated.apply_plan(scattered_plan(gated, row.slim))
        gated.save_pretrained(f"{name}/adapter")
    pixels, labels = torch.randn(16, 3, 16, 16, generator=draw), torch.randint(3, (16,), generator=draw)
    save_file({"pixel_values": pixels}, "digits/examples.safetensors")
    save_file({"pixel_values": pixels, "labels": labels}, "digits/test.safetensors")
    save_file({"input_ids": torch.randint(3, 128, (12, 16), generator=draw)}, "topics/examples.safetensors")
    Path("examples").symlink_to(PAGE.parents[1] / "examples")
    lines = ["slim topics/teacher topics/adapter topics/slim", *commands()]  # as the demo ends
    assert len(lines) > 12
    for line in lines:
        for long, short in INSTEAD.items():
            line = line.replace(long, short)
        done = CliRunner().invoke(app, shlex.split(line))
        expected = errors.FAILED if line == "verify digits/adapter" else errors.DONE
        assert done.exit_code == expected, (line, done.output, done.exception)
