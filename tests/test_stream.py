"""Slimming from files to files: the bytes of the export in memory, clear refusals, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, ROWS, VISION_ROW, Export, Row, build, gate, scattered_plan
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hawada_peft import ExportFacts, Plan, slim, slim_checkpoint
from hawada_peft.cli.program import app
from hawada_peft.errors import (
    BrokenGatesError,
    HawAdaError,
    IncompatibleBaseError,
    InvalidPlanError,
    UnsupportedModelError,
)
from hawada_peft.files.checkpoint import Checkpoint
from hawada_peft.files.names import CARD_NAME, REPORT_NAME
from hawada_peft.surgery.fold import lora_of
from hawada_peft.vanilla.family import locate

SMALL = "20KB"
LORA = {"r": 3, "target_modules": "all-linear", "lora_dropout": 0.1}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_files(found: Path, expected: Path) -> None:
    """All of the model's files; the card and the report come on top."""
    assert names_in(found) == sorted([*names_in(expected), CARD_NAME, REPORT_NAME])
    different = [name for name, data in files_of(expected).items() if files_of(found)[name] != data]
    assert different == []


def save_adapter(base: PreTrainedModel, row: Row, folder: Path, **options: Any) -> None:
    model = gate(base, **({"gates": EVERYTHING} | options))
    model.apply_plan(scattered_plan(model, row.slim))
    model.save_pretrained(folder)


def load(folder: Path) -> PreTrainedModel:
    row = next(row for row in ROWS.values() if row.model == AutoConfig.from_pretrained(folder).architectures[0])
    return type(build(row)).from_pretrained(folder, dtype="auto")


