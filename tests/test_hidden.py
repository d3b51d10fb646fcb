"""Gates on the residual stream: their place, what a plan makes of them, and the slim model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    BARE_ROW,
    EVERYTHING,
    LM,
    LM_ROW,
    ROWS,
    SIZES,
    TOKENS,
    Row,
    assert_same_state,
    build,
    difference,
    families,
    gate,
    inputs_of,
    logits_of,
    shuffle_gates,
    state_of,
)
from narrow_streams import ALL, hidden_plan, narrow, size_of, two_rows
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hawada_peft import Family, HawAdaConfig, Plan, Shape, collect_gates, init_gates, register_family, save_slim, slim
from hawada_peft.errors import (
    HawAdaError,
    IllegalShapeError,
    IncompatibleBaseError,
    InvalidPlanError,
    UnsupportedModelError,
)
from hawada_peft.gates.adapter import HIDDEN_UNITS
from hawada_peft.gates.hidden import HiddenAdapter, kept_norm
from hawada_peft.planning.importance import gate_importance
from hawada_peft.surgery.axes import SliceRule, find_axes
from hawada_peft.vanilla.family import locate

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def stream_gate(model: nn.Module, adapter_name: str = "default") -> Any:
    (found,) = [g for name, g in collect_gates(model, adapter_name).items() if f".{HIDDEN_UNITS}." in name]
    return found


@pytest.fixture(params=families(ROWS))
def named(request: pytest.FixtureRequest) -> tuple[Row, Shape]:
    """Every row, and its slim shape with a hidden size."""
    row = ROWS[request.param]
    return row, replace(row.slim, hidden_size=size_of(request.param))


@dataclass(frozen=True)
class Slimmed:
    """A row's way to a slim folder, all axes cut."""

    row: Row
    plan: Plan
    dense: torch.Tensor
    masked: torch.Tensor
    masked_tokens: torch.Tensor | None
    model: PreTrainedModel
    folder: Path
    auto: str


