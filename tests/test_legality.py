"""Which sizes exist as vanilla models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    LM_ROW,
    PLAIN,
    VISION,
    VISION_ROW,
    Row,
    build,
    difference,
    gate,
)

from hawada_peft import Shape
from hawada_peft.errors import IllegalShapeError
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.legality import build_sizes, check_legal, head_shapes, legal_head_shapes
from hawada_peft.vanilla.resize import edit_config

BACKBONE = Row("Dinov2Backbone", "Dinov2Config", VISION | {"mlp_ratio": 2, "out_indices": [1, 2, 4]}, PLAIN)


def test_the_slim_shape_of_every_row_is_legal(row: Row) -> None:
    model = build(row)
    check_legal(locate(model), row.slim)


def test_legal_heads_are_those_that_build(row: Row) -> None:
    model = build(row)
    layout = locate(model)
    legal = legal_head_shapes(layout)
    assert Shape(8, layout.dense.num_key_value_heads) in legal
    for shape in legal:
        built = type(model)(edit_config(layout, shape.complete(layout.dense)))
        assert locate(built).head_dim == 8
        assert locate(built).dense == shape.complete(layout.dense)


def test_head_shapes_keep_groups_equal() -> None:
    found = [(s.num_attention_heads, s.num_key_value_heads) for s in head_shapes(Shape(8, 4, 96, 4))]
    assert found == [(8, 4), (6, 3), (4, 4), (4, 2), (3, 3), (2, 2), (2, 1), (1, 1)]


def test_refused_heads_come_with_the_possible_ones() -> None:
    model = build(LM_ROW)
    with pytest.raises(IllegalShapeError) as caught:
        check_legal(locate(model), Shape(6, 3, 96, 4))
    facts = ["'num_attention_heads': 6", "LlamaConfig refuses", "(8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1)"]
    assert [fact for fact in facts if fact not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("shape", "facts"),
    [
        (Shape(16, 4, 96, 4), r"num_attention_heads 16 exceeds 8"),
        (Shape(8, 4, 200, 9), r"intermediate_size 200 exceeds 96\nnum_hidden_layers 9 exceeds 4"),
        (Shape(6, 4, 96, 4), r"6 query heads in 4 KV groups.*at most 2\npossible"),
        (Shape(3, 1, 96, 4), r"3 query heads in 1 KV groups.*at most 2"),
    ],
)
def test_impossible_shapes_are_refused(shape: Shape, facts: str) -> None:
    model = build(LM_ROW)
    with pytest.raises(IllegalShapeError, match=facts):
        check_legal(locate(model), shape)


def test_edit_leaves_the_dense_config_and_everything_else(row: Row) -> None:
    model = build(row)
    before, layout = model.config.to_dict(), locate(model)
    edited = edit_config(layout, row.slim, layers=(1, 3)).to_dict()
    assert model.config.to_dict() == before
    sizes = {
        "num_attention_heads",
        "num_hidden_layers",
        "head_dim",
        layout.family.kv_heads_field,
        layout.family.ffn_field,
    }
    stages = {"out_features", "out_indices", "stage_names"}
    changed = {name for name in before.keys() | edited.keys() if before.get(name) != edited.get(name)}
    assert changed <= sizes | stages | set(layout.family.layer_lists)


def test_edit_to_the_same_shape_changes_nothing(row: Row) -> None:
    model = build(row)
    layout = locate(model)
    assert edit_config(layout, layout.dense).to_dict() == model.config.to_dict()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_is_kept(implementation: str) -> None:
    model = build(LM_ROW, attn_implementation=implementation)
    layout = locate(model)
    assert edit_config(layout, layout.dense)._attn_implementation == implementation


def test_stages_of_a_backbone_follow_the_kept_layers() -> None:
    model = build(BACKBONE)
    edited = edit_config(locate(model), Shape(8, 8, 128, 2), layers=(1, 3))
    assert edited.out_indices == [0, 1, 2]  # stage i comes out of layer i - 1
    assert edited.out_features == [edited.stage_names[i] for i in edited.out_indices]


def test_a_slim_backbone_gives_the_masked_feature_maps() -> None:
    model = gate(build(BACKBONE, torch.float64))
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plan = model.plan(keep_ratio={"heads": 0.5, "ffn": 0.5, "layers": 0.5})
    assert len(plan.layers) == 3  # one before each stage
    model.apply_plan(plan)
    with torch.no_grad():
        masked = model(pixel_values=pixels).feature_maps
        found = model.merge_and_unload()(pixel_values=pixels).feature_maps
    assert len(found) == len(masked) == 3
    assert all(difference(new, old) <= 1e-12 for new, old in zip(found, masked, strict=True))


@pytest.mark.parametrize("fields", [{"intermediate_size": 1}, {"num_hidden_layers": 1}, {"num_attention_heads": 1}])
def test_the_smallest_sizes_exist(fields: dict[str, Any]) -> None:
    model = build(VISION_ROW)
    layout = locate(model)
    assert build_sizes(layout, Shape(**fields).complete(layout.dense)) is None