def in_memory(folder: Path, *, max_shard_size: str = "50GB", **options: Any) -> Path:
    model = PeftModel.from_pretrained(load(folder / "base"), folder / "adapter")
    model.merge_and_unload(**options).save_pretrained(folder / "expected", max_shard_size=max_shard_size)
    return folder / "expected"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a language model in `base` and gates with a plan in `adapter`."""
    model = build(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, LM_ROW, tmp_path / "adapter")
    return tmp_path


def edit_base(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("name", ["llama", "smollm3", "vit"])
def test_bytes_are_those_in_memory_with_a_narrower_stream(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    base = build(row)
    base.save_pretrained(tmp_path / "base")
    model = gate(base, gates=(*EVERYTHING, "hidden"))
    model.apply_plan(model.plan(replace(row.slim, hidden_size=48)))
    model.save_pretrained(tmp_path / "adapter")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    assert_same_files(tmp_path / "slim", in_memory(tmp_path))
    dense = json.loads((tmp_path / "slim" / REPORT_NAME).read_text())["dense"]
    assert (dense["hidden_size"], dense["parameters"]) == (64, build(row).num_parameters())
    assert "| 64 | 48 | 75% |" in (tmp_path / "slim" / CARD_NAME).read_text()


def test_bytes_are_those_of_the_export_in_memory(exported: Export, tmp_path: Path) -> None:
    build(exported.row).save_pretrained(tmp_path / "base")
    slim_checkpoint(tmp_path / "base", exported.adapter, tmp_path / "slim")
    assert_same_files(tmp_path / "slim", exported.folder)


def test_bytes_of_many_files_in_half_precision(row: Row, tmp_path: Path) -> None:
    model = build(row, torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size=SMALL)
    save_adapter(model, row, tmp_path / "adapter")
    written = slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", max_shard_size=SMALL)
    expected = in_memory(tmp_path, max_shard_size=SMALL)
    assert len(list(expected.glob("model-*.safetensors"))) > 1
    assert_same_files(tmp_path / "slim", expected)
    stored = [load_file(file) for file in expected.glob("*.safetensors")]
    assert written.weight_bytes == sum(tensor.nbytes for file in stored for tensor in file.values())


@pytest.mark.parametrize("options", [{"fold": False}, {"plan": True}, {"plan": True, "fold": False}], ids=str)
def test_bytes_with_another_plan_or_without_soft_values(folder: Path, options: dict[str, Any]) -> None:
    if "plan" in options:
        options = options | {"plan": scattered_plan(build(LM_ROW), LM_ROW.slim, seed=7)}
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", **options)
    assert_same_files(folder / "slim", in_memory(folder, **options))


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])
def test_bytes_of_a_plan_that_only_folds(row: Row, tmp_path: Path) -> None:
    model = build(row)
    model.save_pretrained(tmp_path / "base", max_shard_size=SMALL)
    save_adapter(model, row, tmp_path / "adapter")
    plan = Plan.keep_all(locate(build(row)).dense)
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", plan=plan, max_shard_size=SMALL)
    assert_same_files(tmp_path / "slim", in_memory(tmp_path, plan=plan, max_shard_size=SMALL))


def test_bytes_without_an_adapter(folder: Path) -> None:
    plan = scattered_plan(build(LM_ROW), LM_ROW.slim)
    slim_checkpoint(folder / "base", None, folder / "slim", plan=plan)
    slim(load(folder / "base"), plan).save_pretrained(folder / "expected")
    assert_same_files(folder / "slim", folder / "expected")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_of_modules_trained_with_the_gates(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(VISION_ROW, dtype)
    model.save_pretrained(tmp_path / "base")
    gated = gate(model, modules_to_save=["classifier"])
    gated.apply_plan(scattered_plan(gated, VISION_ROW.slim))
    with torch.no_grad():
        gated.base_model.model.classifier.weight.mul_(1.7)
    gated.save_pretrained(tmp_path / "adapter")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    expected = in_memory(tmp_path)
    assert_same_files(tmp_path / "slim", expected)
    found = load_file(tmp_path / "slim" / "model.safetensors")["classifier.weight"]
    assert not torch.equal(found, load_file(tmp_path / "base" / "model.safetensors")["classifier.weight"])


def save_joint(base: PreTrainedModel, row: Row, folder: Path, lora: dict[str, Any] = LORA, **options: Any) -> None:
    """Gates and LoRA, both far from their start."""
    model = gate(base, gates=EVERYTHING, lora=lora, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.apply_plan(scattered_plan(model, row.slim))
    model.save_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "smollm3", "vit", "dinov2"])
def test_bytes_with_lora_below_the_gates(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    row = ROWS[name]
    model = build(row, dtype)
    model.save_pretrained(tmp_path / "base")
    save_joint(model, row, tmp_path / "adapter")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    assert_same_files(tmp_path / "slim", in_memory(tmp_path))


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 3}}),
        ("vit", {"lora_bias": True}),
        ("vit", {"target_modules": ["projection", "classifier"]}),
    ],
    ids=["DoRA", "embedding", "patterns", "biases", "convolution"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_with_other_kinds_of_lora(name: str, lora: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    row = ROWS[name]
    model = build(row, dtype)
    model.save_pretrained(tmp_path / "base")
    save_joint(model, row, tmp_path / "adapter", lora={**LORA, **lora})
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    # In bfloat16 such a model is a sixth of its largest logit off its float64 self; there both ways agree to 0.
    assert_same_files(tmp_path / "slim", in_memory(tmp_path, verify=dtype is not torch.bfloat16))


@pytest.mark.parametrize("folds", [True, False], ids=["a plan that only folds", "no soft values"])
def test_lora_is_merged_whatever_becomes_of_the_gates(folds: bool, tmp_path: Path) -> None:
    model = build(LM_ROW)
    options: dict[str, Any] = {"plan": Plan.keep_all(locate(model).dense)} if folds else {"fold": False}
    model.save_pretrained(tmp_path / "base", max_shard_size=SMALL)
    save_joint(model, LM_ROW, tmp_path / "adapter")
    options = options | {"max_shard_size": SMALL}
    found = slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", verify="full", **options)
    assert_same_files(tmp_path / "slim", in_memory(tmp_path, **options))
    assert found.verification


def test_lora_on_other_modules_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedModelError, match=r"LoRA on \['attention'\].*merge_and_unload"):
        lora_of(get_peft_model(model, LoraConfig(target_modules=["attention"])))


def test_broken_lora_is_refused(tmp_path: Path) -> None:
    build(VISION_ROW).save_pretrained(tmp_path / "base")
    save_joint(build(VISION_ROW), VISION_ROW, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, file)
    with pytest.raises(BrokenGatesError, match=r"NaNs detected.*lora_A"):
        slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    assert names_in(tmp_path) == ["adapter", "base"]


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_bytes_of_tied_embeddings(stored: str, tmp_path: Path) -> None:
    model = build(LM_ROW, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, LM_ROW, tmp_path / "adapter")

    def move(weights: dict[str, torch.Tensor]) -> None:
        if stored != "embedding":
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if stored == "head":
            del weights["model.embed_tokens.weight"]

    edit_base(tmp_path, move)
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    assert_same_files(tmp_path / "slim", in_memory(tmp_path))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_bytes_if_the_config_names_another_dtype_than_the_file(folder: Path, dtype: str | None) -> None:
    edit_config(folder, dtype=dtype)
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    assert_same_files(folder / "slim", in_memory(folder))


def test_generation_config_and_labels_survive(folder: Path) -> None:
    edit_config(folder, id2label={0: "cat", 1: "dog"})
    GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=5).save_pretrained(folder / "base")
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    assert_same_files(folder / "slim", in_memory(folder))
    assert GenerationConfig.from_pretrained(folder / "slim").temperature == 0.3


def test_parts_of_a_tensor_make_it_up(folder: Path) -> None:
    checkpoint = Checkpoint(folder / "base")
    for name, tensor in load_file(folder / "base" / "model.safetensors").items():
        rows = torch.tensor([row for row in range(len(tensor)) if row % 3])
        for size in (1, 1000, 10**9, None):
            parts = list(checkpoint.parts(name, size=size))
            assert torch.equal(torch.cat(parts), tensor)
            assert size is None or all(part.nbytes <= max(size, tensor[:1].nbytes) for part in parts)
            assert torch.equal(torch.cat(list(checkpoint.parts(name, rows, size))), tensor[rows])


# ------------------------------------------------------------------ what else is in the folder


def test_companions_are_copied_and_nothing_else(folder: Path) -> None:
    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "base")
    mine = {"chat_template.jinja", "preprocessor_config.json", "LICENSE", "additional_chat_templates/tool.jinja"}
    others = {"README.md", "pytorch_model.bin", "model.onnx", ".gitattributes", "runs/log", "params.json"}
    for name in mine | others:
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_text(name)
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    found = {str(path.relative_to(folder / "slim")) for path in (folder / "slim").rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert found == mine | own | {CARD_NAME, REPORT_NAME}
    assert all((folder / "slim" / name).read_text() == name for name in mine)
    assert AutoTokenizer.from_pretrained(folder / "slim").get_vocab() == words


def test_card_and_report_say_what_was_cut(folder: Path) -> None:
    (folder / "base" / REPORT_NAME).write_text("of the dense model")
    written = slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", verify="full")
    report = json.loads((folder / "slim" / REPORT_NAME).read_text())
    assert Plan.from_dict(report["plan"]) == written.plan
    assert report["base"] == {"name": "base"}
    assert report["dense"]["parameters"] == written.dense_parameters
    assert report["model"]["parameters"] == written.parameters
    assert report["verification"]["parameters"] == written.parameters
    card = (folder / "slim" / CARD_NAME).read_text()
    assert "base, slimmed" in card
    assert "What was cut" in card


def test_facts_about_the_export_are_added_or_left_out(folder: Path) -> None:
    card = ExportFacts(license="mit", repo_id="me/slim")
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", card=card)
    report = json.loads((folder / "slim" / REPORT_NAME).read_text())
    assert report["base"] == {"name": "base", "license": "mit"}
    assert "plan" in report
    (folder / "base" / REPORT_NAME).write_text("of the dense model")
    slim_checkpoint(folder / "base", folder / "adapter", folder / "bare", card=None)
    assert not {CARD_NAME, REPORT_NAME} & set(names_in(folder / "bare"))


def test_facts_that_contradict_the_model_are_refused_before_anything_is_written(folder: Path) -> None:
    card = ExportFacts(plan=Plan.keep_all(locate(build(LM_ROW)).dense))
    with pytest.raises(InvalidPlanError, match="the slim model has"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", card=card)
    assert names_in(folder) == ["adapter", "base"]


@pytest.mark.parametrize("fold", [True, False])
def test_full_verification_compares_logits(folder: Path, fold: bool) -> None:
    found = slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", fold=fold, verify="full")
    assert found.verification
    assert found.verification.max_difference <= 1e-5 * found.verification.scale
    assert found.parameters == found.verification.parameters < found.dense_parameters


# ------------------------------------------------------------------ bad input


def rename(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.startswith("model.")]:
        weights[name.removeprefix("model.")] = weights.pop(name)


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (
            lambda weights: weights.pop(NAME),
            "exactly the weights of LlamaForCausalLM.*missing.*layers.1.mlp.down_proj",
        ),
        (lambda weights: weights.update(extra=torch.zeros(1)), "exactly the weights of Llama.*unexpected.*extra"),
        (lambda weights: weights.update({NAME: torch.zeros(64, 7)}), "does not load as LlamaForCausalLM"),
        (rename, "does not store.*model.embed_tokens.weight.*save it again with `save_pretrained`"),
        (
            lambda weights: weights.update({NAME: weights[NAME].to(torch.float8_e4m3fn)}),
            r"stores weights as \['F8_E4M3'\].*unquantised",
        ),
    ],
    ids=["missing", "unexpected", "of another shape", "of other names", "of eight bits"],
)
def test_other_weights_are_refused(folder: Path, edit: Callable[..., object], facts: str) -> None:
    edit_base(folder, edit)
    with pytest.raises(UnsupportedModelError, match=facts):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    assert names_in(folder) == ["adapter", "base"]


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    build(LM_ROW, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    edit_base(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(128, 64)}))
    with pytest.raises(UnsupportedModelError, match=r"different weights.*lm_head.*tie_word_embeddings"):
        Checkpoint(tmp_path / "base")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"neither model.safetensors nor.*only \['pytorch_model.bin'\]"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="does not load as LlamaForCausalLM"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")


def test_a_quantised_base_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnsupportedModelError, match=r"quantised.*dense model"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")


def test_a_base_that_is_nowhere_is_refused(folder: Path) -> None:
    with pytest.raises(OSError, match="nowhere/model"):
        slim_checkpoint("nowhere/model", folder / "adapter", folder / "slim")


def test_no_plan_is_refused(folder: Path) -> None:
    gate(build(LM_ROW)).save_pretrained(folder / "bare")
    for adapter in (folder / "bare", None):
        with pytest.raises(InvalidPlanError, match="there is no plan: apply one"):
            slim_checkpoint(folder / "base", adapter, folder / "slim")


def test_gates_and_plans_for_another_base_are_refused(folder: Path) -> None:
    other = build(LM_ROW, intermediate_size=128)
    plan = scattered_plan(other, LM_ROW.slim)
    save_adapter(other, LM_ROW, folder / "other")
    with pytest.raises(IncompatibleBaseError, match="intermediate_size: adapter 128, model 96"):
        slim_checkpoint(folder / "base", folder / "other", folder / "slim")
    for refused in (plan, Plan.keep_all(plan.dense)):
        with pytest.raises(IncompatibleBaseError, match="intermediate_size: plan 128, model 96"):
            slim_checkpoint(folder / "base", None, folder / "slim", plan=refused)


def test_other_adapters_are_refused(folder: Path) -> None:
    get_peft_model(build(LM_ROW), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    with pytest.raises(HawAdaError, match="type LORA, needed is one of type HAWADA"):
        slim_checkpoint(folder / "base", folder / "lora", folder / "slim")
    with pytest.raises(HawAdaError, match="does not hold an adapter"):
        slim_checkpoint(folder / "base", folder / "base", folder / "slim")


def test_damaged_gates_are_refused(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    gates = load_file(file)
    name = next(iter(gates))
    save_file(gates | {name: torch.full_like(gates[name], torch.nan)}, file)
    with pytest.raises(BrokenGatesError):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    save_file({key: gates[key] for key in gates if key != name}, file)
    with pytest.raises(HawAdaError, match="lacks the weights"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")


@pytest.mark.parametrize(
    ("options", "facts"), [({"verify": "no"}, "'files' or 'full', got 'no'"), ({"max_shard_size": "5"}, "max_shard")]
)
def test_unknown_options_are_refused_and_leave_nothing(folder: Path, options: dict[str, Any], facts: str) -> None:
    with pytest.raises(HawAdaError, match=facts):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "slim", **options)
    assert names_in(folder) == ["adapter", "base"]


def test_a_folder_that_holds_something_is_refused(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="not empty"):
        slim_checkpoint(folder / "base", folder / "adapter", folder / "base")


# ------------------------------------------------------------------ killed

KILL = """
import json, os, random, resource, shutil, signal, sys
from pathlib import Path
import torch
from hawada_peft import slim_checkpoint

