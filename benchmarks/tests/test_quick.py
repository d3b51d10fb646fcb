"""`make bench-quick`, on random tokens and a toy clock: it ends in a table, resumes for nothing, and fills a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rows import read_rows
from toys import once
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib")

import quick
from frontier_bench.shapes import parse_regime

from hawada_peft.demo.data import VOCABULARY, WINDOW, Data
from hawada_peft.demo.tasks import TOPICS
from hawada_peft.search.timed import measure_table


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **sizes))


def test_it_ends_in_a_table_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    rows = torch.randint(VOCABULARY, (24, WINDOW), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in rows]
    monkeypatch.setattr(quick, "load_topics", lambda: Data(examples, examples[:4]))
    monkeypatch.setattr(quick, "TOPICS", replace(TOPICS, build=tiny))
    regime = parse_regime("prefill:8x64:float32:eager", "cpu")
    table = measure_table(tiny(), regime, effort=once(whole_shapes=2))
    table.save(tmp_path / "table.json")
    page = tmp_path / "page.md"
    command = ["--folder", str(tmp_path), "--budget", "1.02", "--seeds", "0", "--steps", "1", "--teacher-steps", "1"]
    command += ["--clock", "toy", "--contestants", "hawada_one_shot", "minitron_depth", "--page", str(page)]
    quick.main(command)
    said = capsys.readouterr().out
    for words in ("| dense | 1.00x |", "| hawada one-shot |", "| Minitron depth |", "perplexity after recovery"):
        assert words in said
        assert words in page.read_text(encoding="utf-8")
    before = (tmp_path / "quality.jsonl").read_text()
    quick.main(command)
    assert (tmp_path / "quality.jsonl").read_text() == before
    assert len(read_rows(tmp_path / "seconds.jsonl")) == 2