@pytest.fixture(scope="module", params=families(ROWS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Slimmed:
    row, folder = ROWS[request.param], tmp_path_factory.mktemp("hidden")
    base = build(row)
    dense, generates = logits_of(base), base.can_generate()
    model = gate(base, gates=ALL)
    plan = hidden_plan(model, row.slim, size_of(request.param))
    model.apply_plan(plan)
    model.save_pretrained(folder / "adapter")
    masked = narrow(logits_of(model), plan)
    tokens = model.generate(**inputs_of(model), **GREEDY) if generates else None
    small = model.merge_and_unload()
    found = save_slim(small, folder / "slim", reference=masked, inputs=inputs_of(small))
    return Slimmed(row, plan, dense, masked, tokens, small, folder, found.auto_class)


# ------------------------------------------------------------------ injection


@two_rows
def test_not_gated_by_default(row: Row) -> None:
    model = gate(build(row), gates=EVERYTHING)
    assert not [module for module in model.modules() if isinstance(module, HiddenAdapter)]


def test_one_gate_for_all_norms(row: Row) -> None:
    model = gate(build(row), gates=("hidden",))
    norms = [module for module in model.modules() if isinstance(module, HiddenAdapter)]
    assert len(norms) == 2 * 4 + 1
    (found,) = collect_gates(model).values()
    assert tuple(found.theta.shape) == (64,)
    assert all(norm.gates("default") == {HIDDEN_UNITS: found} for norm in norms)
    assert len([name for name, _ in model.named_parameters() if HIDDEN_UNITS in name]) == 1


def test_output_is_unchanged_at_the_start(row: Row) -> None:
    model = build(row)
    dense = logits_of(model)
    assert torch.equal(logits_of(gate(model, shuffle=False, gates=ALL)), dense)


@two_rows
def test_output_is_unchanged_when_disabled(row: Row) -> None:
    model = build(row)
    dense = logits_of(model)
    model = gate(model, gates=("hidden",))
    model.apply_plan(hidden_plan(model, Shape(), 32))
    assert difference(logits_of(model), dense) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits_of(model), dense)


def test_groups_of_channels_share_a_gate() -> None:
    model = gate(build(LM_ROW), gates=("hidden",), group_size=8)
    assert tuple(stream_gate(model).theta.shape) == (8,)
    plan = model.plan(Shape(hidden_size=48))
    assert len({channel // 8 for channel in plan.hidden}) == 6
    model.apply_plan(plan)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-5


@two_rows
def test_soft_gates_fold_without_a_plan(row: Row) -> None:
    model = gate(build(row, torch.float64), gates=("hidden",))
    soft = logits_of(model)
    model.merge_adapter()
    assert difference(logits_of(model), soft) <= 1e-12


# ----------------------------------------------------------- masked is slim


def test_masked_is_slim_in_float64(named: tuple[Row, Shape]) -> None:
    row, shape = named
    check_exactness(build(row, torch.float64), shape)


@pytest.mark.parametrize("name", ["llama", "smollm3", "vit"])
def test_masked_is_slim_where_only_the_stream_is_cut(name: str) -> None:
    check_exactness(build(ROWS[name], torch.float64), Shape(hidden_size=size_of(name)), gates=("hidden",))


def check_exactness(model: PreTrainedModel, shape: Shape, gates: tuple[str, ...] = ALL) -> None:
    dense = logits_of(model)
    model = gate(model, gates=gates)
    plan = hidden_plan(model, shape)
    model.apply_plan(plan)
    masked = logits_of(model)
    assert difference(masked, dense) > 0.01
    small = model.merge_and_unload()
    layout = locate(small)
    assert (layout.dense, layout.hidden_size) == (replace(plan.shape, hidden_size=None), shape.hidden_size)
    assert difference(logits_of(small), narrow(masked, plan)) <= 1e-12


def test_small_activations_are_slim_exactly_too() -> None:
    """There eps counts; a fold that forgets it is far off."""
    base = build(LM_ROW, torch.float64)
    for name, parameter in base.named_parameters():
        if "embed" in name or name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= 1e-3
    model = gate(base, gates=("hidden",))
    plan = hidden_plan(model, Shape(), 40)
    model.apply_plan(plan)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-12


def test_another_channel_would_be_noticed() -> None:
    model = gate(build(LM_ROW, torch.float64), gates=("hidden",))
    plan = hidden_plan(model, Shape(), 40)
    model.apply_plan(plan)
    masked = logits_of(model)
    spare = next(channel for channel in range(64) if channel not in plan.hidden)
    wrong = replace(plan, hidden=tuple(sorted([*plan.hidden[1:], spare])))
    assert difference(logits_of(model.merge_and_unload(plan=wrong)), masked) > 1e-6


def test_masked_is_slim_in_float32(exported: Slimmed) -> None:
    assert difference(logits_of(exported.model), exported.masked) <= 1e-5
    assert difference(exported.masked, narrow(exported.dense, exported.plan)) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_from_the_masked_model_by_rounding(dtype: torch.dtype) -> None:
    model = gate(build(LM_ROW, dtype), gates=ALL)
    model.apply_plan(hidden_plan(model, LM_ROW.slim, 40))
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 16 * torch.finfo(dtype).eps


@two_rows
def test_the_norm_of_kept_features_is_the_narrow_norm(row: Row) -> None:
    norm = build(row).get_submodule(locate(build(row)).norms[0])
    x, index = torch.randn(2, 3, 64), torch.tensor([1, 5, 40, 63])
    wide = kept_norm(norm, x, index)
    small = nn.LayerNorm(4, norm.eps) if isinstance(norm, nn.LayerNorm) else type(norm)(4, norm.variance_epsilon)
    small.load_state_dict({name: tensor[index] for name, tensor in norm.state_dict().items()})
    assert torch.equal(wide[..., index], small(x[..., index]))
    assert torch.count_nonzero(wide) == 2 * 3 * 4


def test_a_closed_norm_compiles_without_a_break() -> None:
    model = gate(build(LM_ROW), gates=("hidden",))
    model.apply_plan(hidden_plan(model, Shape(), 40))
    adapter, x = next(module for module in model.modules() if isinstance(module, HiddenAdapter)), torch.randn(2, 3, 64)
    compiled = torch.compile(adapter, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), adapter(x))


def test_generates_the_same_tokens(exported: Slimmed) -> None:
    if exported.masked_tokens is None:
        return
    for cached in (True, False):
        tokens = exported.model.generate(**inputs_of(exported.model), **GREEDY, use_cache=cached)
        assert torch.equal(tokens, exported.masked_tokens)


# ------------------------------------------------------------------- files


def test_slim_reloads_bit_equal_and_vanilla(exported: Slimmed) -> None:
    loaded = getattr(transformers, exported.auto).from_pretrained(exported.folder / "slim")
    assert type(loaded) is type(exported.model)
    assert loaded.config.hidden_size == len(exported.plan.hidden)
    assert_same_state(state_of(loaded), state_of(exported.model))
    assert torch.equal(logits_of(loaded), logits_of(exported.model))
    config = json.loads((exported.folder / "slim" / "config.json").read_text())
    assert config["head_dim"] == 8
    assert not [name for name in [*config, *loaded.state_dict()] if "hawada" in name]


def test_tied_embeddings_stay_tied(exported: Slimmed) -> None:
    if not exported.row.fields.get("tie_word_embeddings"):
        return
    head, embedding = exported.model.get_output_embeddings(), exported.model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert "lm_head.weight" not in load_file(exported.folder / "slim" / "model.safetensors")


def test_adapter_reloads_bit_equal(exported: Slimmed) -> None:
    model = PeftModel.from_pretrained(build(exported.row), exported.folder / "adapter").eval()
    assert model.applied_plan() == exported.plan
    assert torch.equal(narrow(logits_of(model), exported.plan), exported.masked)
    saved = load_file(exported.folder / "adapter" / "adapter_model.safetensors")
    assert len([name for name in saved if HIDDEN_UNITS in name]) == 1


def test_unmerging_and_unloading_restore_every_bit(row: Row) -> None:
    base = build(row)
    before, dense = state_of(base), logits_of(base)
    model = gate(base, gates=ALL)
    model.apply_plan(hidden_plan(model, Shape().complete(locate(base).dense), 32))
    gated, masked = state_of(model), logits_of(model)
    model.merge_adapter()
    assert difference(logits_of(model), masked) <= 1e-5
    model.unmerge_adapter()
    assert_same_state(state_of(model), gated)
    model.merge_adapter()
    unloaded = model.unload()
    assert_same_state(state_of(unloaded), before)
    assert torch.equal(logits_of(unloaded), dense)


def test_the_pooler_keeps_its_output() -> None:
    model = gate(build(ROWS["vit-bare"], torch.float64), gates=("hidden",))
    model.apply_plan(hidden_plan(model, Shape(), 44))
    inputs = inputs_of(model)
    with torch.no_grad():
        masked = model(**inputs).pooler_output
        found = model.merge_and_unload()(**inputs).pooler_output
    assert found.shape == masked.shape == (2, 64)
    assert difference(found, masked) <= 1e-12


def test_a_plain_model_is_slimmed_by_the_same_plan() -> None:
    model = build(LM_ROW)
    small = slim(model, hidden_plan(model, Shape(), 40))
    assert small.config.hidden_size == small.lm_head.in_features == 40
    assert small.model.layers[0].mlp.down_proj.weight.shape == (40, 96)


# -------------------------------------------------------------------- plans


def test_the_best_channels_stay() -> None:
    model = gate(build(LM_ROW), gates=("hidden",))
    plan = model.plan(Shape(hidden_size=48))
    assert sorted(stream_gate(model).theta.topk(48).indices.tolist()) == list(plan.hidden)
    assert plan.shape == Shape(8, 4, 96, 4, hidden_size=48)
    assert "hidden_size 48/64" in str(plan)


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [
        ({"hidden": 0.75}, Shape(8, 4, 96, 4, 48)),
        ({"hidden": 0.7}, Shape(8, 4, 96, 4, 48)),  # 44 is nearer, but no multiple of 8 heads
        ({"hidden": 0.7, "heads": 0.5}, Shape(4, 4, 96, 4, 44)),
        ({"hidden": 1.0}, Shape(8, 4, 96, 4)),
        ({"hidden": 0.01}, Shape(8, 4, 96, 4, 8)),
        (0.5, Shape(4, 4, 48, 4)),
    ],
)
def test_keep_ratio_is_rounded_to_legal_sizes(keep_ratio: Any, expected: Shape) -> None:
    assert gate(build(LM_ROW), gates=ALL).plan(keep_ratio=keep_ratio).shape == expected


def test_ffn_follows_where_it_is_a_multiple_of_the_hidden_size() -> None:
    model = gate(build(ROWS["dinov2"]), gates=ALL)
    assert model.plan(keep_ratio={"hidden": 0.75}).shape == Shape(8, 8, 96, 4, 48)


def test_without_a_shape_closed_channels_go() -> None:
    model = gate(build(LM_ROW), gates=("hidden",), shuffle=False)
    stream_gate(model).theta.data[10:30] = -3.0
    plan = model.plan()
    assert plan.shape.hidden_size == 48  # 44 are open
    assert set(range(64)) - set(plan.hidden) <= set(range(10, 30))


@two_rows
def test_a_fresh_adapter_keeps_everything(row: Row) -> None:
    plan = gate(build(row), shuffle=False, gates=ALL).plan()
    assert plan.keeps_all
    assert plan.hidden is None
    assert plan == gate(build(row), shuffle=False).plan()


def test_the_dense_size_means_no_cut() -> None:
    plan = gate(build(LM_ROW)).plan(Shape(hidden_size=64))
    assert plan.keeps_all
    assert "hidden" not in plan.to_dict()


def test_plan_round_trip() -> None:
    plan = hidden_plan(build(LM_ROW), LM_ROW.slim, 40)
    data = plan.to_dict()
    assert data["format"] == 1
    assert Plan.from_dict(json.loads(json.dumps(data))) == plan
    assert not plan.keeps_all
    assert "hidden" not in Plan.keep_all(plan.dense).to_dict()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"hidden": None}, "must be given together"),
        ({"dense": Shape(8, 4, 96, 4)}, "must be given together"),
        ({"hidden": (0, 64)}, r"hidden: .* 0\.\.63"),
        ({"hidden": (3, 2)}, "hidden: .*must rise"),
        ({"hidden": ()}, "hidden: at least one"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], facts: str) -> None:
    plan = hidden_plan(build(LM_ROW), LM_ROW.slim, 40)
    with pytest.raises(InvalidPlanError, match=facts):
        replace(plan, **changes)


