"""Slimming with reconstruction, from folder to folder: the export in memory, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, build, gate, scattered_plan
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hawada_peft import Plan, slim_checkpoint
from hawada_peft.cli.program import app
from hawada_peft.errors import HawAdaError, InvalidPlanError
from hawada_peft.files.names import CARD_NAME, REPORT_NAME
from hawada_peft.recipes.readers import load_examples
from hawada_peft.shipping import calibration_facts
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.loading import load_model


def batches_of(examples: Mapping[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """The examples in batches of at most `size`."""
    parts = {name: tensor.split(size) for name, tensor in examples.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]


def examples_of(row: Row) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if row is VISION_ROW:
        return {"pixel_values": torch.randn(80, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 128, (80, 16), generator=generator)}


def prepared(row: Row, folder: Path, **options: Any) -> Path:
    """`base`, gates under a plan in `adapter`, and `data.safetensors`."""
    model = build(row)
    model.save_pretrained(folder / "base")
    gated = gate(model, **options)
    gated.apply_plan(scattered_plan(gated, row.slim))
    gated.save_pretrained(folder / "adapter")
    save_file(examples_of(row), folder / "data.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(LM_ROW, tmp_path)


def run(folder: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["slim", *(str(folder / name) for name in ("base", "adapter", "slim")), *options])


@pytest.mark.parametrize("options", [{}, {"lora": {"r": 2, "target_modules": ["down_proj"]}}], ids=["gates", "LoRA"])
@pytest.mark.parametrize("fold", [True, False])
def test_weights_are_those_of_the_export_in_memory(fold: bool, options: dict[str, Any], tmp_path: Path) -> None:
    prepared(LM_ROW, tmp_path, **options)
    batches = batches_of(examples_of(LM_ROW), 8)
    written = slim_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", calibration=batches, fold=fold
    )
    gated: Any = PeftModel.from_pretrained(load_model(str(tmp_path / "base")), tmp_path / "adapter")
    gated.merge_and_unload(calibration=batches, fold=fold).save_pretrained(tmp_path / "expected")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "slim" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain", fold=fold)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    found = load_file(tmp_path / "slim" / "model.safetensors")
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    assert written.reconstruction
    assert written.reconstruction.applied
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    assert written.weight_bytes == sum(tensor.nbytes for tensor in found.values())


def test_the_report_tells_what_reconstruction_did_and_on_what(folder: Path) -> None:
    batches = batches_of(examples_of(LM_ROW), 16)
    written = slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", calibration=iter(batches))
    report = json.loads((folder / "slim" / REPORT_NAME).read_text())
    assert written.reconstruction
    assert written.verification
    assert report["reconstruction"] == json.loads(json.dumps(written.to_dict()["reconstruction"]))
    assert report["calibration"] == calibration_facts(batches)
    assert Plan.from_dict(report["plan"]) == written.plan
    assert report["base"]["name"] == "base"
    assert report["dense"]["parameters"] == written.dense_parameters > written.parameters
    card = (folder / "slim" / CARD_NAME).read_text()
    assert "## Reconstruction" in card
    assert "## Calibration data" in card
    slim_checkpoint(folder / "base", folder / "adapter", folder / "bare", calibration=batches, card=None)
    assert not (folder / "bare" / CARD_NAME).exists()


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])
def test_command_reconstructs_and_says_so(row: Row, tmp_path: Path) -> None:
    folder = prepared(row, tmp_path)
    result = run(folder, "--calibration", str(folder / "data.safetensors"), "--examples", "32", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["shape"] == row.slim.to_dict()
    assert said["reconstruction"]["after"] < said["reconstruction"]["before"]
    assert said["verification"]["parameters"] == said["parameters"]
    read = load_examples(folder / "data.safetensors", str(folder / "base"), length=256, count=32)
    assert json.loads((folder / "slim" / REPORT_NAME).read_text())["calibration"] == calibration_facts(
        batches_of(read, 8)
    )


def test_command_reads_text_with_the_bases_tokenizer_and_keeps_it(folder: Path) -> None:
    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "base")
    (folder / "plan.json").write_text(scattered_plan(build(LM_ROW), LM_ROW.slim, seed=7).to_json())
    tokens = examples_of(LM_ROW)["input_ids"].flatten().tolist()
    (folder / "data.txt").write_text(" ".join(f"w{token}" for token in tokens))
    options = ("--calibration", str(folder / "data.txt"), "--seq-len", "40", "--plan", str(folder / "plan.json"))
    result = run(folder, *options)
    assert result.exit_code == 0, result.output
    assert "reconstruction: " in result.output
    assert "projections refitted" in result.output
    report = json.loads((folder / "slim" / REPORT_NAME).read_text())
    assert report["calibration"]["examples"] == 80 * 16 // 40
    assert Plan.from_dict(report["plan"]) == Plan.from_json((folder / "plan.json").read_text())
    assert AutoTokenizer.from_pretrained(folder / "slim").get_vocab() == words


def test_a_plan_that_cuts_nothing_leaves_nothing_to_refit(folder: Path) -> None:
    (folder / "plan.json").write_text(Plan.keep_all(locate(build(LM_ROW)).dense).to_json())
    data = str(folder / "data.safetensors")
    result = run(folder, "--calibration", data, "--plan", str(folder / "plan.json"))
    assert result.exit_code == 0, result.output
    assert "the plan cuts nothing" in result.output


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--calibration", "data.npy", "--max-shard-size", "5GB"], "--max-shard-size does not go with --calibration"),
        (["--calibration", "data.npy", "--verify", "files"], "--verify does not go with --calibration"),
        (["--examples", "3", "--device", "cpu"], "--examples, --device needs --calibration"),
        (["--calibration", "data.csv"], "data must be a file of"),
    ],
)
def test_options_of_the_other_way_are_refused(folder: Path, options: list[str], facts: str) -> None:
    result = run(folder, *options)
    assert result.exit_code in (1, 2)
    assert facts in " ".join(result.output.split())
    assert not (folder / "slim").exists()


def test_a_device_where_nothing_is_refitted_is_refused(folder: Path) -> None:
    (folder / "alone").mkdir()
    (folder / "alone" / "plan.json").write_text(Plan.keep_all(locate(build(LM_ROW)).dense).to_json())
    result = run(folder, "--plan", str(folder / "alone" / "plan.json"), "--device", "cpu")
    assert result.exit_code == 2
    assert "--device needs --calibration" in " ".join(result.output.split())
    assert not (folder / "slim").exists()


def test_bad_input_is_refused_before_the_model_is_loaded(folder: Path) -> None:
    batches = batches_of(examples_of(LM_ROW), 8)
    (folder / "base" / "model.safetensors").unlink()
    gate(build(LM_ROW)).save_pretrained(folder / "bare")
    get_peft_model(build(LM_ROW), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    with pytest.raises(InvalidPlanError, match="there is no plan: apply one"):
        slim_checkpoint(folder / "base", folder / "bare", folder / "slim", calibration=batches)
    with pytest.raises(HawAdaError, match="type LORA, needed is one of type HAWADA"):
        slim_checkpoint(folder / "base", folder / "lora", folder / "slim", calibration=batches)
    with pytest.raises(FileExistsError, match="not empty"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "base", calibration=batches)
    assert not (folder / "slim").exists()
