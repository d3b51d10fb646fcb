"""Family rows: the lookup, rows of the user's own, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import (
    BARE_ROW,
    LM,
    LM_ROW,
    PLAIN,
    SIZES,
    TOKENS,
    VISION,
    Row,
    build,
    difference,
    gate,
    logits_of,
    scattered_plan,
)
from peft import get_peft_model
from torch import nn

from hawada_peft import Family, HawAdaConfig, Shape, register_family, save_slim
from hawada_peft.errors import IllegalShapeError, InvalidPlanError, UnsupportedModelError
from hawada_peft.vanilla.family import FAMILIES, TARGET_MODULES, locate

PLAIN_ROW = Family("layers", "self_attn.o_proj", "mlp.c_proj", kv_heads_field="num_key_value_heads")
FUSED = (("self_attn.qkv_proj", ("heads", "kv_groups", "kv_groups")), ("mlp.gate_up_proj", ("ffn", "ffn")))
FUSED_ROW = replace(PLAIN_ROW, ffn_out="mlp.down_proj", fused=FUSED)
BOUND_ROW = Family("layers", "attention.dense", "mlp.dense_4h_to_h", head_dim_field="")
OWN: dict[str, tuple[Family, Row]] = {
    "starcoder2": (PLAIN_ROW, Row("Starcoder2ForCausalLM", "Starcoder2Config", LM, Shape(4, 2, 40, 2))),
    "phi3": (FUSED_ROW, Row("Phi3ForCausalLM", "Phi3Config", LM, Shape(4, 2, 40, 2))),
    "gpt_neox": (BOUND_ROW, Row("GPTNeoXForCausalLM", "GPTNeoXConfig", TOKENS | SIZES, Shape(8, 8, 40, 2))),
}
own_rows = pytest.mark.parametrize("model_type", OWN)


def test_every_row_is_found(row: Row) -> None:
    model = build(row)
    layout = locate(model)
    assert layout.head_dim == 8
    assert layout.hidden_size == 64
    assert isinstance(model.get_submodule(layout.stack), nn.ModuleList)
    assert layout.dense.num_attention_heads == 8
    assert TARGET_MODULES[model.config.model_type] == [layout.family.attention_out, layout.family.ffn_out]


@pytest.mark.usefixtures("rows_of_families")
def test_what_building_tells_is_kept_for_every_model_of_the_row_the_class_and_the_config() -> None:
    def asked(row: Row, **fields: object) -> object:
        return locate(build(row, **fields)).once("test", object)

    first = asked(LM_ROW)
    assert asked(LM_ROW) is first
    assert asked(LM_ROW, _name_or_path="elsewhere") is first
    assert asked(LM_ROW, attention_bias=True) is not first
    assert asked(BARE_ROW) is not first
    register_family("llama", replace(FAMILIES["llama"], branches=("mlp.down_proj",)))
    assert asked(LM_ROW) is not first


def test_positions_are_the_ends_of_layers(row: Row) -> None:
    layout = locate(build(row))
    assert layout.position(layout.attention_out(2)) == (2, "heads")
    assert layout.position(layout.ffn_out(0)) == (0, "ffn")
    assert layout.position(layout.stack) is None
    assert layout.position(f"other.{layout.ffn_out(0)}") is None


def test_base_sizes_hold_the_sizes(row: Row) -> None:
    layout = locate(build(row))
    assert layout.base_sizes().items() >= {"hidden_size": 64, "head_dim": 8, **layout.dense.sizes()}.items()


@pytest.mark.usefixtures("rows_of_families")
@own_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_the_users_own_slims_exactly(model_type: str, dtype: torch.dtype) -> None:
    family, row = OWN[model_type]
    register_family(model_type, family)
    model = gate(build(row, dtype))
    model.apply_plan(scattered_plan(model, row.slim))
    masked = logits_of(model)
    slimmed = model.merge_and_unload()
    assert locate(slimmed).dense == row.slim
    assert difference(logits_of(slimmed), masked) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.usefixtures("rows_of_families")
@own_rows
def test_a_slim_model_of_the_users_own_family_verifies(model_type: str, tmp_path) -> None:
    family, row = OWN[model_type]
    register_family(model_type, family)
    model = gate(build(row))
    found = save_slim(model.merge_and_unload(plan=scattered_plan(model, row.slim)), tmp_path / "slim")
    assert found.max_difference == 0


@pytest.mark.usefixtures("rows_of_families")
@pytest.mark.parametrize("missing", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_a_fused_layout_must_be_declared(missing: str) -> None:
    rest = tuple(entry for entry in FUSED if entry[0] != missing)
    register_family("phi3", replace(FUSED_ROW, fused=rest))
    with pytest.raises(UnsupportedModelError, match=rf"{missing}.*order of its rows is not known.*`fused`"):
        gate(build(OWN["phi3"][1]))


@pytest.mark.usefixtures("rows_of_families")
def test_heads_that_are_not_free_are_refused() -> None:
    register_family("gpt_neox", BOUND_ROW)
    model = gate(build(OWN["gpt_neox"][1]))
    with pytest.raises(IllegalShapeError, match=r"heads of 16 features when asked for.*\n.*possible.*: \(8, 8\)"):
        model.plan(Shape(num_attention_heads=4))


@pytest.mark.usefixtures("rows_of_families")
def test_registering_replaces_a_row() -> None:
    register_family("llama", BOUND_ROW)
    assert FAMILIES["llama"] is BOUND_ROW
    assert TARGET_MODULES["llama"] == ["attention.dense", "mlp.dense_4h_to_h"]


@pytest.mark.usefixtures("rows_of_families")
@pytest.mark.parametrize(
    ("changes", "looked_for"),
    [
        ({"layers": "decoder.blocks"}, "'model.decoder.blocks'"),
        ({"attention_out": "attn.out"}, "'model.layers.0.attn.out'"),
        ({"ffn_out": "mlp.fc9"}, "'model.layers.0.mlp.fc9'"),
    ],
)
def test_a_wrong_row_says_what_it_looked_for(changes: dict[str, str], looked_for: str) -> None:
    model = build(LM_ROW)
    register_family("llama", replace(FAMILIES["llama"], **changes))
    with pytest.raises(UnsupportedModelError, match=rf"has no module {looked_for}.*register_family"):
        locate(model)


@pytest.mark.usefixtures("rows_of_families")
def test_layers_must_be_a_list() -> None:
    model = build(LM_ROW)
    register_family("llama", replace(FAMILIES["llama"], layers="norm"))
    with pytest.raises(UnsupportedModelError, match=r"'model.norm' should be a list of layers, is a LlamaRMSNorm"):
        locate(model)


def test_layers_of_several_sizes_are_refused() -> None:
    model = build(LM_ROW)
    model.model.layers[1].mlp.down_proj = nn.Linear(80, 64)
    with pytest.raises(UnsupportedModelError, match=r"same sizes.*\(64, 80\), \(64, 96\)"):
        locate(model)


@pytest.mark.parametrize(
    "row",
    [
        Row("BloomForCausalLM", "BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 1}, PLAIN),
    ],
    ids=lambda row: row.config,
)
def test_a_family_without_a_row_of_which_nothing_is_found_is_refused(row: Row) -> None:
    model = build(row)
    with pytest.raises(UnsupportedModelError) as caught:
        get_peft_model(model, HawAdaConfig())
    facts = [repr(model.config.model_type), "'llama'", "target_modules", "register_family"]
    assert [fact for fact in facts if fact not in str(caught.value)] == []


def test_a_module_of_another_library_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Sequential is not a transformers model.*target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), HawAdaConfig())


def test_modules_named_by_the_user_are_not_planned() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HawAdaConfig(target_modules=["0"]))
    with pytest.raises(InvalidPlanError, match=r"'default'.*target_modules"):
        model.plan(keep_ratio=0.5)


def test_a_ffn_size_that_the_config_cannot_state_is_refused() -> None:
    model = gate(build(Row("Dinov2Model", "Dinov2Config", VISION | {"mlp_ratio": 2}, PLAIN)))
    with pytest.raises(IllegalShapeError, match=r"intermediate_size: multiples of hidden_size = 64"):
        model.plan(Shape(intermediate_size=100))
