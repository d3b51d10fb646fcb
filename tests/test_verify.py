"""Saving and verifying slim models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    LM_ROW,
    ROWS,
    VISION,
    VISION_ROW,
    Row,
    build,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hawada_peft import ExportFacts, Plan, Shape, save_slim, slim, slim_checkpoint, verify_slim
from hawada_peft.errors import HawAdaError, UnsupportedModelError, VerificationError
from hawada_peft.files.names import REPORT_NAME
from hawada_peft.files.verify import verify_files
from hawada_peft.shipping import Verification
from hawada_peft.vanilla.outputs import outputs_of
from hawada_peft.vanilla.resize import LEFT_OVER
from hawada_peft.vanilla.skeleton import auto_class_of


def verified(folder: Path, reference: Any, inputs: Any = None, **options: Any) -> Verification:
    return verify_slim(folder, reference=reference, inputs=inputs, **options).require()


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
    found = verified(folder, small)
    assert found.max_difference == 0
    assert found.auto_class == "AutoModelForCausalLM"
    assert found.parameters == small.num_parameters()
    assert found.scale == pytest.approx(float(logits_of(small).abs().max()))


def test_logits_and_inputs_of_the_users_own(small: PreTrainedModel, folder: Path) -> None:
    inputs = {"input_ids": torch.arange(6)[None]}
    with torch.no_grad():
        logits = small(**inputs).logits
    assert verified(folder, logits, inputs).max_difference == 0
    with pytest.raises(VerificationError, match="computes something else"):
        verified(folder, logits + 0.1, inputs)
    assert verified(folder, logits + 0.1, inputs, tolerance=1.0).max_difference > 0


def test_logits_need_their_inputs(small: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(HawAdaError, match="pass the `inputs`"):
        verified(folder, logits_of(small))


def test_logits_of_another_shape_are_refused(small: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(VerificationError, match=r"\(2, 16, 128\), expected are \(2, 16, 5\)"):
        verified(folder, logits_of(small)[..., :5], inputs_of(small))


def test_mode_of_the_reference_is_put_back(small: PreTrainedModel, folder: Path) -> None:
    verified(folder, small.train())
    assert small.training
    small.eval()


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda weights: weights[NAME].mul_(1.5), "do not use.*computes something else"),
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
        verified(folder, small)


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
    with pytest.raises(VerificationError, match="as LlamaForCausalLM, saved was ViT"):
        verify_files(folder, build(VISION_ROW))


def test_a_truncated_file_is_refused(small: PreTrainedModel, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(VerificationError, match="does not load"):
        verified(folder, small)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files_are_refused(small: PreTrainedModel, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(VerificationError, match="does not load with transformers"):
        verified(folder, small)


@pytest.mark.parametrize(
    "fields", [{"model_type": "unknown"}, {"architectures": None}, {"architectures": ["Nothing"]}, {"hidden_size": 60}]
)
def test_damaged_configs_are_refused(small: PreTrainedModel, folder: Path, fields: dict[str, object]) -> None:
    edit_config(folder, **fields)
    with pytest.raises(VerificationError):
        verified(folder, small)


def test_another_class_is_refused(small: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(VerificationError, match="as LlamaForCausalLM, saved was ViT"):
        verified(folder, build(VISION_ROW), inputs_of(small))


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


# ------------------------------------------------------------------ every head, every output


HEADS = {
    "answers": Row("LlamaForQuestionAnswering", "LlamaConfig", LM_ROW.fields, LM_ROW.slim),
    "classes of sequences": Row("LlamaForSequenceClassification", "LlamaConfig", LM_ROW.fields, LM_ROW.slim),
    "no padding": Row(
        "Qwen2ForSequenceClassification", "Qwen2Config", ROWS["qwen2"].fields | {"pad_token_id": None}, LM_ROW.slim
    ),
    "classes of tokens": Row("LlamaForTokenClassification", "LlamaConfig", LM_ROW.fields, LM_ROW.slim),
    "masked images": Row(
        "ViTForMaskedImageModeling", "ViTConfig", VISION_ROW.fields | {"encoder_stride": 8}, VISION_ROW.slim
    ),
    "two heads": Row("DeiTForImageClassificationWithTeacher", "DeiTConfig", ROWS["deit"].fields, VISION_ROW.slim),
    "feature maps": Row(
        "Dinov2Backbone",
        "Dinov2Config",
        VISION | {"mlp_ratio": 2, "out_indices": [1, 2, 4]},
        Shape(4, 4, 64, 4),
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_output_of_every_head_is_compared(tmp_path: Path, head: str) -> None:
    row = HEADS[head]
    model = gate(build(row))
    model.apply_plan(scattered_plan(model, row.slim))
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)
    small = model.merge_and_unload()
    save_slim(small, tmp_path / "slim", reference=expected, inputs=inputs)
    assert verify_slim(tmp_path / "slim", reference=small).ok
    for name, tensor in expected.items():
        changed = expected | {name: tensor + 1}
        with pytest.raises(VerificationError, match=name):
            verified(tmp_path / "slim", changed, inputs)
    fewer = dict(list(expected.items())[1:])
    with pytest.raises(VerificationError, match="the outputs are"):
        verified(tmp_path / "slim", fewer, inputs)


def test_one_row_where_no_token_is_padding_and_the_head_looks_for_the_end() -> None:
    rows = {head: len(inputs_of(build(HEADS[head]))["input_ids"]) for head in ("no padding", "classes of sequences")}
    assert rows == {"no padding": 1, "classes of sequences": 2}


# ------------------------------------------------------------------ what only looking at every byte tells


def touch_no_example(weights: dict[str, torch.Tensor]) -> None:
    used = set(inputs_of(build(LM_ROW))["input_ids"].flatten().tolist())
    row = next(token for token in range(128) if token not in used)
    weights["model.embed_tokens.weight"][row] += 1


def break_what_no_example_touches(weights: dict[str, torch.Tensor]) -> None:
    used = set(inputs_of(build(LM_ROW))["input_ids"].flatten().tolist())
    row = next(token for token in range(128) if token not in used)
    weights["model.embed_tokens.weight"][row] = torch.nan


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a row that no example touches": (
        lambda folder: edit_weights(folder, touch_no_example),
        "model.safetensors is not the file",
    ),
    "another field": (lambda folder: edit_config(folder, rms_norm_eps=1e-3), "config.json is not the file"),
    "a file that is gone": (lambda folder: (folder / "words.txt").unlink(), "words.txt is gone"),
    "an empty report": (lambda folder: (folder / REPORT_NAME).write_text(""), "is no JSON"),
    "a report of nothing": (lambda folder: (folder / REPORT_NAME).write_text("{}"), "of format None"),
    "a report of another format": (
        lambda folder: (folder / REPORT_NAME).write_text('{"format": 7}'),
        "of format 7",
    ),
    "a report that is a list": (lambda folder: (folder / REPORT_NAME).write_text("[]"), "must hold an object"),
    "a report without files": (
        lambda folder: (folder / REPORT_NAME).write_text('{"format": 1}'),
        "lists no files",
    ),
}


class Words:
    """A tokenizer of one file."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "words.txt").write_text("some words")


