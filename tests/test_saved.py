"""An adapter's file holds exactly its own tensors, or is refused, whoever loads it."""

from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    EVERYTHING,
    LM_ROW,
    ROWS,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    difference,
    gate,
    logits_of,
    scattered_plan,
    state_of,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hawada_peft import HawAdaConfig, slim_checkpoint
from hawada_peft.errors import BrokenGatesError, HawAdaError, IncompatibleBaseError

Weights = dict[str, torch.Tensor]
FILE = "adapter_model.safetensors"


def by_peft(base: Path, adapter: Path, row: Row) -> object:
    return PeftModel.from_pretrained(build(row), adapter)


def into_an_adapter(base: Path, adapter: Path, row: Row) -> object:
    return PeftModel.from_pretrained(build(row), base.parent / "adapter").load_adapter(adapter, "default")


def from_files(base: Path, adapter: Path, row: Row) -> object:
    return slim_checkpoint(base, adapter, base.parent / "slim")


WAYS: dict[str, Callable[[Path, Path, Row], object]] = {
    "from_pretrained": by_peft,
    "load_adapter": into_an_adapter,
    "slim_checkpoint": from_files,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases and adapters with everything that an adapter may hold: gates, LoRA, a trained head."""
    folder = tmp_path_factory.mktemp("made")
    for name, row, head in (("llama", LM_ROW, "lm_head"), ("vit", VISION_ROW, "classifier")):
        base = build(row)
        base.save_pretrained(folder / name / "base")
        lora = {"target_modules": "all-linear"} if row is LM_ROW else None
        model = gate(base, gates=EVERYTHING, lora=lora, modules_to_save=[head])
        model.apply_plan(scattered_plan(model, row.slim))
        model.save_pretrained(folder / name / "adapter")
    return {name: folder / name for name in ("llama", "vit")}


def edited(made: Path, tmp_path: Path, edit: Callable[[Weights], object]) -> Path:
    """A copy of an adapter with other weights."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((made / "adapter" / "adapter_config.json").read_bytes())
    weights = load_file(made / "adapter" / FILE)
    edit(weights)
    save_file(weights, adapter / FILE)
    return adapter


def first(weights: Weights, part: str) -> str:
    return next(name for name in weights if part in name)


def set_first(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], object]:
    def edit(weights: Weights) -> None:
        name = first(weights, part)
        weights[name] = change(weights[name]).contiguous()

    return edit


def rename_first(part: str, new: Callable[[str], str]) -> Callable[[Weights], object]:
    return lambda weights: weights.update({new(name := first(weights, part)): weights.pop(name)})


def smuggle(weights: Weights) -> None:
    inside = first(weights, "lora_A")
    weights[inside.replace("lora_A.weight", "base_layer.weight")] = torch.ones(3, 3)


