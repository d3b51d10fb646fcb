"""Kept units at modules beside the ends of the layers: a second FFN of a layer, a pooling head, another stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..vanilla.shape import FFN, HEADS
from .stored import from_mask, is_mask, short, to_mask

SIZES = {HEADS: "num_attention_heads", FFN: "intermediate_size"}
"""The axes that may have units elsewhere, and the sizes that count them."""


@dataclass(frozen=True)
class Further:
    """
    What stays at one module.

    Args:
        axis (`str`): `"heads"` or `"ffn"`.
        module (`str`): its full dotted name in the dense model.
        kept (`tuple[int, ...]`): the units that stay; as many as in a layer.
    """

    axis: str
    module: str
    kept: tuple[int, ...]


def to_masks(further: tuple[Further, ...]) -> dict[str, dict[str, str]]:
    """For JSON: of each axis the modules, and a hexadecimal bit mask of the units that stay there, unit 0 lowest."""
    return {
        axis: {each.module: to_mask(each.kept) for each in further if each.axis == axis}
        for axis in dict.fromkeys(each.axis for each in further)
    }


def from_masks(data: Mapping[str, Mapping[str, str]]) -> tuple[Further, ...]:
    """The inverse of `to_masks`, of what has no `mask_problems`."""
    return tuple(
        Further(axis, module, from_mask(mask)) for axis, masks in data.items() for module, mask in masks.items()
    )


def mask_problems(data: Any, dense: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with such an object of a file: what was given, and what is allowed."""
    if not isinstance(data, Mapping) or not all(isinstance(masks, Mapping) for masks in data.values()):
        yield f"further must be an object with one of bit masks by module for each of {list(SIZES)}, got {short(data)}"
        return
    for axis, masks in data.items():
        total = dense[SIZES[axis]] if axis in SIZES else 0
        if not all(isinstance(module, str) and is_mask(mask, total) for module, mask in masks.items()):
            yield f"further.{short(axis)} must be bit masks of {total} bits, in hexadecimal, got {short(dict(masks))}"
