"""Models made of several: one tower is gated, planned, cut, written and loaded, and the rest stays bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import LM, SIZES, TOKENS, VISION, Row, assert_same_state, difference, first_of, gate, shuffle_gates
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, TrainingArguments, default_data_collator
from typer.testing import CliRunner
from zoo import ZOO

from hawada_peft import (
    ExportFacts,
    GateTrainingArguments,
    HawAdaConfig,
    HawAdaTrainer,
    LatencyBudget,
    Plan,
    Race,
    Shape,
    collect_gates,
    find_plan,
    init_gates,
    recover,
    save_slim,
    slim,
    slim_checkpoint,
    verify_slim,
)
from hawada_peft.cli.program import app
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.distil.raced import racing_towers
from hawada_peft.errors import (
    HawAdaError,
    IncompatibleBaseError,
    IncompatibleTableError,
    InvalidPlanError,
    InvalidRegimeError,
    UnsupportedModelError,
)
from hawada_peft.gates.reading import layers_of
from hawada_peft.latency import Effort, Regime, ToyClock
from hawada_peft.latency.runner import check_call, prepare
from hawada_peft.page import write_report
from hawada_peft.race import GIVEN, Judge, RaceRecord, field_of, fits_of, searched
from hawada_peft.race.candidates import RUNS, neighbours
from hawada_peft.refit.fidelity import divergence
from hawada_peft.search.result import SearchResult
from hawada_peft.search.timed import measure_table, regime_of, table_sizes
from hawada_peft.vanilla.batches import Batch
from hawada_peft.vanilla.family import FAMILIES, Part, among, locate, locate_all, lookup, together
from hawada_peft.vanilla.family.lookup import TOWERS
from hawada_peft.vanilla.outputs import output_of, outputs_of
from hawada_peft.vanilla.towers import towers_of

IMAGE, PATCHES = 120, 16
EYES = VISION | {"patch_size": 4}
CLIP = {
    "projection_dim": 32,
    "text_config": TOKENS | SIZES | {"eos_token_id": 127},
    "vision_config": EYES,
}
LLAVA = {
    "text_config": LM | {"model_type": "llama"},
    "vision_config": EYES | {"model_type": "clip_vision_model"},
    "image_token_index": IMAGE,
    "image_seq_length": PATCHES,
    "vision_feature_layer": -1,
    "pad_token_id": 0,
}
GEMMA = {
    "text_config": LM | {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "vision_config": EYES,
    "mm_tokens_per_image": PATCHES,
    "image_token_id": IMAGE,
    "boi_token_id": 121,
    "eoi_token_id": 122,
    "pad_token_id": 0,
}
DEPTH = {
    "backbone_config": SIZES | {"model_type": "dinov2", "image_size": 28, "patch_size": 7, "num_hidden_layers": 6,
                                "mlp_ratio": 2, "out_indices": [1, 3, 5, 6], "reshape_hidden_states": False},
    "patch_size": 7, "reassemble_hidden_size": 64, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8,
    "head_hidden_size": 8,
}  # fmt: skip
HALF, THIN, NARROW = Shape(4, 2, 40, 3), Shape(8, 8, 40, 3), Shape(4, 4, 64, 6)
BART = TOKENS | {
    "d_model": 64, "encoder_layers": 4, "decoder_layers": 4,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "forced_eos_token_id": None,
}  # fmt: skip
CASES: dict[str, tuple[Row, str]] = {
    "llava text": (Row("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, HALF), "text_config"),
    "llava vision": (Row("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, THIN), "vision_config"),
    "gemma3 text": (Row("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA, HALF), "text_config"),
    "clip text": (Row("CLIPModel", "CLIPConfig", CLIP, THIN), "text_config"),
    "clip vision": (Row("CLIPModel", "CLIPConfig", CLIP, THIN), "vision_config"),
    "depth": (Row("DepthAnythingForDepthEstimation", "DepthAnythingConfig", DEPTH, NARROW), "backbone_config"),
}

STACKS = Row("BartForConditionalGeneration", "BartConfig", BART, THIN)


def build(row: Row, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    model = getattr(transformers, row.model)(getattr(transformers, row.config)(**copy.deepcopy(row.fields)))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if "backbone_config" in row.fields:  # keeps the last ReLU open
        model.head.conv3.bias.data += 8
    return model.to(dtype).eval()


def example_of(row: Row, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = 28 if "backbone_config" in row.fields else 16
    pixels = torch.randn(2, 3, side, side, generator=generator, dtype=dtype)
    if "backbone_config" in row.fields:
        return {"pixel_values": pixels}
    tokens = torch.randint(5, 118, (2, 12), generator=generator)
    if row.model == "CLIPModel":
        tokens[:, -1] = 127
    else:
        tokens = torch.cat([tokens[:, :3], torch.full((2, PATCHES), IMAGE), tokens[:, 3:]], 1)
    return {"input_ids": tokens, "pixel_values": pixels}


def planned(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[PeftModel, Batch, Plan]:
    row, tower = CASES[name]
    model = gate(build(row, dtype), towers=(tower,), **options)
    plan = model.plan(row.slim)
    model.apply_plan(plan)
    return model, example_of(row, dtype), plan


@pytest.mark.parametrize("name", CASES)
def test_a_tower_slims_exactly_and_the_rest_stays(name: str) -> None:
    row, tower = CASES[name]
    dense = build(row, torch.float64)
    model, inputs, plan = planned(name, torch.float64)
    assert plan.tower == tower
    masked, before = outputs_of(model, inputs), outputs_of(dense, inputs)
    small = model.merge_and_unload(inputs=inputs)
    found = outputs_of(small, inputs)
    assert type(small) is type(dense)
    assert max(difference(found[key], masked[key]) for key in masked) <= 1e-7  # float32 constants inside
    assert max(difference(masked[key], before[key]) for key in masked) > 1e-6
    layout = locate(small)
    assert (layout.tower, layout.dense) == (tower, row.slim)
    prefix = f"{layout.stack}."
    outside = {key: value for key, value in small.state_dict().items() if not key.startswith(prefix)}
    assert_same_state(outside, {key: value for key, value in dense.state_dict().items() if not key.startswith(prefix)})


def assert_exported_from_files_as_in_memory(row: Row, model: PeftModel, inputs: Any, folder: Path) -> None:
    """Saved and loaded again, an adapter computes the same; its export from files in `slim` has the same bytes."""
    build(row).save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(build(row), folder / "adapter").eval()
    assert torch.equal(output_or_logits(again, inputs), output_or_logits(model, inputs))
    again.merge_and_unload(inputs=inputs).save_pretrained(folder / "expected")
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    mine, expected = (folder / each / "model.safetensors" for each in ("slim", "expected"))
    assert mine.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", first_of(["llava text", "llava vision", "clip text"], "llava text"))
def test_an_adapter_on_a_tower_is_saved_loaded_and_streamed_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    row, tower = CASES[name]
    model, inputs, _ = planned(name)
    assert_exported_from_files_as_in_memory(row, model, inputs, tmp_path)
    report = json.loads((tmp_path / "slim" / "hawada_report.json").read_text())
    assert report["plan"]["tower"] == report["model"]["tower"] == tower
    assert report["dense"]["parameters"] == build(row).num_parameters()
    assert f"{row.slim.intermediate_size}" in (tmp_path / "slim" / "README.md").read_text()


def output_or_logits(model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
    found = outputs_of(model, inputs)
    return torch.cat([value.flatten() for value in found.values()])


def test_a_slim_folder_loads_by_its_auto_class(tmp_path: Path) -> None:
    model, inputs, plan = planned("llava text")
    slimmed = model.slim(inputs=inputs)
    save_slim(slimmed.model, tmp_path / "slim", inputs=inputs, card=ExportFacts(plan=plan))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "slim")
    assert type(loaded) is type(slimmed.model)
    assert loaded.config.text_config.intermediate_size == 40
    assert torch.equal(output_of(loaded, inputs), output_of(slimmed.model, inputs))


def test_one_tower_after_the_other() -> None:
    text, inputs, _ = planned("llava text", torch.float64)
    smaller = gate(text.merge_and_unload(inputs=inputs), towers=("vision_config",))
    smaller.apply_plan(smaller.plan(THIN))
    masked = outputs_of(smaller, inputs)
    both = smaller.merge_and_unload(inputs=inputs)
    assert (locate(both, "text_config").dense, locate(both, "vision_config").dense) == (HALF, THIN)
    assert difference(output_of(both, inputs), masked["logits"]) <= 1e-12


@pytest.mark.parametrize(
    ("row", "towers"),
    [
        (CASES["llava text"][0], ["text_config", "vision_config"]),  # by rows that are written
        (CASES["clip text"][0], ["vision_config", "text_config"]),
        (STACKS, ["decoder", "encoder"]),  # by rows that are found
        (CASES["depth"][0], ["backbone_config"]),
    ],
    ids=["llava", "clip", "bart", "depth"],
)
def test_all_towers_are_gated_and_named(row: Row, towers: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hawada_peft"):
        model = get_peft_model(build(row), HawAdaConfig())
    assert f"gates are placed in {', '.join(map(repr, towers))} of {row.model}; `towers` says in which" in caplog.text
    assert [layout.tower for layout in locate_all(model.get_base_model())] == towers
    assert all(gates_in(model, tower) for tower in towers)
    assert model.peft_config["default"].towers == (towers if len(towers) > 1 else None)


def test_what_is_found_is_gated_beside_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CASES["gemma3 text"][0])
    eyes = towers_of(model)[2]
    assert eyes.path == "vision_config"
    vision = replace(FAMILIES["clip_vision_model"], layers="encoder.layers")
    part = Part(eyes.path, eyes.path, f"{eyes.root}.encoder.layers", vision)
    monkeypatch.setattr(lookup, "FINDERS", [lambda model: [part]])
    assert [layout.tower for layout in lookup.locate_every(model)] == ["text_config", "vision_config"]

    def refuse(model: Any) -> Any:
        raise UnsupportedModelError("no tiny copy runs")

    monkeypatch.setattr(lookup, "FINDERS", [refuse])
    assert [layout.tower for layout in lookup.locate_every(model)] == ["text_config"]


def test_a_second_adapter_gates_what_the_first_does() -> None:
    model = get_peft_model(build(CASES["clip text"][0]), HawAdaConfig(towers=("vision_config",)))
    model.add_adapter("other", HawAdaConfig())
    assert not [name for name in model.state_dict() if "hawada_" in name and "text_model" in name]


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_modules_of_the_other_tower_with_the_same_names_are_left_alone(layers: list[int] | None) -> None:
    model = get_peft_model(
        build(CASES["clip text"][0]), HawAdaConfig(towers="text_config", layers_to_transform=layers)
    )
    gated = {name.split(".layers.")[1][0] for name in model.state_dict() if "hawada_" in name and "text_model" in name}
    assert gated == {str(layer) for layer in layers or range(4)}
    assert not [name for name in model.state_dict() if "hawada_" in name and "vision_model" in name]


def test_gates_of_a_tower_learn() -> None:
    row, _ = CASES["llava text"]
    model = shuffle_gates(get_peft_model(build(row), HawAdaConfig(towers=("text_config",))))
    inputs = example_of(row)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_a_plan_of_one_tower_is_none_of_another() -> None:
    row, _ = CASES["clip text"]
    plan = gate(build(row), towers=("text_config",)).plan(keep_ratio=0.5)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(IncompatibleBaseError, match=r"plan is for the tower 'text_config'.*'vision_config'"):
        gate(build(row), towers=("vision_config",)).apply_plan(plan)


@pytest.mark.parametrize(
    ("towers", "facts"),
    [
        (
            ("audio_config",),
            r"LlavaForConditionalGeneration has no tower 'audio_config'. It has the towers",
        ),
        (("text_config", "text_config"), r"towers must name at least one tower, each once"),
        ((), r"towers must name at least one tower, each once"),
        (3, r"towers must be a string, or a list of strings, got 3"),
    ],
)
def test_a_wrong_tower_is_refused(towers: Any, facts: str) -> None:
    with pytest.raises((UnsupportedModelError, HawAdaError), match=facts):
        get_peft_model(build(CASES["llava text"][0]), HawAdaConfig(towers=towers))


def test_a_budget_for_a_tower_that_the_timing_does_not_reach_is_refused_before_the_work() -> None:
    row, tower = CASES["llava vision"]
    model = get_peft_model(build(row), HawAdaConfig(towers=(tower,)))
    with pytest.raises(
        InvalidRegimeError, match="timed on its input_ids alone, and 'vision_config' sees pixel_values"
    ):
        find_plan(
            model, LatencyBudget(speedup=1.5, seq_len=16), [example_of(row)], effort=Effort.quick(clock=ToyClock())
        )


def test_a_budget_for_a_language_model_inside_another_is_met() -> None:
    row, tower = CASES["llava text"]
    model = get_peft_model(build(row), HawAdaConfig(towers=(tower,)))
    effort = Effort.quick(clock=ToyClock())
    found = find_plan(model, LatencyBudget(speedup=1.5, seq_len=16), [example_of(row)], effort=effort, refit=False)
    assert found.plan is not None
    assert found.plan.tower == tower
    assert found.speedup >= 1.5


@pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
def test_a_budget_for_sound_is_refused(name: str) -> None:
    kind = ZOO[name]
    model = kind.model_class(kind.make_config())
    with pytest.raises(
        InvalidRegimeError, match=r"takes input_\w+, and .* give the sizes that are to stay, as a Shape"
    ):
        check_call(model, Regime(seq_len=8))


# ------------------------------------------------------------------ timed on all that a model takes

WHOLE = {
    "clip": Row("CLIPModel", "CLIPConfig", CLIP, THIN),
    "bart": Row("BartForConditionalGeneration", "BartConfig", BART, THIN),
}


@pytest.mark.parametrize(
    ("name", "tower"), [("clip", "text_config"), ("clip", "vision_config"), ("bart", "encoder"), ("bart", "decoder")]
)
def test_a_budget_for_a_part_of_a_whole_call_is_met(name: str, tower: str) -> None:
    row = WHOLE[name]
    base = build(row)
    inputs = example_inputs(base, rows=4, length=12)
    model = get_peft_model(base, HawAdaConfig(towers=(tower,)))
    budget, effort = LatencyBudget(speedup=1.2, batch_size=2, seq_len=12), Effort.quick(clock=ToyClock())
    assert regime_of(model, budget).mode == "forward"
    found = find_plan(model, budget, [inputs], effort=effort)
    assert found.plan is not None
    assert found.plan.tower == tower
    assert found.speedup >= 1.2
    model.apply_plan(found.plan)
    masked = outputs_of(model, inputs)
    small = model.merge_and_unload(inputs=inputs)
    got = outputs_of(small, inputs)
    assert max(difference(got[key], masked[key]) for key in masked) <= 1e-4
    assert locate(small).dense == found.plan.shape != locate(build(row), tower).dense


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_call_is_of_the_sizes_that_were_asked_for(name: str) -> None:
    model = build(WHOLE[name])
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    prepare(model, Regime(batch_size=3, seq_len=10)).call()
    assert seen[0]["input_ids"].shape == (3, 10)
    beside = {"clip": ("pixel_values", (3, 3, 16, 16)), "bart": ("decoder_input_ids", (3, 5))}[name]
    assert seen[0][beside[0]].shape == beside[1]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seq_len": 8, "mode": "prefill"}, "by a whole forward pass: mode must be 'forward', got 'prefill'"),
        ({"seq_len": 4096}, r"has \d+ positions, the regime needs 4096: ask for fewer tokens"),
        ({"seq_len": 8, "image_size": 32}, "images of its config's size: leave image_size out"),
        ({}, "takes tokens: the regime needs seq_len"),
    ],
)
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_call_of_other_sizes_is_refused(name: str, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRegimeError, match=said):
        check_call(build(WHOLE[name]), Regime(**asked))


def test_a_table_of_a_tower_is_none_beside_another_one() -> None:
    row = WHOLE["clip"]
    wide, narrow = (
        get_peft_model(build(each), HawAdaConfig(towers=("text_config",)))
        for each in (row, replace(row, fields=CLIP | {"vision_config": EYES | {"intermediate_size": 40}}))
    )
    sizes = [table_sizes(each.get_base_model()) for each in (wide, narrow)]
    assert sizes[0] != sizes[1]
    assert sizes[0] == table_sizes(get_peft_model(build(row), HawAdaConfig(towers=("text_config",))).get_base_model())


# ------------------------------------------------------------------ several towers in one plan

BOTH = ("text_config", "vision_config")
PAIRS = {
    "llava": ("llava text", {"text_config": HALF, "vision_config": THIN}),
    "clip": ("clip text", {"text_config": THIN, "vision_config": Shape(8, 8, 30, 2)}),
}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, Batch, Plan]:
    case, shapes = PAIRS[name]
    row, _ = CASES[case]
    model = gate(build(row, dtype), towers=BOTH)
    plan = model.plan(shapes)
    model.apply_plan(plan)
    return model, example_of(row, dtype), plan


@pytest.mark.parametrize("name", PAIRS)
def test_two_towers_are_cut_by_one_plan(name: str) -> None:
    case, shapes = PAIRS[name]
    model, inputs, plan = pair(name, torch.float64)
    assert {part.tower: part.shape for part in plan.parts} == shapes
    assert Plan.from_json(plan.to_json()) == plan
    assert [part.tower for part in Plan.from_json(plan.to_json()).parts] == list(BOTH)
    masked, before = outputs_of(model, inputs), outputs_of(build(CASES[case][0], torch.float64), inputs)
    small = model.merge_and_unload(inputs=inputs)
    found = outputs_of(small, inputs)
    assert max(difference(found[key], masked[key]) for key in masked) <= 1e-12
    assert max(difference(masked[key], before[key]) for key in masked) > 1e-6
    assert {layout.tower: layout.dense for layout in locate_all(small)} == shapes


@pytest.mark.parametrize("name", first_of(PAIRS, "llava"))
def test_two_towers_are_saved_loaded_and_streamed_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    case, shapes = PAIRS[name]
    row, _ = CASES[case]
    model, inputs, plan = pair(name)
    masked = output_or_logits(model, inputs)
    assert_exported_from_files_as_in_memory(row, model, inputs, tmp_path)
    loaded = type(build(row)).from_pretrained(tmp_path / "slim")
    assert difference(output_or_logits(loaded, inputs), masked) <= 1e-5
    report = json.loads((tmp_path / "slim" / "hawada_report.json").read_text())
    assert Plan.from_dict(report["plan"]) == plan
    assert report["dense"]["parameters"] == build(row).num_parameters()
    assert report["model"]["beside"] == {"vision_config": shapes["vision_config"].to_dict()}
    card = (tmp_path / "slim" / "README.md").read_text()
    assert f"| FFN channels of vision_config | 96 | {shapes['vision_config'].intermediate_size} |" in card
    assert card.count("Kept layers of ") == 2
    assert verify_slim(tmp_path / "slim", base=tmp_path / "base", adapter=tmp_path / "adapter").ok


def test_sizes_by_their_paths_and_ratios_of_one_tower() -> None:
    model = gate(build(CASES["llava text"][0]), towers=BOTH)
    plan = model.plan({"text_config.intermediate_size": 40, "vision_config.layers": 3})
    assert plan.sizes["text_config.intermediate_size"] == 40
    assert plan.sizes["vision_config.num_hidden_layers"] == 3
    assert plan.sizes["vision_config.intermediate_size"] == 96
    part = model.plan(keep_ratio={"vision_config.ffn": 0.5})
    assert part.sizes["vision_config.intermediate_size"] == 48
    assert str(part).startswith("Plan(vision_config: ")  # the other stays, and is not named
    assert model.plan(keep_ratio=0.5).sizes["text_config.intermediate_size"] == 48
    model.apply_plan(part.parts[1])  # of one tower alone: the other stays
    assert locate(model.merge_and_unload(), "text_config").dense.intermediate_size == 96


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"shape": Shape(intermediate_size=40)}, r"a Shape is about one tower, and gated are \['text_config'"),
        ({"shape": {"intermediate_size": 40}}, r"'intermediate_size' names no size; names are paths"),
        ({"shape": {"audio_config": Shape()}}, r"no gated towers \['audio_config'\]"),
        ({"keep_ratio": {"vision_config.width": 0.5}}, r"'vision_config.width' names no size"),
        ({"keep_ratio": {"vision_config.ffn": 2}}, r"keep_ratio of ffn must be a number in \(0, 1\], got 2"),
        ({"keep_ratio": {}}, r"keep_ratio names no axis"),
    ],
)
def test_what_is_no_wish_of_a_tower_is_refused(wish: dict[str, Any], said: str) -> None:
    model = gate(build(CASES["llava text"][0]), towers=BOTH)
    with pytest.raises(HawAdaError, match=said):
        model.plan(**wish)


def test_gates_of_both_towers_learn() -> None:
    row, _ = CASES["llava text"]
    model = shuffle_gates(get_peft_model(build(row), HawAdaConfig(towers=BOTH)))
    inputs = example_of(row)
    model.train()
    trained = [(name, p, p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([p for _, p, _ in trained], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {name.split(".layers.")[0].split(".")[-1] for name, p, before in trained if not torch.equal(p, before)}
    assert len(moved) == 2


def test_both_towers_are_refitted() -> None:
    case, _ = PAIRS["llava"]
    model, _, plan = pair("llava")
    row, _ = CASES[case]
    batches = [{key: value + 0 for key, value in example_of(row).items()} for _ in range(4)]
    for number, batch in enumerate(batches):
        batch["pixel_values"] = batch["pixel_values"].roll(number, -1)
    slimmed = model.slim(calibration=batches, inputs=batches[0])
    assert slimmed.reconstruction is not None
    layers = sum(len(part.layers) for part in plan.parts)
    assert len(slimmed.reconstruction.refits) == 2 * layers


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data["towers"].pop("text_config"), "towers must be an object with the plan of each of several"),
        (lambda data: data.update(layers=[0]), r"has no fields \['layers'\]|no fields"),
        (lambda data: data["towers"]["text_config"].update(tower="x"), "text_config.tower.* said once"),
        (lambda data: data["towers"]["text_config"].pop("layers"), r"the plan lacks \['layers'\]"),
    ],
)
def test_a_damaged_plan_of_towers_is_refused(damage: Any, said: str) -> None:
    part = Plan.keep_all(Shape(4, 4, 8, 2), "text_config")
    data = Plan.of_towers([part, replace(part, tower="vision_config")]).to_dict()
    damage(data)
    with pytest.raises(InvalidPlanError, match=said):
        Plan.from_dict(data)


def test_plans_beside_each_other_name_their_towers() -> None:
    part = Plan.keep_all(Shape(4, 4, 8, 2), "text_config")
    with pytest.raises(InvalidPlanError, match="each name their own, got"):
        Plan.of_towers([part, part])
    with pytest.raises(InvalidPlanError, match="at least one tower"):
        Plan.of_towers([])


# ------------------------------------------------------------------ trained together

TRAINED = {
    "llava": (CASES["llava text"][0], {"text_config": HALF, "vision_config.layers": 3}),
    "clip": (CASES["clip text"][0], {"text_config.layers": 2, "vision_config": Shape(8, 8, 30, 2)}),
    "bart": (STACKS, {"encoder_ffn_dim": 48, "decoder.layers": 3}),
}


def rows_of(row: Row, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Examples of one row each."""
    if row is STACKS:
        inputs = {name: torch.randint(5, 118, (2, 12)) for name in ("input_ids", "decoder_input_ids")}
    else:
        inputs = dict(example_of(row, dtype))
    return [{name: value[index] for name, value in inputs.items()} for _ in range(8) for index in range(2)]