THETA = "hawada_units"
BAD: dict[str, tuple[Callable[[Weights], object], str]] = {
    "no gates": (
        lambda weights: [weights.pop(name) for name in list(weights) if "hawada_" in name],
        "lacks the weights.*hawada_",
    ),
    "without a gate": (lambda weights: weights.pop(first(weights, THETA)), "lacks the weights.*hawada_units"),
    "without a LoRA": (lambda weights: weights.pop(first(weights, "lora_A")), "lacks the weights.*lora_A"),
    "misnamed gate": (rename_first(THETA, lambda name: name.replace("theta", "teta")), "lacks the weights.*theta"),
    "a gate named as a weight": (
        rename_first(THETA, lambda name: name.split(f".{THETA}")[0] + ".weight"),
        "lacks the weights.*hawada_units",
    ),
    "one more": (lambda weights: weights.update(more=torch.ones(1)), r"holds \['more'\]: none of its gates"),
    "a base weight": (
        lambda weights: weights.update({"base_model.model.model.norm.weight": torch.ones(64)}),
        "holds.*norm.weight.*none of its gates",
    ),
    "a wrapped base weight": (smuggle, "holds.*base_layer.weight.*none of its gates"),
    "another size": (set_first(THETA, lambda theta: theta[:-1]), "of shape .* expected is"),
    "another LoRA size": (set_first("lora_B", lambda tensor: tensor.T), "of shape .* expected is"),
    "bool": (set_first(THETA, lambda theta: theta > 0), "as torch.bool; allowed are"),
    "integers": (set_first(THETA, lambda theta: theta.view(torch.int32)), "as torch.int32; allowed are"),
    "complex": (set_first(THETA, lambda theta: theta.to(torch.complex64)), "as torch.complex64; allowed are"),
    "eight bits": (set_first(THETA, lambda theta: theta.to(torch.float8_e4m3fn)), "as torch.float8_e4m3fn; allowed"),
    "another dtype than its neighbours": (set_first(THETA, lambda theta: theta.half()), "of several dtypes"),
    **{
        f"{value} in {part}": (set_first(part, lambda tensor, value=value: tensor * value), "must be finite")  # type: ignore[misc]
        for value in (torch.nan, torch.inf, -torch.inf)
        for part in (THETA, "hawada_layer", "lora_A", "head")
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD)
def test_other_tensors_are_refused_by_name(made: dict[str, Path], tmp_path: Path, bad: str, way: str) -> None:
    edit, words = BAD[bad]
    adapter = edited(made["llama"], tmp_path, edit)
    with pytest.raises(HawAdaError, match=words):
        WAYS[way](made["llama"] / "base", adapter, LM_ROW)
    assert not (made["llama"] / "slim").exists()


@pytest.mark.parametrize("way", ["from_pretrained", "slim_checkpoint"])
def test_an_empty_file_is_refused(made: dict[str, Path], tmp_path: Path, way: str) -> None:
    adapter = edited(made["llama"], tmp_path, lambda weights: weights.clear())
    with pytest.raises(HawAdaError, match="lacks the weights"):
        WAYS[way](made["llama"] / "base", adapter, LM_ROW)


def test_whole_numbers_in_a_module_to_save_are_loaded(tmp_path: Path) -> None:
    def fresh() -> PeftModel:
        torch.manual_seed(0)
        layers = OrderedDict(fc=torch.nn.Linear(4, 4), norm=torch.nn.BatchNorm1d(4))
        config = HawAdaConfig(target_modules=["fc"], modules_to_save=["norm"])
        return get_peft_model(torch.nn.Sequential(layers), config)  # type: ignore[arg-type]

    model = fresh()
    model(torch.randn(3, 4))
    model.save_pretrained(tmp_path)
    loaded = fresh()
    loaded.load_adapter(tmp_path, "default")
    assert_same_state(state_of(loaded), state_of(model))


@pytest.mark.parametrize("way", ["from_pretrained", "slim_checkpoint"])
@pytest.mark.parametrize("part", ["classifier.bias", "classifier.weight", "classifier"])
def test_a_head_that_is_missing_is_refused_by_name(made: dict[str, Path], tmp_path: Path, part: str, way: str) -> None:
    def edit(weights: Weights) -> None:
        for name in [name for name in weights if f".{part}" in name]:
            del weights[name]

    adapter = edited(made["vit"], tmp_path, edit)
    with pytest.raises(HawAdaError, match=r"lacks the weights.*classifier\."):
        WAYS[way](made["vit"] / "base", adapter, VISION_ROW)


def test_an_adapter_without_weights_is_refused_by_its_folder(made: dict[str, Path], tmp_path: Path) -> None:
    adapter = edited(made["vit"], tmp_path, lambda weights: None)
    (adapter / FILE).unlink()
    with pytest.raises(HawAdaError, match="holds no weights of an adapter"):
        from_files(made["vit"] / "base", adapter, VISION_ROW)


@pytest.mark.parametrize(
    ("model", "config", "task"),
    [
        ("Qwen2ForSequenceClassification", "Qwen2Config", "SEQ_CLS"),
        ("MistralForTokenClassification", "MistralConfig", "TOKEN_CLS"),
        ("LlamaForQuestionAnswering", "LlamaConfig", "QUESTION_ANS"),
        ("GraniteForCausalLM", "GraniteConfig", "CAUSAL_LM"),
        ("Qwen3Model", "Qwen3Config", "FEATURE_EXTRACTION"),
    ],
)
def test_heads_that_peft_trains_by_the_task_are_loaded_and_slimmed(
    tmp_path: Path, model: str, config: str, task: str
) -> None:
    row = Row(model, config, LM_ROW.fields, LM_ROW.slim)
    build(row).save_pretrained(tmp_path / "base")
    gated = gate(build(row), task_type=task)
    for name, parameter in gated.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.3
    gated.apply_plan(gated.plan(keep_ratio=0.5))
    expected = logits_of(gated)
    gated.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(row), tmp_path / "adapter").eval()
    assert difference(logits_of(loaded), expected) <= 1e-6
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", verify="full")
    assert difference(logits_of(loaded.merge_and_unload()), expected) <= 1e-5


@pytest.mark.parametrize(
    "lora", [{"r": "x"}, {"r": 0}, {"r": 2, "target_modules": "(["}, {"r": 2, "lora_dropout": "x"}]
)
def test_lora_fields_of_other_types_are_told(lora: dict[str, object]) -> None:
    with pytest.raises(HawAdaError, match="lora"):
        gate(build(LM_ROW), lora={"target_modules": ["q_proj"]} | lora)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "cut", "text"])
