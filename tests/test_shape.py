"""The sizes of a model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from hawada_peft import Shape
from hawada_peft.errors import IllegalShapeError
from hawada_peft.vanilla.shape import BY_NAME, LAYERS, SIZES

DENSE, MHA = Shape(8, 4, 96, 4), Shape(8, 8, 96, 4)


def test_complete_fills_what_is_left_out() -> None:
    assert Shape(intermediate_size=40).complete(DENSE) == Shape(8, 4, 40, 4)
    assert Shape().complete(DENSE) == DENSE


def test_groups_follow_heads_in_plain_attention_only() -> None:
    assert Shape(num_attention_heads=4).complete(MHA) == Shape(4, 4, 96, 4)
    assert Shape(num_attention_heads=4).complete(DENSE) == Shape(4, 4, 96, 4)
    assert Shape(num_attention_heads=8, num_key_value_heads=2).complete(DENSE) == Shape(8, 2, 96, 4)


def test_heads_per_group() -> None:
    assert DENSE.heads_per_group == 2
    with pytest.raises(IllegalShapeError, match="complete"):
        _ = Shape(num_attention_heads=8).heads_per_group


@pytest.mark.parametrize("shape", [DENSE, Shape(), Shape(num_hidden_layers=2)])
def test_round_trip(shape: Shape) -> None:
    assert Shape.from_dict(shape.to_dict()) == shape


def test_sizes_need_a_complete_shape() -> None:
    assert DENSE.sizes() == DENSE.to_dict()
    with pytest.raises(IllegalShapeError, match=r"leaves out \['intermediate_size'\]"):
        Shape(8, 4, None, 4).sizes()


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", True])
def test_bad_sizes_are_named(size: Any) -> None:
    with pytest.raises(IllegalShapeError, match=f"intermediate_size must be .* got {size!r}"):
        Shape(intermediate_size=size)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(IllegalShapeError, match=r"num_attention_heads.*\n.*num_hidden_layers"):
        Shape(num_attention_heads=0, num_hidden_layers=-2)


def test_unknown_sizes_are_named() -> None:
    with pytest.raises(IllegalShapeError, match=r"unknown sizes \['heads'\].*num_attention_heads"):
        Shape.from_dict({"heads": 4})


def test_every_size_of_a_shape_has_one_axis() -> None:
    assert [axis.field for axis in SIZES] == [each.name for each in fields(Shape)]
    assert len({axis.name for axis in SIZES}) == len({axis.plural for axis in SIZES}) == len(SIZES)
    assert BY_NAME[LAYERS].field == "num_hidden_layers"
