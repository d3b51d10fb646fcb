"""Least-squares reconstruction: what it recovers, what it leaves alone, and what protects the plain weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
    inputs_of,
    logits_of,
    scattered_plan,
    state_of,
)
from pairs import in_two
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from hawada_peft import Plan, Shape, register_family, save_slim, slim
from hawada_peft.errors import HawAdaError, IncompatibleBaseError, UnsupportedModelError
from hawada_peft.processes import of_this_rank
from hawada_peft.refit import reconstruct
from hawada_peft.refit.layerwise import Stream, residual_gains
from hawada_peft.refit.reconstruction import Teacher, refit_model
from hawada_peft.vanilla import rehome
from hawada_peft.vanilla.family import FAMILIES, locate

NARROW = Shape(intermediate_size=40)


def batches_of(model: PreTrainedModel, count: int = 8, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(count, rows, 3, 16, 16, generator=generator).to(model.dtype)
        return [{"pixel_values": batch} for batch in pixels]
    return [{"input_ids": batch} for batch in torch.randint(128, (count, rows, 16), generator=generator)]


def with_twins(model: PreTrainedModel) -> tuple[PreTrainedModel, Plan]:
    """A model whose second half of FFN channels computes the same as the first, and the plan that cuts it."""
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data[48:] = projection.weight.data[:48]
    plan = Plan.keep_all(locate(model).dense)
    return model, replace(plan, channels=(tuple(range(48)),) * 4)


def test_every_row_gets_closer_to_the_dense_model(row: Row, tmp_path: Path) -> None:
    model = build(row)
    before = state_of(model)
    plan = scattered_plan(model, row.slim)
    small = slim(model, plan).train()
    plain = state_of(small)
    result = reconstruct(model, small, plan, batches_of(model))
    assert result.applied
    assert result.after < result.before
    assert result.metric == ("mse" if row.model in ("LlamaModel", "ViTModel") else "kl")
    assert all(refit.residual and refit.after <= refit.before for refit in result.refits)
    assert_same_state(state_of(model), before)
    projections = {refit.name for refit in result.refits}
    for name, tensor in state_of(small).items():
        assert torch.equal(tensor, plain[name]) or name.rpartition(".")[0] in projections
    assert small.training
    assert not model.training
    assert not [m for m in [*model.modules(), *small.modules()] if m._forward_hooks or m._forward_pre_hooks]
    save_slim(small.eval(), tmp_path / "slim")


def test_units_that_others_can_stand_in_for_are_recovered() -> None:
    model, plan = with_twins(build(LM_ROW, torch.float64))
    small = slim(model, plan)
    assert difference(logits_of(small), logits_of(model)) > 0.1
    reconstruct(model, small, plan, batches_of(model, rows=16), dampings=(1e-10,))
    assert difference(logits_of(small), logits_of(model)) <= 1e-6


def test_a_model_that_lost_nothing_stays_as_it_is(row: Row) -> None:
    model = build(row)
    plan = Plan.keep_all(locate(model).dense)
    small = slim(model, plan)
    result = reconstruct(model, small, plan, batches_of(model, count=2))
    assert (result.before, result.after, result.applied) == (0, 0, False)
    assert_same_state(state_of(small), state_of(model))


@pytest.mark.filterwarnings("ignore:the slim model keeps its plain weights")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])
def test_never_worse_on_held_out_rows(row: Row, seed: int) -> None:
    model = build(row)
    plan = scattered_plan(model, row.slim, seed)
    small = slim(model, plan)
    plain = state_of(small)
    result = reconstruct(model, small, plan, batches_of(model, count=2, rows=1, seed=seed), dampings=(1e-6,))
    assert result.applied == (result.after < result.before)
    if not result.applied:
        assert_same_state(state_of(small), plain)


@pytest.mark.parametrize("room", [0, 2**14, 2**30])
def test_several_models_are_refitted_to_one_teacher_as_each_alone(room: int) -> None:
    model = build(LM_ROW)
    batches, passes = batches_of(model), list[int]()
    for layer in range(4):
        model.model.layers[layer].register_forward_hook(lambda *_, layer=layer: passes.append(layer))
    teacher = Teacher(model, batches, room=room, reduce=of_this_rank)
    plans = [scattered_plan(model, shape) for shape in (Shape(4, 2, 40, 2), Shape(4, 2, 48, 4), Shape(8, 4, 40, 3))]
    counts = []
    for plan in plans:
        alone, shared = slim(model, plan), slim(model, plan)
        before = len(passes)
        expected = refit_model(model, alone, plan, batches, reduce=of_this_rank)
        between = len(passes)
        assert teacher.refit(shared, plan) == expected
        counts.append((between - before, len(passes) - between))
        assert all(map(torch.equal, alone.state_dict().values(), shared.state_dict().values()))
    assert counts[0][0] == counts[0][1]  # nothing is known yet
    whole = 4 * len(batches) if room == 2**30 else 0  # all layers on all batches
    assert all(alone - shared > whole for alone, shared in counts[1:])


def test_the_whole_is_taken_back_if_it_is_worse() -> None:
    """Every projection fits better, the logits do not: the head looks at one direction, the sum of squares at all."""
    model = build(VISION_ROW)
    plan = scattered_plan(model, VISION_ROW.slim)
    taken_back = []
    for seed in range(12):
        small = slim(model, plan)
        plain = state_of(small)
        batches = batches_of(model, count=2, rows=2, seed=seed)
        try:
            reconstruct(model, small, plan, batches)
        except UserWarning:
            assert_same_state(state_of(small), plain)
            taken_back.append(seed)
    assert taken_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_folds_the_same_bits_when_nothing_is_applied(dtype: torch.dtype) -> None:
    models = [gate(build(LM_ROW, dtype), gates=EVERYTHING) for _ in range(2)]
    for model in models:
        model.apply_plan(scattered_plan(model, LM_ROW.slim))
    constant = {"input_ids": torch.full((4, 16), 5)}  # says nothing about the batch that is held out
    held_out = batches_of(models[0].get_base_model(), count=1, rows=1)
    expected = models[0].merge_and_unload()
    with pytest.warns(UserWarning, match="keeps its plain weights"):
        slimmed = models[1].slim(calibration=[constant, *held_out])
    found = slimmed.model
    assert not slimmed.reconstruction.applied
    assert_same_state(state_of(found), state_of(expected))


def test_merge_reconstructs_towards_the_dense_model_from_the_folded_weights(row: Row) -> None:
    dense, models = build(row), [gate(build(row), gates=EVERYTHING) for _ in range(2)]
    plan = scattered_plan(dense, row.slim)
    for model in models:
        model.apply_plan(plan)
    batches = batches_of(dense, count=4)
    expected = models[0].merge_and_unload()
    result = reconstruct(dense, expected, plan, batches)
    slimmed = models[1].slim(calibration=batches)
    found = slimmed.model
    assert slimmed.reconstruction == result
    assert result.applied
    assert_same_state(state_of(found), state_of(expected))


def test_merge_keeps_trained_modules_and_compares_with_the_original_ones() -> None:
    dense = build(VISION_ROW)
    model = gate(build(VISION_ROW), modules_to_save=["classifier"])
    trained = model.get_base_model().classifier.modules_to_save["default"]
    trained.weight.data += 1
    plan = scattered_plan(model, NARROW)
    model.apply_plan(plan)
    expected = slim(dense, plan)
    slimmed = model.slim(calibration=batches_of(dense), fold=False)
    small = slimmed.model
    assert torch.equal(small.classifier.weight, dense.classifier.weight + 1)
    expected.classifier.weight.data += 1
    assert reconstruct(dense, expected, plan, batches_of(dense)) == slimmed.reconstruction


def test_padding_does_not_count() -> None:
    model = build(LM_ROW, torch.float64)
    plan = scattered_plan(model, LM_ROW.slim)
    mask = torch.ones(8, 16, dtype=torch.long)
    mask[:, 10:] = 0
    states, results = [], []
    for filler in (7, 99):
        small = slim(model, plan)
        batches = [
            {"input_ids": batch["input_ids"].masked_fill(mask == 0, filler), "attention_mask": mask}
            for batch in batches_of(model)
        ]
        results.append(reconstruct(model, small, plan, batches))
        states.append(state_of(small))
    assert results[0].applied
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor)


def test_a_data_loader_will_do_and_labels_are_ignored() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    rows = [{"input_ids": row} for batch in batches_of(model) for row in batch["input_ids"]]
    labelled = [row | {"labels": torch.tensor(1)} for row in rows]
    smalls = [slim(model, plan) for _ in range(2)]
    first = reconstruct(model, smalls[0], plan, batches_of(model))
    assert reconstruct(model, smalls[1], plan, DataLoader(labelled, batch_size=8)) == first
    assert_same_state(state_of(smalls[1]), state_of(smalls[0]))


def test_one_batch_is_split_by_rows() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    whole = batches_of(model, count=1, rows=32)
    parts = [{"input_ids": whole[0]["input_ids"][rows]} for rows in (slice(28), slice(28, 32))]
    smalls = [slim(model, plan) for _ in range(2)]
    assert reconstruct(model, smalls[0], plan, whole) == reconstruct(model, smalls[1], plan, parts)


def test_no_more_rows_are_held_out_of_few_batches_than_of_one() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    whole = batches_of(model, count=1, rows=32)
    halves = [{"input_ids": whole[0]["input_ids"][rows]} for rows in (slice(16), slice(16, 32))]
    of_one, of_two = (reconstruct(model, slim(model, plan), plan, batches) for batches in (whole, halves))
    assert of_two.before == of_one.before
    assert of_two.after == pytest.approx(of_one.after, rel=1e-3)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_little_data_is_refused(rows: int) -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    with pytest.raises(HawAdaError, match="at least"):
        reconstruct(model, slim(model, plan), plan, batches_of(model, count=rows, rows=1))


def test_impossible_options_are_refused_together() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    with pytest.raises(HawAdaError, match=r"(?s)above 0, got -1.*at most 0.5, got 0.9.*to 1, got 2"):
        reconstruct(model, slim(model, plan), plan, batches_of(model), dampings=(-1,), held_out=0.9, correction=2)


def test_models_with_adapters_are_refused() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    small = slim(model, plan)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        reconstruct(gate(model).get_base_model(), small, plan, batches_of(small))


def test_a_failure_on_the_way_leaves_the_plain_weights() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    small = slim(model, plan)
    plain = state_of(small)

    def fail_late(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if not torch.equal(small.model.layers[0].mlp.down_proj.weight, plain["model.layers.0.mlp.down_proj.weight"]):
            raise RuntimeError("out of luck")

    small.model.layers[1].mlp.up_proj.register_forward_hook(fail_late)
    with pytest.raises(RuntimeError, match="out of luck"):
        reconstruct(model, small, plan, batches_of(model))
    assert_same_state(state_of(small), plain)


def test_another_plan_is_refused() -> None:
    model = build(LM_ROW)
    small = slim(model, scattered_plan(model, LM_ROW.slim))
    with pytest.raises(IncompatibleBaseError, match="pass the plan"):
        reconstruct(model, small, scattered_plan(model, NARROW), batches_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    model = build(LM_ROW, dtype)
    plan = scattered_plan(model, LM_ROW.slim)
    small = slim(model, plan)
    assert reconstruct(model, small, plan, batches_of(model)).applied
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}


def test_rehomed_model_is_reconstructed_towards_its_origin() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, Shape(3, 3, 40, 2))  # head counts that Llama refuses
    small = slim(rehome(model), plan)
    assert reconstruct(model, small, plan, batches_of(model)).applied


@pytest.mark.parametrize("name", ROWS)
def test_gains_are_what_the_config_says(name: str) -> None:
    model = build(ROWS[name])
    with torch.no_grad():
        stream = Stream.start(model, locate(model), batches_of(model, count=1))
        gains = residual_gains(stream, 0)
    expected: list[Any] = [getattr(model.config, "residual_multiplier", 1.0)] * 2
    if name == "dinov2":
        layer = model.dinov2.encoder.layer[0]
        expected = [layer.layer_scale1.lambda1, layer.layer_scale2.lambda1]
    for gain, wanted in zip(gains, expected, strict=True):
        torch.testing.assert_close(gain, torch.as_tensor(wanted).expand_as(gain))


@pytest.mark.usefixtures("rows_of_families")
@pytest.mark.parametrize("window", [4, 64])
def test_layers_are_called_as_the_model_calls_them(window: int) -> None:
    """Windows and whole texts alternate; masks that the first batch does not need are those of later ones."""
    register_family("gemma2", FAMILIES["mistral"])
    model = Gemma2ForCausalLM(Gemma2Config(**LM_ROW.fields, sliding_window=window)).eval()
    ids = torch.randint(128, (3, 16))
    padded = torch.ones_like(ids)
    padded[1, 9:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (torch.ones_like(ids), padded)]
    batches.append({"input_ids": ids[:, :7]})
    with torch.no_grad():
        stream = Stream.start(model, locate(model), batches)
        for layer in range(len(stream.layers)):
            stream.advance(layer)
        for batch, found in zip(batches, stream.hidden, strict=True):
            expected = model.model(**batch).last_hidden_state
            torch.testing.assert_close(model.model.norm(found), expected)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.usefixtures("rows_of_families")
def test_a_norm_behind_the_projection_is_noticed() -> None:
    register_family("gemma2", FAMILIES["mistral"])
    torch.manual_seed(1)
    model = Gemma2ForCausalLM(Gemma2Config(**LM_ROW.fields)).eval()
    plan = scattered_plan(model, Shape(4, 2, 40, 3))
    small = slim(model, plan)
    result = reconstruct(model, small, plan, batches_of(model))
    assert not any(refit.residual for refit in result.refits)
    assert all(refit.after <= refit.before for refit in result.refits)


def process(folder: Path) -> None:
    """What each of two processes does."""
    distributed.init_process_group("gloo")
    rank, model = distributed.get_rank(), AutoModelForCausalLM.from_pretrained(folder / "dense")
    plan = Plan.from_json((folder / "plan.json").read_text())
    small = slim(model, plan)
    result = reconstruct(model, small, plan, torch.load(folder / f"batches-{rank}.pt"))
    save_file(dict(small.state_dict()), folder / f"{rank}.safetensors")
    torch.save((result.before, result.after), folder / f"divergence-{rank}.pt")


def test_two_processes_get_what_one_gets_from_all_batches(tmp_path: Path) -> None:
    model = build(LM_ROW, torch.float64)
    plan, batches = scattered_plan(model, LM_ROW.slim), batches_of(model, count=16)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "plan.json").write_text(plan.to_json())
    for rank in range(2):
        torch.save(batches[8 * rank : 8 * rank + 8], tmp_path / f"batches-{rank}.pt")
    in_two(process, tmp_path)
    alone = slim(model, plan)
    result = reconstruct(model, alone, plan, batches)
    assert result.applied
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert_same_state(second, first)
    for rank in range(2):
        assert torch.load(tmp_path / f"divergence-{rank}.pt") == pytest.approx((result.before, result.after))
    for name, tensor in state_of(alone).items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-8)


def test_reconstructed_model_is_saved_and_reloaded(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    small = model.merge_and_unload(calibration=batches_of(model.get_base_model()))
    verification = save_slim(small, tmp_path / "slim", reference=logits_of(small), inputs=inputs_of(small))
    assert verification.max_difference == 0