def test_what_is_no_file_of_weights_is_refused_and_not_waited_for(
    made: dict[str, Path], tmp_path: Path, kind: str, way: str
) -> None:
    adapter = edited(made["llama"], tmp_path, lambda weights: None)
    whole = (adapter / FILE).read_bytes()
    (adapter / FILE).unlink()
    if kind == "pipe":
        os.mkfifo(adapter / FILE)
    elif kind == "folder":
        (adapter / FILE).mkdir()
    else:
        (adapter / FILE).write_bytes(whole[:-10] if kind == "cut" else b"weights")
    load = WAYS[way] if way != "load_adapter" else lambda *_: gate(build(LM_ROW)).load_adapter(adapter, "second")
    with pytest.raises(HawAdaError, match="is not a file" if kind in ("pipe", "folder") else "is damaged"):
        load(made["llama"] / "base", adapter, LM_ROW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_an_adapter_saved_in_another_floating_dtype_loads(
    made: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    def cast(weights: Weights) -> None:
        weights.update({name: tensor.to(dtype) for name, tensor in weights.items()})

    adapter = edited(made["llama"], tmp_path, cast)
    by_peft(made["llama"] / "base", adapter, LM_ROW)
    slim_checkpoint(made["llama"] / "base", adapter, tmp_path / "slim")


# ------------------------------------------------------------------ embeddings in an adapter


def with_more_tokens(row: Row, tokens: int, **fields: Any) -> PreTrainedModel:
    model = build(row, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(tokens)
    return model


def trained(row: Row, folder: Path, tokens: int, **fields: Any) -> torch.Tensor:
    """An adapter whose file holds trained embeddings; the gated model's logits."""
    model = gate(with_more_tokens(row, tokens, **fields))
    base = model.get_base_model()
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.7)
        base.get_output_embeddings().weight.add_(0.3)
    model.apply_plan(scattered_plan(model, row.slim))
    model.save_pretrained(folder, save_embedding_layers=True)
    return model(input_ids=torch.arange(12)[None]).logits.detach()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "granite"])
def test_embeddings_in_the_file_are_exported_the_same_in_memory_and_from_files(
    tmp_path: Path, name: str, tied: bool
) -> None:
    row, tokens, fields = ROWS[name], 131, {"tie_word_embeddings": tied}
    expected = trained(row, tmp_path / "adapter", tokens, **fields)
    with_more_tokens(row, tokens, **fields).save_pretrained(tmp_path / "base")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", verify="full", card=None)
    dense: Any = getattr(transformers, row.model).from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "slim" / file.name).read_bytes() == file.read_bytes(), file.name
    found = getattr(transformers, row.model).from_pretrained(tmp_path / "slim").eval()
    assert torch.allclose(found(input_ids=torch.arange(12)[None]).logits, expected, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_of_another_size_are_refused_with_what_to_do(tmp_path: Path, way: str) -> None:
    trained(LM_ROW, tmp_path / "adapter", 131)
    build(LM_ROW).save_pretrained(tmp_path / "base")
    with pytest.raises(IncompatibleBaseError, match=r"resize the base first, `base.resize_token_embeddings\(131\)`"):
        WAYS[way](tmp_path / "base", tmp_path / "adapter", LM_ROW)


# ------------------------------------------------------------------ a trained head of a tied model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("name", ["smollm3", "llama", "qwen3", "granite"])
@pytest.mark.parametrize("cuts", [True, False], ids=["cut", "folded only"])
def test_tied_tensors_of_which_one_was_trained_are_untied(tmp_path: Path, name: str, module: str, cuts: bool) -> None:
    row = ROWS[name]
    base = build(row, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = gate(base, modules_to_save=[module])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"{module}.modules_to_save" in key:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    plan = scattered_plan(model, row.slim) if cuts else model.plan(keep_ratio=1.0)
    model.apply_plan(plan)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=torch.arange(12)[None]).logits.detach()
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", verify="full", card=None)
    dense: Any = getattr(transformers, row.model).from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "slim" / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads((tmp_path / "slim" / "config.json").read_text())["tie_word_embeddings"] is False
    found = getattr(transformers, row.model).from_pretrained(tmp_path / "slim").eval()
    assert torch.allclose(found(input_ids=torch.arange(12)[None]).logits, expected, atol=1e-4)


def test_a_refused_file_changes_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(build(LM_ROW), made["llama"] / "adapter")
    before = {name: tensor for name, tensor in state_of(model).items() if "second" not in name}
    adapter = edited(made["llama"], tmp_path, BAD["a base weight"][0])
    with pytest.raises(HawAdaError):
        model.load_adapter(adapter, "default")
    after = state_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_broken_gates_are_called_so(made: dict[str, Path], tmp_path: Path) -> None:
    adapter = edited(made["llama"], tmp_path, BAD[f"nan in {THETA}"][0])
    with pytest.raises(BrokenGatesError, match="hawada_units"):
        by_peft(made["llama"] / "base", adapter, LM_ROW)