def trainer_of(name: str, folder: Path, **options: Any) -> HawAdaTrainer:
    row, target = TRAINED[name]
    towers = ("encoder", "decoder") if row is STACKS else BOTH
    model = get_peft_model(build(row, torch.float64), HawAdaConfig(towers=towers))
    args = GateTrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, soft_fraction=0.5,
        calibration_examples=8, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=2,
        **options,
    )  # fmt: skip
    return HawAdaTrainer(model, args, shape=target, train_dataset=rows_of(row, torch.float64))


@pytest.mark.parametrize("name", first_of(TRAINED, "clip"))
def test_gates_of_two_towers_are_trained_towards_their_sizes(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path / "run")
    wanted = trainer.gated.plan(TRAINED[name][1]).target
    trainer.train()
    model = trainer.gated
    assert trainer.target == model.applied_plan().target == wanted
    assert len(wanted) == 2
    moved = {tower for tower in wanted for gate in gates_in(model, tower) if gate.theta.unique().numel() > 1}
    assert moved == set(wanted)
    assert trainer.comparison is not None
    ends_are_known = name != "bart"  # its heads cannot go, so that nobody looked for their outputs
    assert ("refitted" in trainer.comparison.trained) == ends_are_known
    last = trainer.history.entries[-1]
    assert set(last["beside"]) == {list(wanted)[1]}
    inputs = default_data_collator(rows_of(TRAINED[name][0], torch.float64)[:2])
    masked = outputs_of(model.eval(), inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(TRAINED[name][0], torch.float64), tmp_path / "adapter").eval()
    assert torch.equal(output_or_logits(again, inputs), output_or_logits(model, inputs))
    small = again.merge_and_unload(inputs=inputs)
    found = outputs_of(small, inputs)
    assert max(difference(found[key], masked[key]) for key in masked) <= 1e-12
    shapes = {layout.tower: layout.dense for layout in locate_all(small)}
    assert shapes == {tower: shape.complete(shapes[tower]) for tower, shape in wanted.items()}