torch.set_num_threads(1)  # those of a pool are not in a fork
base, adapter, target = map(Path, sys.argv[1:])

def export(at=None, size=None):
    "In a process of its own, which dies before the at-th use of a path, or by a file growing beyond a size."
    child = os.fork()
    if child == 0:
        seen = []
        def watch(event, arguments):
            if arguments and str(target.parent) in str(arguments[0]):
                seen.append(event)
                if len(seen) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        if size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        slim_checkpoint(base, adapter, target, max_shard_size="20KB")
        count.write_text(str(len(seen)))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files():
    return {path.name: path.read_bytes() for path in target.iterdir()}

count = target.parent / "count"
slim_checkpoint(base, adapter, target, max_shard_size="20KB")  # what it finds of the class is known to the forks
whole = files()
shutil.rmtree(target)
assert export() == 0
events = int(count.read_text())
assert files() == whole
shutil.rmtree(target)
found = []
random.seed(0)
ways = [{"at": at} for at in random.sample(range(1, events - 3), 3)]  # each finds what the one before left
ways += [{"size": 15000}] + [{"at": at, "clean": True} for at in range(events - 3, events + 1)]
for way in ways:
    if way.pop("clean", False):  # so that the same events are counted
        shutil.rmtree(target.parent / ".slim.hawada", ignore_errors=True)
    status = export(**way)
    state = "absent" if not target.exists() else "whole" if files() == whole else "half"
    shutil.rmtree(target, ignore_errors=True)
    found.append((status, state))
