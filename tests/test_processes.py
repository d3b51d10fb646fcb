"""The whole way across processes: gates, adapter, slim folder, and a user who has only transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from conftest import LM_ROW, build, difference, gate, inputs_of, logits_of, scattered_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

MERGE = """
import sys, hawada_peft
from peft import AutoPeftModelForCausalLM
adapter, slim = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
hawada_peft.save_slim(model.merge_and_unload(), slim)
"""
USE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, outputs)
assert "hawada_peft" not in sys.modules
"""


def run(code: str, *arguments: Path) -> None:
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)], check=True)


def test_slim_model_is_used_by_a_process_that_never_heard_of_the_package(tmp_path: Path) -> None:
    build(LM_ROW).save_pretrained(tmp_path / "base")
    model = gate(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), task_type="CAUSAL_LM")
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    model.save_pretrained(tmp_path / "adapter")
    save_file(inputs_of(model), tmp_path / "inputs.safetensors")
    run(MERGE, tmp_path / "adapter", tmp_path / "slim")
    run(USE, tmp_path / "slim", tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors")
    found = load_file(tmp_path / "outputs.safetensors")["logits"]
    assert difference(found, logits_of(model)) <= 1e-5
    assert found.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert loaded.num_parameters() < model.get_base_model().num_parameters()