def gates_in(model: PeftModel, tower: str) -> list[Any]:
    base = model.get_base_model()
    layout = next(each for each in locate_all(base) if each.tower == tower)
    return [gate for name, gate in collect_gates(model).items() if f".{layout.stack}." in name]


def test_a_training_of_two_towers_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = trainer_of("llava", tmp_path / "whole")
    whole.train()
    again = trainer_of("llava", tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.gated.applied_plan() == whole.gated.applied_plan()
    assert again.goal.state_dict() == whole.goal.state_dict()
    assert torch.equal(*(next(iter(collect_gates(each.gated).values())).theta for each in (whole, again)))


def test_layers_that_go_start_below_all_others_in_each_tower() -> None:
    row, _ = TRAINED["llava"]
    model = get_peft_model(build(row), HawAdaConfig(towers=BOTH))
    init_gates(model, [example_of(row)], shape={"text_config.layers": 3, "vision_config.layers": 2})
    plan = model.plan({"text_config.layers": 3, "vision_config.layers": 2})
    for part in plan.parts:
        layers = layers_of(model.get_base_model(), locate(model.get_base_model(), part.tower), ["default"])
        values = [sum(gate.theta.item() for gate in layer.whole) for layer in layers]
        kept = [values[layer] for layer in part.layers]
        assert max(set(values) - set(kept)) < min(kept)


def test_a_tower_that_the_data_does_not_run_is_not_cut_blindly() -> None:
    row, _ = TRAINED["llava"]
    model = get_peft_model(build(row), HawAdaConfig())
    text = {"input_ids": example_of(row)["input_ids"][:, :3].repeat(2, 4)}
    said = r"runs no layer of \['vision_config'\].*towers=\('text_config',\)"
    with pytest.raises(HawAdaError, match=said):
        init_gates(model, [text], shape={"text_config.layers": 3, "vision_config.layers": 3})
    init_gates(model, [text], shape={"text_config.intermediate_size": 48})
    model.apply_plan(model.plan({"vision_config.layers": 3}))
    with pytest.raises(HawAdaError, match=r"\['input_ids'\] runs no layer of .*vision.*, which is to be refitted"):
        model.slim(calibration=[text, text])
    model.apply_plan(model.plan({"text_config.intermediate_size": 48}))
    assert len(model.slim(calibration=[text, text]).reconstruction.refits) == 8  # of the tower that is cut


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize("gates", first_of(["trained", "none"], "trained"))
def test_the_command_line_slims_two_towers(gates: str, tmp_path: Path, toy_machine: None) -> None:
    case, shapes = PAIRS["llava"]
    base, plan_file, out = tmp_path / "base", tmp_path / "plan.json", tmp_path / "slim"
    build(CASES[case][0]).save_pretrained(base)
    model, inputs, plan = pair("llava")
    plan_file.write_text(plan.to_json())
    places = [out]
    if gates == "trained":
        model.save_pretrained(tmp_path / "adapter")
        places = [tmp_path / "adapter", out]
    else:
        model = get_peft_model(build(CASES[case][0]), HawAdaConfig(towers=BOTH)).eval()
        model.apply_plan(plan)
    written = said("slim", base, *places, "--plan", plan_file, "--verify", "full")
    loaded = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert written["parameters"] == loaded.num_parameters()
    assert {tower: locate(loaded, tower).dense for tower in BOTH} == shapes
    assert difference(output_of(loaded, inputs), output_of(model, inputs)) <= 1e-5
    assert said("verify", out, "--base", base)["ok"]
    rows = {name: torch.cat([value, value.flip(0)]) for name, value in inputs.items()}
    save_file(rows, tmp_path / "data.safetensors")
    compared = said("evaluate", out, "--base", base, "--data", tmp_path / "data.safetensors", "--seq-len", 28)
    assert compared["slim_parameters"] == written["parameters"]


def test_the_command_line_says_what_can_be_removed_of_every_tower(tmp_path: Path, toy_machine: None) -> None:
    build(CASES["llava text"][0]).save_pretrained(tmp_path)
    names = {axis["name"] for axis in said("inspect", tmp_path)["axes"]}
    assert {f"{tower}.intermediate_size" for tower in BOTH} <= names


def said(*given: Any) -> dict[str, Any]:
    """What a script gets of a command that succeeds."""
    done = CliRunner().invoke(app, [*map(str, given), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ------------------------------------------------------------------ one tower at a time


T5 = Row("T5ForConditionalGeneration", "T5Config", {
    "vocab_size": 128, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_heads": 8, "num_layers": 4, "num_decoder_layers": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}, THIN)  # fmt: skip


def weight_law(model: transformers.PreTrainedModel, regime: Regime) -> float:
    """Neither of two towers of one size takes so much of the time that it would do alone for a speedup above 2."""
    return 1e-6 * model.num_parameters(exclude_embeddings=True)


def shared_budget(row: Row, towers: Any, folder: Path, **options: Any) -> tuple[SearchResult, Any, Batch]:
    """What is found for a budget that one of two towers alone cannot meet, and the slim model of it."""
    base = build(row)
    inputs = example_inputs(base, rows=4, length=12)
    model = get_peft_model(base, HawAdaConfig(towers=towers))
    budget = LatencyBudget(speedup=2.2, batch_size=2, seq_len=12)
    effort = Effort.quick(clock=ToyClock(weight_law))
    found = find_plan(model, budget, [inputs], effort=effort, work=folder, **options)
    assert found.speedup >= 2.2
    assert SearchResult.from_dict(json.loads(json.dumps(found.to_dict()))).figures() == found.figures()
    target = dict(found.plan.target)
    assert set(target) == set(towers)
    assert found.best.shape == target[towers[0]]
    assert found.best.beside == ((towers[1], target[towers[1]]),)
    assert found.best.measured_loss is not None
    cut = {tower for tower, part in zip(towers, found.plan.parts, strict=True) if not part.keeps_all}
    assert cut == set(towers)
    model.apply_plan(found.plan)
    masked = outputs_of(model, inputs)
    small = model.merge_and_unload(inputs=inputs)
    got = outputs_of(small, inputs)
    assert max(difference(got[key], masked[key]) for key in masked) <= 1e-4
    assert {layout.tower: layout.dense for layout in locate_all(small)} == target
    assert small.num_parameters() == found.best.parameters
    return found, small, inputs


@pytest.mark.parametrize(
    ("row", "towers"), [(WHOLE["clip"], BOTH), (WHOLE["bart"], ("encoder", "decoder"))], ids=["clip", "bart"]
)
def test_a_budget_is_shared_by_two_towers(row: Row, towers: Any, tmp_path: Path) -> None:
    shared_budget(row, towers, tmp_path)


def test_a_budget_is_shared_by_towers_of_common_numbers_and_shown(tmp_path: Path) -> None:
    found, small, inputs = shared_budget(T5, ("encoder", "decoder"), tmp_path, refit=False)
    save_slim(small, tmp_path / "slim", inputs=inputs, card=ExportFacts(plan=found.plan, latency=found, search=found))
    page = write_report(tmp_path / "slim").page.read_text()
    layers = found.plan.parts[1].shape.num_hidden_layers
    assert re.search(rf">layers of decoder</t.>\s*<td[^>]*>{layers}</td>", page)
    assert "FFN channels of decoder" not in page.split("What the search could choose from")[1].split("</table>")[0]


def test_a_tower_that_is_not_timed_stays_and_the_other_is_searched() -> None:
    row, _ = CASES["llava text"]
    model = get_peft_model(build(row), HawAdaConfig(towers=BOTH[::-1]))
    effort = Effort.quick(clock=ToyClock())
    found = find_plan(model, LatencyBudget(speedup=1.5, seq_len=16), [example_of(row)], effort=effort)
    text, vision = found.plan.parts
    assert (text.tower, text.keeps_all, vision.keeps_all) == ("text_config", False, True)
    assert found.speedup >= 1.5
    assert "stays" in found.steps["vision_config"]
    assert found.best.shape == text.shape


def test_what_is_about_one_tower_is_refused_for_several() -> None:
    row, _ = CASES["llava text"]
    model = get_peft_model(build(row), HawAdaConfig(towers=BOTH))
    budget, data = LatencyBudget(speedup=1.5, seq_len=16), [example_of(row)]
    effort = Effort.quick(clock=ToyClock())
    with pytest.raises(
        InvalidPlanError, match=r"towers, and rotate is about the residual .*towers=\('text_config',\)"
    ):
        find_plan(model, budget, data, effort=effort, rotate=True)


def test_towers_are_searched_with_tables_that_are_given() -> None:
    clip, effort = get_peft_model(build(WHOLE["clip"]), HawAdaConfig(towers=BOTH)), Effort.quick(clock=ToyClock())
    regime = Regime(batch_size=2, seq_len=12)
    with pytest.raises(InvalidPlanError, match=r"name one of \['text_config', 'vision_config'\] as `tower`, got None"):
        measure_table(clip, regime, effort=effort)
    tables = {tower: measure_table(clip, regime, effort=effort, tower=tower) for tower in BOTH}
    assert tables["vision_config"].dense == locate(clip.get_base_model(), "vision_config").dense
    inputs = [example_inputs(clip.get_base_model(), rows=4, length=12)]
    search = functools.partial(
        find_plan, clip, LatencyBudget(speedup=1.3, batch_size=2, seq_len=12), inputs, refit=False
    )
    timed: list[int] = []

    def counted(model: transformers.PreTrainedModel, regime: Regime) -> float:
        timed.append(1)
        return weight_law(model, regime)

    anew = Effort.quick(clock=ToyClock(counted), cache=False)
    assert search(table=tables, effort=anew).speedup >= 1.3
    spared = len(timed)
    search(table={"vision_config": tables["vision_config"]}, effort=anew)
    assert spared < len(timed) - spared
    with pytest.raises(
        InvalidPlanError, match=r"of one tower, and \['text_config', 'vision_config'\] are searched.*as table="
    ):
        search(table=tables["text_config"], effort=effort)
    with pytest.raises(InvalidPlanError, match=r"tables of towers that are searched.*: \['vision'\]"):
        search(table={"vision": tables["vision_config"]}, effort=effort)
    with pytest.raises(IncompatibleTableError, match="measured for something else"):
        search(table=dict(zip(BOTH, reversed(tables.values()), strict=True)), effort=effort)


def test_the_next_tower_is_searched_in_the_slim_model() -> None:
    row, tower = CASES["llava text"]
    seen, inputs, _ = planned("llava vision")
    smaller = get_peft_model(seen.merge_and_unload(inputs=inputs), HawAdaConfig(towers=(tower,)))
    effort = Effort.quick(clock=ToyClock())
    found = find_plan(smaller, LatencyBudget(speedup=1.5, seq_len=16), [inputs], effort=effort, refit=False)
    assert found.plan is not None
    assert found.plan.tower == tower
    smaller.apply_plan(found.plan)
    both = smaller.merge_and_unload(inputs=inputs)
    assert locate(both, "vision_config").dense == CASES["llava vision"][0].slim
    assert locate(both, tower).dense == found.plan.shape != locate(build(row), tower).dense


# ------------------------------------------------------------------ a race between plans of several towers

RACING: dict[str, tuple[Row, tuple[str, ...]]] = {
    "clip": (WHOLE["clip"], BOTH),
    "t5": (T5, ("encoder", "decoder")),
}


@pytest.mark.parametrize("name", first_of(RACING, "clip"))
def test_plans_of_every_tower_and_of_all_enter_a_race(name: str) -> None:
    row, towers = RACING[name]
    dense = build(row)
    limit = 0.8 * dense.num_parameters()
    with among(dense, together([locate(dense, tower) for tower in towers])):
        judge = Judge(dense, [example_inputs(dense, rows=4, length=12)])
        fits = fits_of(dense, LatencyBudget(max_parameters=int(limit), seq_len=12))
        entered = field_of(judge, fits, most=20, few=20)
        beside = neighbours(judge, fits)
    assert len({each.plan for each in entered}) == len(entered)
    for each in (*entered, *beside):
        small = slim(dense, each.plan)
        assert (small.num_parameters() <= limit) or each.source == "neighbour"
    cut = [{part.tower for part in each.plan.cut_parts} for each in entered if each.depth_only]
    assert all(some in cut for some in [{tower} for tower in towers if name == "clip"])
    assert set(towers) in cut
    together_cut = next(each for each in entered if {part.tower for part in each.plan.cut_parts} == set(towers))
    lost = divergence(dense, slim(dense, together_cut.plan), judge.batches)[1]
    assert together_cut.loss == pytest.approx(lost, rel=0.2)
    assert {RUNS, "depth and width"} <= {each.source for each in entered}


def test_plans_of_several_towers_race_as_whole_models(tmp_path: Path) -> None:
    model, inputs, plan = pair("clip")
    dense = copy.deepcopy(build(WHOLE["clip"]))
    rows = [{name: value[index] for name, value in inputs.items()} for index in (0, 1)] * 4
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    budget = LatencyBudget(speedup=1.3, batch_size=2, seq_len=12)
    race = Race(
        budget, plans=4, steps=1, share=0.9, effort=Effort.quick(clock=ToyClock(weight_law)), neighbours=False,
        preparations=("none", "magnitude"),
    )  # fmt: skip
    batches = [example_inputs(dense, rows=4, length=12), inputs]
    slimmed = recover(model, args, train_dataset=rows, calibration=batches, race=race)
    record = slimmed.race
    assert record.entrants[0].source == GIVEN
    assert record.entrants[0].plan == plan
    towers = {tuple(part.tower for part in each.plan.cut_parts) for each in record.entrants}
    assert len(towers) > 1
    assert all(each.ms <= record.limit_ms for each in record.entrants)
    assert all(math.isfinite(run.loss) for run in record.runs)
    assert {each.preparation for each in record.entrants} == {"none", "magnitude"}
    assert RaceRecord.from_dict(json.loads(json.dumps(record.to_dict()))).latencies == record.latencies
    assert {part.tower for part in slimmed.plan.parts} == set(BOTH)
    expected = slim(dense, slimmed.plan)
    assert {name: value.shape for name, value in slimmed.model.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()
    }
    assert "text_config: " in record.entrants[0].name
    assert "vision_config: " in record.entrants[0].name


def test_the_answers_of_a_search_over_several_towers_race(tmp_path: Path) -> None:
    base = build(WHOLE["clip"])
    inputs = example_inputs(base, rows=4, length=12)
    model = get_peft_model(base, HawAdaConfig(towers=BOTH))
    budget, effort = LatencyBudget(speedup=2.2, batch_size=2, seq_len=12), Effort.quick(clock=ToyClock(weight_law))
    found = find_plan(model, budget, [inputs], effort=effort, refit=False)
    dense = model.unload()
    with among(dense, locate_all(dense)):
        judge, fits = Judge(dense, [inputs]), fits_of(dense, budget, effort=effort)
        entered = field_of(judge, fits, {}, together={"search": searched(found)}, most=9, few=9)
    assert found.plan in [each.plan for each in entered]
    timed = {(*dict(each.beside).values(), each.shape) for each in found.measured}
    for each in entered:
        text, vision = (part.shape for part in each.plan.parts)
        assert (vision, text) in timed
        assert each.ms <= fits.limit_ms


def test_a_dense_model_races_in_all_towers_that_are_timed(tmp_path: Path) -> None:
    dense = build(CASES["llava text"][0])
    budget = LatencyBudget(speedup=1.5, seq_len=16)
    assert [layout.tower for layout in racing_towers(dense, Race(budget), None)] == ["text_config"]
    small = Race(LatencyBudget(max_parameters=1, seq_len=16))
    assert {layout.tower for layout in racing_towers(dense, small, None)} == set(BOTH)
    plans = [Plan.keep_all(locate(dense, tower).dense, tower) for tower in BOTH]
    whole = Plan.of_towers(plans)
    assert [layout.tower for layout in racing_towers(dense, Race(budget), whole)] == ["text_config"]
    assert [layout.tower for layout in racing_towers(dense, small, whole)] == list(BOTH)
    eyes = Plan.of_towers([plans[0], pair("llava")[2].parts[1]])
    assert [layout.tower for layout in racing_towers(dense, Race(budget), eyes)] == list(BOTH)
    assert TOWERS not in vars(dense)
