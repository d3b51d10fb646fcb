"""What an export would refuse is refused when the gates are placed, and layers that must stay are never offered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM, SIZES, Row, build, difference, gate, logits_of, scattered_plan
from families import BOUND, FURTHER
from torch import nn

from hawada_peft import Plan, Shape, save_slim, slim
from hawada_peft.errors import HawAdaError, IllegalShapeError, UnsupportedModelError
from hawada_peft.surgery.readers import mixes
from hawada_peft.vanilla.family import FAMILIES, Family, locate, register_family
from hawada_peft.vanilla.legality import depth_of

YOLOS = Row(
    "YolosModel",
    "YolosConfig",
    SIZES | {"image_size": [16, 16], "patch_size": 8, "num_detection_tokens": 3, "use_mid_position_embeddings": True},
    BOUND,
)
FEATURES = {"feature_projection_input_dim": 40, "conv_depthwise_kernel_size": 3, "vocab_size": 32}
TWO_FFNS = Row("Wav2Vec2BertModel", "Wav2Vec2BertConfig", SIZES | FEATURES, BOUND)

PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
KINDS_OF_LAYERS = {"global_head_dim": 8, "sliding_window": 6, "layer_types": ["full_attention"] * 4}
TABLES = Row("Gemma4ForCausalLM", "Gemma4TextConfig", LM | PER_LAYER | KINDS_OF_LAYERS, Shape(4, 2, 40, 2))

T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 4, "num_heads": 8}
SHARED_TABLE = Row("T5EncoderModel", "T5Config", T5, Shape(8, 8, 40, 3))

ROWS: dict[str, tuple[Row, Family]] = {
    "gemma4_text": (TABLES, FAMILIES["gemma3_text"]),
    "yolos": (YOLOS, Family("encoder.layer", "attention.output.dense", "output.dense", head_dim_field="")),
    "t5": (
        SHARED_TABLE,
        Family(
            "encoder.block",
            "layer.0.SelfAttention.o",
            "layer.1.DenseReluDense.wo",
            head_dim_field="d_kv",
            ffn_field="d_ff",
        ),
    ),
    "wav2vec2-bert": (
        TWO_FFNS,
        Family("encoder.layers", "self_attn.linear_out", "ffn1.output_dense", head_dim_field=""),
    ),
}


@pytest.fixture
def model(request: pytest.FixtureRequest, rows_of_families: None) -> Any:
    row, family = ROWS[request.param]
    register_family(request.param, family)
    return build(row)


@pytest.mark.parametrize("model", ["wav2vec2-bert"], indirect=True)
def test_a_place_without_a_gate_is_found_at_injection(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\['ffn'\].*ffn2.output_dense reads them.*Leave 'ffn' out"):
        gate(model)
    gated = gate(model, gates=("layers",))  # nothing of the FFN is cut then
    assert gated.plan(keep_ratio={"layers": 0.5}).shape.num_hidden_layers == 2


@pytest.mark.parametrize("model", ["t5"], indirect=True)
def test_a_table_that_all_layers_read_keeps_their_heads(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"relative_attention_bias.*only some layers hold it"):
        gate(model)
    gated = gate(model.double(), gates=("ffn", "layers"))
    plan = gated.plan(Shape(intermediate_size=40, num_hidden_layers=3))
    assert plan.layers[0] == 0
    gated.apply_plan(plan)
    masked = logits_of(gated)
    assert difference(logits_of(gated.merge_and_unload()), masked) < 1e-12


@pytest.mark.parametrize("model", ["gemma4_text"], indirect=True)
def test_tables_outside_with_rows_per_layer_are_cut_with_the_layers(model: Any, tmp_path: Path) -> None:
    assert depth_of(locate(model)).rows == {
        "model.embed_tokens_per_layer.weight": (1, 16),
        "model.per_layer_model_projection.weight": (0, 16),
    }
    gated = gate(model.double())
    gated.apply_plan(scattered_plan(gated, TABLES.slim))
    masked = logits_of(gated)
    small = gated.merge_and_unload()
    assert difference(logits_of(small), masked) < 1e-12
    save_slim(small, tmp_path / "slim")
    assert small.model.embed_tokens_per_layer.weight.shape == (128, 32)


@pytest.mark.parametrize("model", ["yolos"], indirect=True)
def test_layers_with_a_table_outside_are_not_offered(model: Any) -> None:
    assert depth_of(locate(model)).pinned.keys() == {0, 1, 2, 3}
    gated = gate(model)
    assert gated.plan(keep_ratio={"layers": 0.5, "ffn": 0.5}).shape == replace(
        BOUND, num_hidden_layers=4, intermediate_size=48
    )
    with pytest.raises(IllegalShapeError, match=r"mid_position_embeddings.*holds no row per layer"):
        gated.plan(Shape(num_hidden_layers=3))


def test_a_layer_of_its_own_kind_stays() -> None:
    model = gate(build(FURTHER["modernbert"]), shuffle=False)
    (pinned,) = depth_of(locate(model.get_base_model())).pinned.items()
    assert pinned[0] == 0
    assert "attn_norm" in pinned[1]
    assert model.plan(Shape(num_hidden_layers=2)).layers[0] == 0
    plan = model.plan(keep_ratio={"layers": 0.01})
    assert plan.layers == (0,)
    (rounding,) = [each for each in plan.roundings if each.axis == "num_hidden_layers"]
    assert "layer 0 stays" in rounding.reason
    with pytest.raises(IllegalShapeError, match=r"layer 0.*attn_norm"):
        model.apply_plan(Plan(plan.dense, (1,), plan.heads, plan.channels))


def test_no_layer_is_pinned_without_reason() -> None:
    for name in ("gemma3_text", "phi3", "dinov2_with_registers", "stablelm"):
        assert depth_of(locate(build(FURTHER[name]))).pinned == {}


def test_layers_may_be_pinned_by_the_row(rows_of_families: None) -> None:
    model = build(FURTHER["gemma"])
    register_family("gemma", replace(locate(model).family, pinned=((2, "because"),)))
    gated = gate(model)
    assert 2 in gated.plan(Shape(num_hidden_layers=1)).layers
    with pytest.raises(HawAdaError, match="because"):
        gated.apply_plan(scattered_plan(gated, Shape(num_hidden_layers=1)))


def test_rows_in_an_undeclared_order_are_found_at_injection(rows_of_families: None) -> None:
    model = build(FURTHER["modernbert"])
    register_family("modernbert", replace(locate(model).family, fused=()))
    with pytest.raises(UnsupportedModelError, match=r"mlp\.Wi"):
        gate(model)
    small = slim(model, scattered_plan(model, Shape(num_hidden_layers=4)))  # nothing of the FFN is cut
    assert small.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("module", "expected"),
    [(nn.LayerNorm(8), True), (nn.RMSNorm(8), True), (nn.PReLU(8), False), (nn.Linear(8, 8), False)],
    ids=["LayerNorm", "RMSNorm", "PReLU", "Linear"],
)
def test_norms_are_told_by_what_they_compute(module: nn.Module, expected: bool) -> None:
    before = [tensor.clone() for tensor in module.parameters()]
    assert mixes(module, "weight") is expected
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
