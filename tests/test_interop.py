"""What others do with a slim model: fine-tune it with LoRA, export it to ONNX, quantise it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    LM_ROW,
    ROWS,
    VISION_ROW,
    Export,
    Row,
    build,
    difference,
    everything,
    gate,
    inputs_of,
    logits_of,
)
from conftest import scattered_plan as plan_for
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hawada_peft import save_slim, slim
from hawada_peft.errors import HawAdaError
from hawada_peft.shipping import check_onnx
from hawada_peft.shipping.runtimes import ONNX_PACKAGES
from hawada_peft.vanilla.outputs import output_of

MISSING = [name for name in ONNX_PACKAGES if find_spec(name) is None]
ONNX = pytest.mark.skipif(bool(MISSING), reason=f"needs hawada_peft[onnx]; not installed: {MISSING}")


def reload(exported: Export) -> PreTrainedModel:
    return getattr(transformers, exported.verification.auto_class).from_pretrained(exported.folder).eval()


def train(model: torch.nn.Module, steps: int = 3) -> None:
    """A few steps towards other outputs."""
    inputs = inputs_of(model)
    target = torch.roll(logits_of(model), 1, dims=-1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        loss = (model(**inputs)[0] - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_trains_on_a_slim_model_and_merges(exported: Export, tmp_path: Path) -> None:
    slim_model = reload(exported)
    before = logits_of(slim_model)
    model = get_peft_model(slim_model, LoraConfig(target_modules="all-linear", r=4))
    train(model)
    model.save_pretrained(tmp_path / "lora")
    trained = logits_of(model)
    assert difference(trained, before) > 1e-3
    again = PeftModel.from_pretrained(reload(exported), tmp_path / "lora")
    assert torch.equal(logits_of(again), trained)
    merged = model.merge_and_unload()
    assert type(merged) is type(exported.slim)
    assert difference(logits_of(merged), trained) <= 1e-5
    merged.save_pretrained(tmp_path / "merged")
    loaded = getattr(transformers, exported.verification.auto_class).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_a_slim_model_is_slimmed_again(exported: Export) -> None:
    model = gate(reload(exported), gates=everything(exported.row))
    plan = model.plan(keep_ratio={"layers": 0.5})
    model.apply_plan(plan)
    masked = logits_of(model)
    again = model.merge_and_unload()
    assert difference(logits_of(again), masked) <= 1e-5
    assert again.num_parameters() < exported.slim.num_parameters()


def test_a_reloaded_slim_model_trains_with_the_trainer(tmp_path: Path) -> None:
    model = build(LM_ROW)
    save_slim(slim(model, plan_for(model, LM_ROW.slim)), tmp_path / "slim")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).reshape(4, 16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(loaded, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@ONNX
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW, ROWS["llama-bare"]], ids=["text", "images", "hidden states"])
def test_onnx_computes_the_same(row: Row, tmp_path: Path) -> None:
    import onnxruntime

    dense = build(row)
    model = slim(dense, plan_for(dense, row.slim)).train()
    line = check_onnx(model, keep=tmp_path / "model.onnx")
    assert (line.answer, line.evidence) == ("yes", "run"), line
    assert model.training
    inputs = {name: tensor[:1] for name, tensor in inputs_of(model).items()}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    assert difference(torch.from_numpy(found), output_of(model, inputs)) <= 1e-4


@pytest.mark.skipif(not MISSING, reason="everything that ONNX needs is installed")
def test_without_onnx_it_is_said_what_to_install() -> None:
    with pytest.raises(HawAdaError, match=r"pip install hawada_peft\[onnx\]"):
        check_onnx(build(LM_ROW))