assert export() == 0
count.unlink()
print(json.dumps([found, files() == whole, sorted(path.name for path in target.parent.iterdir())]))
"""


def test_killed_at_any_moment_it_leaves_nothing_or_everything(folder: Path) -> None:
    (folder / "out").mkdir()
    paths = [str(folder / name) for name in ("base", "adapter", "out/slim")]
    ran = subprocess.run([sys.executable, "-c", KILL, *paths], check=True, stdout=subprocess.PIPE, text=True)
    found, repeated, left = json.loads(ran.stdout)
    assert {status for status, _ in found} == {-9, -25}
    assert {state for _, state in found} == {"absent", "whole"}
    assert repeated
    assert left == ["slim"]


# ------------------------------------------------------------------ command line


def test_command_writes_the_folder_and_says_so(folder: Path) -> None:
    plan = scattered_plan(build(LM_ROW), LM_ROW.slim, seed=7)
    (folder / "plan.json").write_text(plan.to_json())
    places = [str(folder / name) for name in ("base", "adapter", "slim")]
    result = CliRunner().invoke(app, ["slim", *places, "--json", "--plan", str(folder / "plan.json")])
    assert result.exit_code == 0
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["shape"] == LM_ROW.slim.to_dict()
    assert said["parameters"] == load(folder / "slim").num_parameters()
    assert_same_files(folder / "slim", in_memory(folder, plan=plan))


def test_command_explains_what_is_wrong(folder: Path) -> None:
    result = CliRunner().invoke(app, ["slim", str(folder / "base"), str(folder / "base"), str(folder / "slim")])
    assert result.exit_code == 1
    assert "does not hold an adapter" in result.output
