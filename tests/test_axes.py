"""Slicing axes, found by building."""

from __future__ import annotations

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, build

from hawada_peft.surgery.axes import SliceRule, find_axes
from hawada_peft.vanilla.family import locate


def rules_of(row: Row, **fields: object) -> dict[str, tuple[SliceRule, ...]]:
    model = build(row, **fields)
    return find_axes(locate(model))


def test_consumers_are_cut_on_their_input_and_producers_on_their_output(row: Row) -> None:
    model = build(row)
    layout, rules = locate(model), rules_of(row)
    assert rules[f"{layout.family.attention_out}.weight"] == (SliceRule(1, ("heads",), 8),)
    assert rules[f"{layout.family.ffn_out}.weight"] == (SliceRule(1, ("ffn",), 1),)
    producers = {rule.segments[0] for found in rules.values() for rule in found if rule.dim == 0}
    assert producers == ({"heads", "kv_groups", "ffn"} if layout.family.kv_heads_field else {"heads", "ffn"})


def test_sizes_are_whole_units(row: Row) -> None:
    model = build(row)
    layout = locate(model)
    units = {
        "heads": layout.dense.num_attention_heads,
        "kv_groups": layout.dense.num_key_value_heads,
        "ffn": layout.dense.intermediate_size,
    }
    for name, rules in find_axes(layout).items():
        shape = model.get_parameter(f"{layout.stack}.0.{name}").shape
        for rule in rules:
            assert shape[rule.dim] == sum(units[axis] for axis in rule.segments) * rule.width


def test_parameters_of_the_residual_stream_are_not_cut(row: Row) -> None:
    assert not [name for name in rules_of(row) if "norm" in name and "q_norm" not in name]
    assert not [name for name in rules_of(row) if name.endswith(("o_proj.bias", "down_proj.bias", "fc2.bias"))]


def test_biases_follow_their_weights() -> None:
    rules = rules_of(LM_ROW, attention_bias=True)
    assert rules["self_attn.q_proj.bias"] == (SliceRule(0, ("heads",), 8),)
    assert rules["self_attn.k_proj.bias"] == (SliceRule(0, ("kv_groups",), 8),)


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["grouped", "plain"])
def test_the_model_is_not_touched(row: Row) -> None:
    model = build(row)
    before, config = [id(p) for p in model.parameters()], model.config.to_dict()
    state = torch.get_rng_state()
    find_axes(locate(model))
    assert [id(p) for p in model.parameters()] == before
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