def test_plan_for_another_residual_stream_is_refused() -> None:
    plan = hidden_plan(build(LM_ROW), Shape(), 40)
    other = build(LM_ROW, hidden_size=128)
    with pytest.raises(IncompatibleBaseError, match="hidden_size: plan 64, model 128"):
        slim(other, plan)
    with pytest.raises(IncompatibleBaseError, match="hidden_size"):
        gate(other, gates=("hidden",)).apply_plan(plan)


@pytest.mark.parametrize(
    ("shape", "facts"),
    [
        (Shape(hidden_size=128), "hidden_size 128 exceeds 64"),
        (Shape(hidden_size=44), r"LlamaConfig refuses.*\n.*nearest.*'hidden_size': 48"),
        (Shape(6, 3, hidden_size=40), r"LlamaConfig refuses.*\n.*possible.*\(8, 4\), \(4, 4\)"),
    ],
)
def test_illegal_sizes_come_with_legal_ones(shape: Shape, facts: str) -> None:
    with pytest.raises(IllegalShapeError, match=facts):
        gate(build(LM_ROW), gates=ALL).plan(shape)


def test_a_hidden_size_can_make_heads_legal() -> None:
    assert gate(build(LM_ROW), gates=ALL).plan(Shape(6, 3, hidden_size=48)).shape == Shape(6, 3, 96, 4, 48)


