"""A plan in JSON: masks of bits for channels, and what is wrong with one that somebody wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..vanilla.shape import AXES


def json_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Fields of another type than `to_dict` gives them: what was given, and what is allowed."""
    dense = data["dense"]
    if not isinstance(dense, Mapping) or not all(_is_index(size) for size in dense.values()):
        yield f"dense must be an object of sizes, got {short(dense)}"
        return
    lacking = [name for name in AXES if name not in dense]
    if lacking:
        yield f"dense lacks {lacking}"
        return
    if not _are_indices(data["layers"]):
        yield f"layers must be a list of whole numbers, got {short(data['layers'])}"
    if not isinstance(data["heads"], list) or not all(_are_indices(row) for row in data["heads"]):
        yield f"heads must be a list of lists of whole numbers, got {short(data['heads'])}"
    total = dense["intermediate_size"]
    if not isinstance(data["channels"], list) or not all(is_mask(mask, total) for mask in data["channels"]):
        yield f"channels must be a list of bit masks of {total} bits, in hexadecimal, got {short(data['channels'])}"
    if data.get("hidden") is not None and not is_mask(data["hidden"], dense.get("hidden_size", 0)):
        yield f"hidden must be a bit mask of the residual stream, in hexadecimal, got {short(data['hidden'])}"
    experts, total = data.get("experts"), dense.get("num_experts", 0)
    if experts is not None and not (isinstance(experts, list) and all(is_mask(mask, total) for mask in experts)):
        yield f"experts must be a list of bit masks of {total} bits, in hexadecimal, got {short(experts)}"
    if data.get("head_dim") is not None and not _is_index(data["head_dim"]):
        yield f"head_dim must be a whole number, got {short(data['head_dim'])}"
    if not isinstance(data.get("tower", ""), str):
        yield f"tower must be the path of a sub-config, got {short(data['tower'])}"
    roundings = data.get("roundings", [])
    if not isinstance(roundings, list) or not all(isinstance(rounding, Mapping) for rounding in roundings):
        yield f"roundings must be a list of objects, got {short(roundings)}"


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_indices(values: Any) -> bool:
    return isinstance(values, list) and all(_is_index(value) for value in values)


def is_mask(value: Any, total: int) -> bool:
    """Whether a value of a file is a bit mask of so many units, in hexadecimal."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]+", value)) and len(value) <= total // 4 + 1


def short(value: Any) -> str:
    """A value for a message: at most 80 characters of it."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep"
    return text if len(text) <= 80 else f"{text[:80]}..."


def to_mask(kept: tuple[int, ...]) -> str:
    """Indices as a hexadecimal bit mask, index 0 lowest."""
    return f"{sum(1 << index for index in kept):x}"


def from_mask(mask: str) -> tuple[int, ...]:
    """The inverse of `to_mask`."""
    return tuple(index for index, bit in enumerate(f"{int(mask, 16):b}"[::-1]) if bit == "1")
