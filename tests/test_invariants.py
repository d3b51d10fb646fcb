"""The invariants of docs/architecture.md, on every family."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import (
    KINDS,
    ROWS,
    Export,
    Row,
    assert_same_state,
    build,
    difference,
    everything,
    families,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    state_of,
)
from peft import PeftModel
from safetensors.torch import load_file

from hawada_peft import Plan, collect_gates, verify_slim
from hawada_peft.gates import HeadGate
from hawada_peft.gates.adapter import BLOCK, LAYER, UNITS
from hawada_peft.surgery.axes import find_axes
from hawada_peft.vanilla.family import locate


@pytest.fixture(params=families(ROWS | KINDS))
def row(request: pytest.FixtureRequest) -> Row:
    """Every row of both tables."""
    return (ROWS | KINDS)[request.param]


def test_output_is_unchanged_at_the_start(row: Row) -> None:
    model = build(row)
    dense = logits_of(model)
    assert torch.equal(logits_of(gate(model, shuffle=False, gates=everything(row))), dense)


def test_output_is_unchanged_when_disabled(row: Row) -> None:
    model = build(row)
    dense = logits_of(model)
    model = gate(model)
    assert difference(logits_of(model), dense) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits_of(model), dense)


def test_only_gates_get_gradients(row: Row) -> None:
    model = gate(build(row), gates=everything(row))
    output = model(**inputs_of(model))
    output[0].square().mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{name}.theta" for name in collect_gates(model)}
    assert all(g.theta.grad.abs().max() > 0 for g in collect_gates(model).values())


def test_gates_align_with_the_structure(row: Row) -> None:
    if "heads" not in everything(row):
        pytest.skip("its heads go with its residual stream (test_joint_stream.py)")
    model = gate(build(row), gates=everything(row), group_size=4)
    dense = locate(model.get_base_model()).dense
    expected = {UNITS: {(dense.num_attention_heads,), (dense.intermediate_size // 4,)}, BLOCK: {(1,)}, LAYER: {(1,)}}
    counts = {UNITS: 2, BLOCK: 2, LAYER: 1}  # per layer
    for slot, shapes in expected.items():
        if slot == BLOCK and "blocks" not in everything(row):
            continue
        gates = [g for name, g in collect_gates(model).items() if name.split(".")[-2] == slot]
        assert {tuple(g.theta.shape) for g in gates} == shapes
        assert len(gates) == counts[slot] * dense.num_hidden_layers


def test_gating_only_scales(row: Row) -> None:
    if "heads" not in everything(row):
        pytest.skip("its heads go with its residual stream (test_joint_stream.py)")
    model = build(row, torch.float64)
    attention = model.get_submodule(locate(model).attention_out(1))
    x = torch.randn(2, attention.in_features, dtype=torch.float64)
    model = gate(model, gates=("heads",))
    adapter = model.get_base_model().get_submodule(locate(model.get_base_model()).attention_out(1))
    head_gate = adapter.gates("default")[UNITS]
    assert isinstance(head_gate, HeadGate)
    factors = head_gate.features().repeat(2, 1)
    torch.testing.assert_close(adapter(x), attention(x * factors))


def test_masked_is_slim_in_float32(exported: Export) -> None:
    assert difference(exported.masked, exported.dense) > 0.01
    assert difference(logits_of(exported.slim), exported.masked) <= 1e-5


@pytest.mark.parametrize("axes", [("heads",), ("ffn",), ("layers",), ("heads", "ffn", "layers")], ids="+".join)
def test_masked_is_slim_in_float64(row: Row, axes: tuple[str, ...]) -> None:
    if "heads" in axes and "heads" not in everything(row):
        pytest.skip("its heads go with its residual stream (test_joint_stream.py)")
    fields = {
        "heads": ("num_attention_heads", "num_key_value_heads"),
        "ffn": ("intermediate_size",),
        "layers": ("num_hidden_layers",),
    }
    sizes = row.slim.to_dict()
    shape = type(row.slim)(**{name: sizes[name] for axis in axes for name in fields[axis]})
    model = gate(build(row, torch.float64), gates=axes)
    plan = scattered_plan(model, shape)
    model.apply_plan(plan)
    masked = logits_of(model)
    slimmed = model.merge_and_unload()
    assert locate(slimmed).dense == plan.shape
    assert difference(logits_of(slimmed), masked) <= 1e-12


def test_another_unit_would_be_noticed(row: Row) -> None:
    model = gate(build(row, torch.float64))
    plan = scattered_plan(model, row.slim)
    model.apply_plan(plan)
    masked = logits_of(model)
    first, *others = plan.channels
    spare = next(c for c in range(plan.dense.intermediate_size) if c not in first)
    wrong = Plan(plan.dense, plan.layers, plan.heads, (tuple(sorted([*first[1:], spare])), *others))
    assert difference(logits_of(model.merge_and_unload(plan=wrong)), masked) > 1e-6


def test_gated_model_verifies_the_folder(exported: Export) -> None:
    model = PeftModel.from_pretrained(build(exported.row), exported.adapter).eval()
    found = verify_slim(exported.folder, reference=model).require()
    assert found.max_difference <= 1e-5 * found.scale
    assert found.parameters == exported.slim.num_parameters() < build(exported.row).num_parameters()


def test_adapter_reloads_bit_equal(exported: Export) -> None:
    model = PeftModel.from_pretrained(build(exported.row), exported.adapter).eval()
    assert_same_state({name: g.theta.data for name, g in collect_gates(model).items()}, exported.gates)
    assert model.applied_plan() == exported.plan
    assert torch.equal(logits_of(model), exported.masked)


def test_adapter_holds_gates_only(exported: Export) -> None:
    saved = load_file(exported.adapter / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in saved.values()} == {tuple(t.shape) for t in exported.gates.values()}
    assert len(saved) == len(exported.gates)


def test_slim_reloads_bit_equal(exported: Export) -> None:
    auto = getattr(transformers, exported.verification.auto_class)
    assert auto.__name__.startswith("Auto")
    loaded = auto.from_pretrained(exported.folder)
    assert type(loaded) is type(exported.slim)
    assert_same_state(state_of(loaded), state_of(exported.slim))
    assert torch.equal(logits_of(loaded), logits_of(exported.slim))


def test_slim_has_no_trace_of_the_tuner(exported: Export) -> None:
    assert not [name for name in exported.slim.state_dict() if "hawada" in name]
    files = [path for path in exported.folder.rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors"} <= {path.name for path in files}
    assert not [path.name for path in files if b"hawada" in path.read_bytes().lower()]
    assert "auto_map" not in json.loads((exported.folder / "config.json").read_text())


def test_nothing_is_pickled(exported: Export) -> None:
    files = [*exported.folder.rglob("*"), *exported.adapter.rglob("*")]
    assert {path.suffix for path in files if path.is_file()} <= {".json", ".safetensors", ".md"}


def test_tied_embeddings_stay_tied(exported: Export) -> None:
    tied, has_head = exported.row.fields.get("tie_word_embeddings", False), exported.slim.can_generate()
    saved = load_file(exported.folder / "model.safetensors")
    auto = getattr(transformers, exported.verification.auto_class)
    for model in (exported.slim, auto.from_pretrained(exported.folder)):
        assert tied == (has_head and model.lm_head.weight is model.get_input_embeddings().weight)
    assert ("lm_head.weight" in saved) == (has_head and not tied)


def test_config_describes_the_weights(exported: Export) -> None:
    sizes, config = exported.plan.shape.sizes(), exported.slim.config
    assert config.num_attention_heads == sizes["num_attention_heads"]
    assert config.num_hidden_layers == sizes["num_hidden_layers"]
    assert getattr(config, "head_dim", 8) == 8  # not every config states it
    assert type(exported.slim)(config).num_parameters() == exported.slim.num_parameters()


def test_lists_with_an_entry_per_layer_are_cut(exported: Export) -> None:
    layout, dense = locate(exported.slim), build(exported.row).config
    for name in layout.family.layer_lists:
        old, new = getattr(dense, name, None), getattr(exported.slim.config, name, None)
        assert new == (old and [old[layer] for layer in exported.plan.layers])


def test_unload_gives_the_dense_model_back(row: Row) -> None:
    model = build(row)
    before, dense, cls = state_of(model), logits_of(model), type(model)
    model = gate(model, gates=everything(row))
    model.apply_plan(scattered_plan(model, row.slim))
    model.merge_adapter()
    unloaded = model.unload()
    assert type(unloaded) is cls
    assert_same_state(state_of(unloaded), before)
    assert torch.equal(logits_of(unloaded), dense)


def test_keep_all_without_folding_is_the_dense_model(row: Row) -> None:
    model = build(row)
    before = state_of(model)
    model = gate(model)
    everything = Plan.keep_all(locate(model.get_base_model()).dense)
    assert_same_state(state_of(model.merge_and_unload(plan=everything, fold=False)), before)


def test_unmerging_closed_gates_restores_every_bit(row: Row) -> None:
    model = gate(build(row))
    model.apply_plan(scattered_plan(model, row.slim))
    before, masked = state_of(model), logits_of(model)
    model.merge_adapter()
    assert difference(logits_of(model), masked) <= 1e-5
    model.unmerge_adapter()
    assert_same_state(state_of(model), before)


def test_every_sliced_parameter_lies_in_a_layer(exported: Export) -> None:
    dense = build(exported.row)
    small = exported.slim.state_dict()
    rules = find_axes(locate(dense))
    stack = locate(dense).stack
    for name, tensor in dense.state_dict().items():
        if name in small and tensor.shape != small[name].shape:
            assert name.startswith(f"{stack}.")
            assert name.split(".", stack.count(".") + 2)[-1] in rules