def test_cutting_without_gates_is_refused() -> None:
    model = gate(build(LM_ROW))
    with pytest.raises(InvalidPlanError, match=r"no gates on hidden.*Add 'hidden' to the config's `gates`"):
        model.plan(Shape(hidden_size=48))
    with pytest.raises(InvalidPlanError, match=r"closes channels of the residual stream.*no gates"):
        model.apply_plan(hidden_plan(model, Shape(), 40))


def test_a_norm_left_out_is_refused() -> None:
    model = gate(build(LM_ROW), gates=("hidden",), exclude_modules=["model.norm"])
    with pytest.raises(InvalidPlanError, match="not on every norm"):
        model.plan(Shape(hidden_size=48))


def test_size_that_splits_groups_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match="hidden_size must be a multiple of the gates' group_size 16, got 40"):
        gate(build(LM_ROW), gates=("hidden",), group_size=16).plan(Shape(hidden_size=40))


def test_gates_on_some_layers_are_refused() -> None:
    with pytest.raises(HawAdaError, match=r"one for all layers.*layers_to_transform"):
        HawAdaConfig(gates=("hidden",), layers_to_transform=[0])


# ------------------------------------------------------------ several adapters


def test_rows_of_a_batch_may_have_different_plans() -> None:
    model = gate(build(LM_ROW), gates=("hidden", "ffn"))
    model.add_adapter("other", HawAdaConfig(gates=("hidden",)))
    shuffle_gates(model, "other", seed=9)
    model.apply_plan(hidden_plan(model, Shape(), 40), adapter_name="default")
    inputs = {name: tensor[:1].repeat(3, 1) for name, tensor in inputs_of(model).items()}
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "__base__", "other"]).logits
        for row, name in enumerate(["default", None, "other"]):
            if name is not None:
                model.set_adapter(name)
                alone = model(**inputs).logits[row]
            else:
                with model.disable_adapter():
                    alone = model(**inputs).logits[row]
            assert difference(mixed[row], alone) <= 1e-5


