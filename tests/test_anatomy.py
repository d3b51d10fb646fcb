"""What can be removed, as data: JSON both ways, rows of units, lookups."""

from __future__ import annotations

import pytest

from hawada_peft.discovery import Anatomy, Axis, Number, PerLayer, Pinned, Place, Refusal, Rows, Segment, Stack
from hawada_peft.errors import UnsupportedModelError

PLACE = Place("model.layers.*.mlp.down_proj.weight", 1, "input", 96, (0, 2))
FFN = Axis(
    "intermediate_size",
    "ffn",
    96,
    (Number("intermediate_size", 96),),
    (PLACE,),
    (Rows("model.layers.*.mlp.gate_up_proj.weight", 0, 0, (Segment(1, 96), Segment(1, 96)), layers=(0, 2)),),
    range(1, 97),
)
HEADS = Axis("num_key_value_heads", "heads", 4, (Number("num_key_value_heads", 4),), (), (), (1, 2, 4), tied=True)
STACK = Stack("num_hidden_layers", "model.layers", 3, (1, 2), (Pinned(0, "why"),), (("a", "b"), (), ("a",)))
ANATOMY = Anatomy("LlamaForCausalLM", "llama", (FFN, HEADS), (STACK,), (Refusal("hidden_size", "because"),))


def test_json_gives_the_same_back() -> None:
    stack = Stack("depth", "blocks", 2, (), per_layer=(PerLayer("table", 1, 8),))
    whole = Anatomy("A", "a", (FFN, HEADS), (STACK, stack), (Refusal("x", "y"),))
    assert Anatomy.from_json(whole.to_json()) == whole


def test_what_is_no_anatomy_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no anatomy"):
        Anatomy.from_json("{")
    with pytest.raises(UnsupportedModelError, match="has no fields"):
        Anatomy.from_json('{"model_class": "A", "model_type": "a", "colour": 1}')


def test_a_star_is_every_layer() -> None:
    assert list(PLACE.names()) == ["model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    assert PLACE.module == "model.layers.*.mlp.down_proj"
    assert list(Place("head.fc2.weight", 1, "input", 4).names()) == ["head.fc2.weight"]


def test_segments_count_units_from_the_first() -> None:
    rows = Rows("qkv", 0, 0, (Segment(2, 2), Segment(1, 2), Segment(3)))
    assert rows.units() == [0, 0, 1, 1, 0, 1, -1, -1, -1]


def test_groups_go_on_counting() -> None:
    rows = Rows("qkv", 0, 0, (Segment(1, 2), Segment(1)), groups=2)
    assert rows.units() == [0, 1, -1, 2, 3, -1]


def test_explicit_rows_are_what_they_say() -> None:
    assert Rows("table", 0, 0, explicit=(1, -1, 0)).units() == [1, -1, 0]


@pytest.mark.parametrize(
    ("value", "units", "left", "expected"),
    [
        (32, 8, 2, 8),
        (4, 3072, 1536, 2),
        (4, 3072, 1537, 4 * 1537 / 3072),
        (96, 96, 41, 41),
        (2.5, 40, 16, 1.0),
        (4.0, 128, 64, 2.0),
    ],
)
def test_numbers_follow_their_units(value: float, units: int, left: int, expected: float) -> None:
    found = Number("x", value).at(left, units)
    assert found == expected
    assert type(found) is type(expected)


def test_an_axis_is_found_by_name_and_by_kind() -> None:
    assert ANATOMY.axis("intermediate_size") is ANATOMY.axis("ffn") is FFN
    with pytest.raises(UnsupportedModelError, match="no axis 'hidden_size': because"):
        ANATOMY.axis("hidden_size")