@pytest.mark.parametrize("change", CHANGES)
def test_changes_since_it_was_written_are_told(small: PreTrainedModel, tmp_path: Path, change: str) -> None:
    save_slim(small, tmp_path / "slim", processor=Words(), card=ExportFacts())
    assert verify_slim(tmp_path / "slim").ok
    make, words = CHANGES[change]
    make(tmp_path / "slim")
    found = verify_slim(tmp_path / "slim")
    assert not found.ok
    assert words in " ".join(found.problems)


def test_a_missing_report_is_said(small: PreTrainedModel, tmp_path: Path) -> None:
    save_slim(small, tmp_path / "slim", card=ExportFacts())
    (tmp_path / "slim" / REPORT_NAME).unlink()
    (check,) = [check for check in verify_slim(tmp_path / "slim").checks if check.ok is None]
    assert check.name == "report"
    assert "cannot be told" in check.detail


def test_a_weight_that_is_no_number_is_found_where_no_example_goes(small: PreTrainedModel, tmp_path: Path) -> None:
    broken = copy.deepcopy(small)
    state = broken.state_dict()
    break_what_no_example_touches(state)
    with pytest.raises(VerificationError, match=r"finite: model\.embed_tokens\.weight holds NaN"):
        save_slim(broken, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ what a base brings along


@pytest.mark.parametrize("cuts", [True, False], ids=["cut", "as it is"])
@pytest.mark.parametrize("field", LEFT_OVER)
def test_fields_of_other_files_are_left_out(tmp_path: Path, field: str, cuts: bool) -> None:
    model = build(LM_ROW)
    setattr(model.config, field, {"quant_method": "gguf", "AutoConfig": "configuration_custom.Config"})
    made = slim(model, scattered_plan(model, LM_ROW.slim)) if cuts else model
    save_slim(made, tmp_path / "slim")
    assert field not in json.loads((tmp_path / "slim" / "config.json").read_text())
    assert verify_slim(tmp_path / "slim").ok


def test_a_slim_model_has_no_name_until_it_is_saved(tmp_path: Path) -> None:
    build(LM_ROW).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = slim(model, scattered_plan(model, LM_ROW.slim))
    assert made.name_or_path == ""
    save_slim(made, tmp_path / "slim", card=ExportFacts())
    assert made.name_or_path == str(tmp_path / "slim")
    assert json.loads((tmp_path / "slim" / REPORT_NAME).read_text())["base"] == {"name": "base"}
    lora = get_peft_model(made, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert loaded.config.num_hidden_layers == LM_ROW.slim.num_hidden_layers


class Unserializable:
    """What transformers leaves on a model out of a GGUF file: a quantizer that refuses to save plain weights."""

    def is_serializable(self) -> bool:
        return False


@pytest.mark.parametrize("fold_only", [False, True])
def test_a_model_out_of_a_gguf_file_is_slimmed_and_saved_as_any(tmp_path: Path, fold_only: bool) -> None:
    base: Any = build(LM_ROW)
    base.config.quantization_config = {"quant_method": "gguf"}
    base.hf_quantizer, base.is_quantized, base.quantization_method = Unserializable(), True, "gguf"
    model: Any = gate(base)
    plan = Plan.keep_all(scattered_plan(model, LM_ROW.slim).dense) if fold_only else scattered_plan(model, LM_ROW.slim)
    model.apply_plan(plan)
    expected, inputs = logits_of(model), inputs_of(model)
    save_slim(model.merge_and_unload(), tmp_path / "slim", reference=expected, inputs=inputs)
    assert verify_slim(tmp_path / "slim").ok
    assert "quantization_config" not in json.loads((tmp_path / "slim" / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slim").save_pretrained(tmp_path / "again")


def test_a_folder_with_a_gguf_file_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"gguf_file=.*merge_and_unload.*save_slim"):
        slim_checkpoint(tmp_path / "base", None, tmp_path / "slim")


REPORTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "weights that are not listed": lambda report: report["files"].pop("model.safetensors"),
    "a config that is not listed": lambda report: report["files"].pop("config.json"),
    "truth as a format": lambda report: report.update(format=True),
    "nothing": lambda report: report.clear(),
}


@pytest.mark.parametrize("change", [*REPORTS, "nested"])
def test_a_report_that_tells_too_little_is_told(small: PreTrainedModel, tmp_path: Path, change: str) -> None:
    save_slim(small, tmp_path / "slim", card=ExportFacts())
    assert verify_slim(tmp_path / "slim").ok
    path = tmp_path / "slim" / "hawada_report.json"
    report = json.loads(path.read_text())
    if change in REPORTS:
        REPORTS[change](report)
    path.write_text(json.dumps(report) if change in REPORTS else "[" * 100_000)
    found = verify_slim(tmp_path / "slim")
    assert not found.ok
    assert [check.name for check in found.checks if check.ok is False] == ["report"]


@pytest.mark.parametrize(
    "options",
    [
        {"inputs": 3},
        {"inputs": {}},
        {"inputs": {"input_ids": torch.full((1, 4), 999)}},
        {"inputs": {"pixel_values": torch.ones(1, 3, 8, 8)}},
        {"runtimes": 3},
        {"tolerance": -1},
        {"tolerance": float("nan")},
        {"tolerance": "x"},
    ],
)
def test_options_of_a_verification_that_mean_nothing_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(HawAdaError):
        verify_slim(folder, **options)


@pytest.mark.parametrize(
    ("place", "options"),
    [(3, {}), (None, {}), ("slim", {"card": 3}), ("slim", {"card": {}}), ("slim", {"processor": 3})],
)
def test_what_save_slim_cannot_use_is_refused(
    small: PreTrainedModel, tmp_path: Path, place: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(HawAdaError, match="must be"):
        save_slim(small, tmp_path / place if isinstance(place, str) else place, **options)
    assert not list(tmp_path.iterdir())