def test_two_active_adapters_slim_exactly() -> None:
    model = gate(build(LM_ROW, torch.float64), gates=("hidden",))
    model.add_adapter("other", HawAdaConfig(gates=("hidden",)))
    shuffle_gates(model, "other", seed=9).base_model.set_adapter(["default", "other"])
    plan = model.plan(Shape(hidden_size=40))
    for name in ("default", "other"):
        model.apply_plan(plan, adapter_name=name)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-12


def test_deleting_the_first_adapter_keeps_the_gate_of_the_second() -> None:
    model = gate(build(LM_ROW), gates=("hidden",))
    model.add_adapter("other", HawAdaConfig(gates=("hidden",)))
    shuffle_gates(model, "other", seed=9).set_adapter("other")
    second = logits_of(model.eval())
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), second)


# ----------------------------------------------------------------- training


def test_the_shared_gate_gets_gradients(row: Row) -> None:
    model = gate(build(row), gates=ALL)
    model(**inputs_of(model))[0].square().mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{name}.theta" for name in collect_gates(model)}
    assert torch.count_nonzero(stream_gate(model).theta.grad) == 64


def test_under_a_plan_only_open_channels_get_gradients() -> None:
    model = gate(build(LM_ROW), gates=("hidden",))
    plan = hidden_plan(model, Shape(), 40)
    model.apply_plan(plan, in_training=True)
    model.train()
    model(**inputs_of(model))[0].square().mean().backward()
    assert stream_gate(model).theta.grad.nonzero()[:, 0].tolist() == list(plan.hidden)


def test_importance_is_the_mean_of_squared_gradients() -> None:
    model = gate(build(LM_ROW, torch.float64), gates=("hidden",), shuffle=False)
    inputs = inputs_of(model)
    batch = inputs | {"labels": inputs["input_ids"]}
    expected = torch.zeros(64, dtype=torch.float64)
    for row in range(2):
        model.zero_grad()
        model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss.backward()
        expected += stream_gate(model).theta.grad.double().square() / 2
    (found,) = gate_importance(model, [batch]).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    init_gates(model, [batch])
    assert torch.equal(stream_gate(model).theta.argsort(stable=True), found.argsort(stable=True))


# ------------------------------------------------------------- other families


