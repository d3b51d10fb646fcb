"""What was cut, in words and numbers."""

from __future__ import annotations

import pytest

from hawada_peft import Shape
from hawada_peft.planning.cut import SIZES, cuts, sentence

DENSE = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1000, "num_hidden_layers": 6}


def test_every_size_of_a_shape_has_a_word() -> None:
    assert SIZES.keys() == {*Shape().__dataclass_fields__}


def test_rows_are_in_one_order_and_say_what_is_left() -> None:
    slim = {
        "parameters": 50,
        "num_hidden_layers": 3,
        "intermediate_size": 1000,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    rows = cuts(DENSE | {"parameters": 200}, slim)
    assert [row.name for row in rows] == ["layers", "query heads", "FFN channels", "features per head", "parameters"]
    assert [row.part for row in rows] == [0.5, 0.25, 1.0, None, 0.25]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Cut: nothing. 1,000 of 2,000 parameters stay (50%)."),
        ({"num_hidden_layers": 4}, "Cut: 2 of 6 layers. "),
        (
            {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
            "Cut: 2 of 6 layers, 2 of 8 query heads in every kept layer and 16 of 64 channels of the residual stream.",
        ),
    ],
)
def test_a_sentence_names_what_is_gone(changes: dict[str, int], words: str) -> None:
    dense = DENSE | {"hidden_size": 64, "parameters": 2000}
    assert sentence(dense, dense | {"parameters": 1000} | changes).startswith(words)
