"""Saving and verifying slim models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    LM_ROW,
    VISION,
    VISION_ROW,
    Row,
    build,
    inputs_of,
    logits_of,
    scattered_plan,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hawada_peft import Shape, save_slim, slim, verify_slim
from hawada_peft.errors import VerificationError
from hawada_peft.files.verify import verify_files
from hawada_peft.vanilla.skeleton import auto_class_of


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    model = build(LM_ROW)
    return slim(model, scattered_plan(model, LM_ROW.slim))


@pytest.fixture
def folder(small: PreTrainedModel, tmp_path: Path) -> Path:
    save_slim(small, tmp_path / "slim")
    return tmp_path / "slim"


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_untouched_folder_verifies(small: PreTrainedModel, folder: Path) -> None:
    found = verify_slim(folder, small)
    assert found.max_difference == 0
    assert found.auto_class == "AutoModelForCausalLM"
    assert found.parameters == small.num_parameters()
    assert found.scale == pytest.approx(float(logits_of(small).abs().max()))


def test_logits_and_inputs_of_the_users_own(small: PreTrainedModel, folder: Path) -> None:
    inputs = {"input_ids": torch.arange(6)[None]}
    with torch.no_grad():
        logits = small(**inputs).logits
    assert verify_slim(folder, logits, inputs).max_difference == 0
    with pytest.raises(VerificationError, match="computes something else"):
        verify_slim(folder, logits + 0.1, inputs)
    assert verify_slim(folder, logits + 0.1, inputs, tolerance=1.0).max_difference > 0


def test_logits_need_their_inputs(small: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(VerificationError, match="pass the `inputs`"):
        verify_slim(folder, logits_of(small))


def test_logits_of_another_shape_are_refused(small: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(VerificationError, match=r"\(2, 16, 128\), expected \(2, 16, 5\)"):
        verify_slim(folder, logits_of(small)[..., :5], inputs_of(small))


def test_mode_of_the_reference_is_put_back(small: PreTrainedModel, folder: Path) -> None:
    verify_slim(folder, small.train())
    assert small.training
    small.eval()


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda weights: weights[NAME].mul_(1.5), "computes something else.*Do not use this folder"),
        (lambda weights: weights[NAME].fill_(float("nan")), "computes something else"),
        (lambda weights: weights.pop(NAME), "exactly the weights.*layers.1.mlp.down_proj"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "exactly the weights.*extra"),
        (lambda weights: weights.update({NAME: torch.zeros(64, 7)}), "does not load with transformers"),
    ],
    ids=["changed", "nan", "missing", "unexpected", "of another shape"],
)
def test_tampered_weights_are_refused(small: PreTrainedModel, folder: Path, edit, facts: str) -> None:
    edit_weights(folder, edit)
    with pytest.raises(VerificationError, match=facts):
        verify_slim(folder, small)


def test_files_of_an_untouched_folder_are_as_expected(small: PreTrainedModel, folder: Path) -> None:
    verify_files(folder, small)
    verify_files(folder, copy.deepcopy(small).to("meta"))


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda weights: weights.pop(NAME), "exactly the weights.*layers.1.mlp.down_proj"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "exactly the weights.*extra"),
        (lambda weights: weights.update({NAME: torch.zeros(64, 7)}), "does not load with transformers"),
        (lambda weights: weights.update({NAME: weights[NAME].half()}), r"down_proj.weight: \('F16'.*expected \('F32'"),
    ],
    ids=["missing", "unexpected", "of another shape", "of another dtype"],
)
def test_other_files_than_expected_are_refused(small: PreTrainedModel, folder: Path, edit, facts: str) -> None:
    edit_weights(folder, edit)
    with pytest.raises(VerificationError, match=facts):
        verify_files(folder, small)


@pytest.mark.parametrize("size", [8, 1000, -1])
def test_truncated_files_are_not_as_expected(small: PreTrainedModel, folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(VerificationError, match="does not load"):
        verify_files(folder, small)


def test_files_of_another_class_are_refused(folder: Path) -> None:
    with pytest.raises(VerificationError, match="loads as LlamaForCausalLM, saved was ViT"):
        verify_files(folder, build(VISION_ROW))


def test_a_truncated_file_is_refused(small: PreTrainedModel, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(VerificationError, match="does not load"):
        verify_slim(folder, small)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files_are_refused(small: PreTrainedModel, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(VerificationError, match="does not load with transformers"):
        verify_slim(folder, small)


@pytest.mark.parametrize(
    "fields", [{"model_type": "unknown"}, {"architectures": None}, {"architectures": ["Nothing"]}, {"hidden_size": 60}]
)
def test_damaged_configs_are_refused(small: PreTrainedModel, folder: Path, fields: dict[str, object]) -> None:
    edit_config(folder, **fields)
    with pytest.raises(VerificationError):
        verify_slim(folder, small)


def test_another_class_is_refused(small: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(VerificationError, match="loads as LlamaForCausalLM, saved was ViT"):
        verify_slim(folder, build(VISION_ROW), inputs_of(small))


@pytest.mark.parametrize(
    ("model", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("LlamaModel", "AutoModel"),
    ],
)
def test_auto_class_of_a_model(model: str, auto: str) -> None:
    assert auto_class_of(build(Row(model, "LlamaConfig", LM_ROW.fields, LM_ROW.slim))).__name__ == auto


def test_failing_verification_leaves_nothing(small: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        save_slim(small, tmp_path / "slim", reference=logits_of(small) + 1, inputs=inputs_of(small))
    assert list(tmp_path.iterdir()) == []


def test_failing_to_save_leaves_nothing(small: PreTrainedModel, tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_slim(small, tmp_path / "slim", processor=Broken())
    assert list(tmp_path.iterdir()) == []


def test_folder_that_holds_something_is_refused(small: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        save_slim(small, tmp_path / "slim")
    assert [path.name for path in tmp_path.rglob("*")] == ["slim", "mine"]


def test_empty_and_deep_folders_are_fine(small: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_slim(small, tmp_path / "empty")
    save_slim(small, str(tmp_path / "new" / "deep"))
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "new"}


def test_others_may_read_the_folder(small: PreTrainedModel, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tokenizer_is_saved_along(small: PreTrainedModel, tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(128)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", eos_token="w2"
    )
    save_slim(small, tmp_path / "slim", processor=tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "slim")
    assert loaded.get_vocab() == words
    assert loaded.eos_token == "w2"


def test_image_processor_is_saved_along(tmp_path: Path) -> None:
    model = build(VISION_ROW)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 16})
    save_slim(slim(model, scattered_plan(model, VISION_ROW.slim)), tmp_path / "slim", processor=processor)
    loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path / "slim")
    assert loaded.size["shortest_edge"] == 16


def test_a_backbone_is_verified_by_its_feature_maps(tmp_path: Path) -> None:
    row = Row("Dinov2Backbone", "Dinov2Config", VISION | {"mlp_ratio": 2}, VISION_ROW.slim)
    model = build(row)
    assert save_slim(slim(model, scattered_plan(model, Shape(4, 4, 64, 2))), tmp_path / "slim").scale > 0