def test_every_place_of_the_residual_stream_is_found() -> None:
    model = build(LM_ROW)
    plain, rules = find_axes(locate(model)), find_axes(locate(model), hidden=True)
    outside = {".model.embed_tokens.weight": 1, ".lm_head.weight": 1, ".model.norm.weight": 0}
    for name, dim in outside.items():
        assert rules[name] == (SliceRule(dim, ("hidden",), 1),)
    assert set(rules) - set(outside) == {*plain, "input_layernorm.weight", "post_attention_layernorm.weight"}
    assert set(rules["self_attn.q_proj.weight"]) == {SliceRule(0, ("heads",), 8), SliceRule(1, ("hidden",), 1)}


OWN = {
    "starcoder2": (
        Family("layers", "self_attn.o_proj", "mlp.c_proj", kv_heads_field="num_key_value_heads"),
        Row("Starcoder2ForCausalLM", "Starcoder2Config", LM, Shape(4, 2, 40, 2, 44)),
    ),
    "phi3": (
        Family(
            "layers",
            "self_attn.o_proj",
            "mlp.down_proj",
            kv_heads_field="num_key_value_heads",
            fused=(
                ("self_attn.qkv_proj", ("heads", "kv_groups", "kv_groups")),
                ("mlp.gate_up_proj", ("ffn", "ffn")),
            ),
        ),
        Row("Phi3ForCausalLM", "Phi3Config", LM, Shape(4, 2, 40, 2, 44)),
    ),
}


@pytest.mark.usefixtures("rows_of_families")
@pytest.mark.parametrize("model_type", OWN)
def test_a_row_of_the_users_own_slims_exactly(model_type: str) -> None:
    family, row = OWN[model_type]
    norms = ("input_layernorm", "post_attention_layernorm")
    register_family(model_type, replace(family, hidden_norms=norms, final_norm="norm"))
    model = gate(build(row, torch.float64), gates=ALL)
    model.apply_plan(hidden_plan(model, row.slim))
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-12


GEMMA = LM | {"head_dim": 8, "query_pre_attn_scalar": 8}


def test_a_family_without_a_place_for_it_is_refused() -> None:
    row = Row("GemmaForCausalLM", "GemmaConfig", GEMMA, Shape())  # embeddings are scaled by the hidden size
    with pytest.raises(UnsupportedModelError, match=r"'hidden'.*'gemma'.*`hidden_norms`.*'llama'.*Leave"):
        gate(build(row), gates=("hidden",))
    model = build(row)
    with pytest.raises(UnsupportedModelError, match=r"'hidden'.*'gemma'"):
        slim(model, hidden_plan(model, Shape(), 44))


@pytest.mark.usefixtures("rows_of_families")
@pytest.mark.parametrize(
    ("model_type", "row", "norms", "facts"),
    [
        (
            "gemma",
            Row("GemmaForCausalLM", "GemmaConfig", GEMMA, Shape()),
            "input_layernorm",
            r"GemmaRMSNorm.*1 \+ weight",
        ),
        (
            "olmo2",
            Row("Olmo2ForCausalLM", "Olmo2Config", TOKENS | SIZES, Shape()),
            "input_layernorm",
            r"has no module",
        ),
        ("llama", LM_ROW, "self_attn.o_proj", r"type Linear cannot carry"),
    ],
)
def test_a_row_that_names_other_modules_is_refused(model_type: str, row: Row, norms: str, facts: str) -> None:
    family = Family("layers", "self_attn.o_proj", "mlp.down_proj", kv_heads_field="num_key_value_heads")
    register_family(model_type, replace(family, hidden_norms=(norms,), final_norm="norm"))
    with pytest.raises(UnsupportedModelError, match=facts):
        gate(build(row), gates=("hidden",))


def test_hidden_states_of_a_bare_model_are_those_of_the_kept_channels() -> None:
    model = gate(build(BARE_ROW), gates=("hidden",))
    plan = hidden_plan(model, Shape(), 40)
    model.apply_plan(plan)
    closed = sorted(set(range(64)) - set(plan.hidden))
    assert not logits_of(model)[..., closed].any()
