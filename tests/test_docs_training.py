"""The training guide: its Python blocks run one after the other, as they stand but for the number of steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LM_ROW, build

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = (np.arange(64 * 16) ** 2 // 7) % LM_ROW.fields["vocab_size"]
    np.save("tokens.npy", tokens.astype(np.uint16))
    build(LM_ROW).save_pretrained("teacher")
    examples = [{"input_ids": row} for row in torch.from_numpy(tokens).reshape(64, 16)]
    batches = [{"input_ids": torch.stack([row["input_ids"] for row in examples[at : at + 8]])} for at in (0, 8, 16)]
    names: dict[str, Any] = {"data": examples[8:], "held_out": examples[:8], "batches": batches}
    assert BLOCKS
    for block in BLOCKS:
        short = re.sub(r"(max_steps\W+)\d+", r"\g<1>3", block)
        names["base"] = build(LM_ROW)
        exec(compile(short, str(GUIDE), "exec"), names)
    assert (tmp_path / "run" / "slim" / "hawada_report.json").exists()
    assert (tmp_path / "joint-adapter" / "adapter_config.json").exists()
