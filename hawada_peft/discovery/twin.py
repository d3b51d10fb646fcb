"""
A tiny copy of a config: the same class with small numbers.

Long because each kind of number gets smaller in its own way.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .parts.heads import HEADLIKE, NOT_HEADS, WIDTHS, heads_in
from .trial.builds import REFUSES, cause, shapes_of
from .trial.config_tree import CHOSEN_EXPERTS, DESCRIPTIONS, Path, edited, scopes_of

SMALL, LARGE = 2_000_000, 100_000_000
"""Parameters of a model that is small enough as it is, and of one that is too large to be tried at all."""

VOCABULARY, POSITIONS, WINDOW, PATCHES, WIDTH = 256, 64, 6, 4, 96
"""What tokens, positions, tokens in a window, patches along a side and other widths come down to."""

EXPERTS, CHOSEN, GROUPS = 8, 2, 2
"""Experts, those that are chosen for a token, and groups that they are chosen from first."""

HEAD_SIZES, HEADS = 8, 4
"""A head's features and a layer's heads are not made fewer than this."""

VOCABULARIES = re.compile("vocab_size")
TOKENS = re.compile("token_(id|index)s?$")
SOURCES = re.compile("max_source_positions|max_target_positions")
WINDOWS = re.compile("^sliding_window$|local_attention|attention_chunk_size|attention_window")
IMAGES = re.compile("image_size$")
COUNTED_EXPERTS = re.compile("^(n|num)_(local_|routed_)?experts$|moe_num_experts$")
EXPERT_GROUPS = re.compile("^(n|num)_(expert_)?groups?$|^topk_group$")
HEAD_SIZE = re.compile("head_dim|head_size|^d_kv$|rotary_dim")
NO_WIDTH = re.compile(
    "layer|depth|expert|head|token|vocab|position|group|patch|image|kernel|stride|channels|labels|version|ids?$"
    "|index|window|bucket|^num_|^n_|steps|length|frames|bins|ratio|factor|queries|points|seed|state|block"
)
"""Names of whole numbers that are no widths of their own."""

Fields = dict[str, Any]


def shrunk(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """
    Configs with small numbers and all layers, the smallest first; the last is the config itself, if it is not large.

    Args:
        model_class: of transformers.
        config: the real one.

    Raises:
        UnsupportedModelError: if no model of the class is built from it.
    """
    try:
        parameters = _parameters(model_class, config)
    except REFUSES as error:
        raise UnsupportedModelError(f"no {model_class.__name__} is built from this config ({cause(error)})") from error
    if parameters <= SMALL:
        yield config
        return
    for head_sizes, widths in ((True, True), (False, True), (True, False), (False, False)):
        try:
            small = _shrink(config, head_sizes=head_sizes, widths=widths)
            fits = _parameters(model_class, small) <= LARGE
        except REFUSES:
            continue
        if fits:
            yield small
    if parameters <= LARGE:
        yield config


def _parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    return sum(math.prod(shape) for shape in shapes_of(model_class, config).values())


def _shrink(config: PreTrainedConfig, *, head_sizes: bool, widths: bool) -> PreTrainedConfig:
    """All numbers made small, each kind by its rule."""
    scopes = {path: _own(inner) for path, inner in scopes_of(config)}
    changes: dict[Path, Any] = {}
    mapped: dict[int, int] = {}
    factors = {path: _factors(own, head_sizes) for path, own in scopes.items()}
    for path, own in scopes.items():
        heads, head_size = factors[path]
        for name in (name for name in WIDTHS if isinstance(own.get(name), int)):
            if own[name] % (heads * head_size) == 0:
                mapped.setdefault(own[name], own[name] // (heads * head_size))
    largest = max((size for own in scopes.values() for size in _vocabularies(own)), default=0)
    tokens = _tokens(scopes.values())
    image = next((own["patch_size"] for own in scopes.values() if isinstance(own.get("patch_size"), int)), 0)
    for path, own in scopes.items():
        heads, head_size = factors[path]
        for name, value in own.items():
            new = _smaller(name, value, heads, head_size, mapped, widths=widths)
            if VOCABULARIES.search(name) and largest > VOCABULARY and isinstance(value, int):
                new = min(value, VOCABULARY)
            if TOKENS.search(name) and largest > VOCABULARY:
                new = _renumbered(value, tokens)
            if IMAGES.search(name):
                new = _image(value, own, image)
            if name == "mm_tokens_per_image" and image:
                new = 1
            if name in DESCRIPTIONS and isinstance(value, dict):
                new = _rotary(value, head_size)
            if new != value:
                changes[(*path, name)] = new
    return edited(config, changes)


def _own(config: PreTrainedConfig) -> Fields:
    return {
        name: value
        for name, value in copy.deepcopy(config.to_dict()).items()
        if name not in config.sub_configs and not name.startswith("_")
    }


def _whole(own: Fields) -> Iterator[tuple[str, int]]:
    for name, value in own.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield name, value


def _factors(own: Fields, head_sizes: bool) -> tuple[int, int]:
    """By how much the heads of a scope get fewer, and the size of a head smaller."""
    heads = heads_in(own)
    few = 1
    if heads:
        most = max(heads) // HEADS
        fits = [
            factor
            for factor in range(1, most + 1)
            if all(each % factor == 0 for each in heads) and min(heads) // factor >= min(2, min(heads))
        ]
        few = max(fits, default=1)
    if not head_sizes:
        return few, 1
    sizes = [value for name, value in _whole(own) if HEAD_SIZE.search(name)]
    width = next((own[name] for name in WIDTHS if isinstance(own.get(name), int)), 0)
    if heads and width and width % max(heads) == 0:
        sizes.append(width // max(heads))
    fits = [
        factor
        for factor in (2, 4, 8, 16)
        if sizes and all(size % (4 * factor) == 0 and size // factor >= min(HEAD_SIZES, size) for size in sizes)
    ]
    return few, max(fits, default=1)


def _vocabularies(own: Fields) -> list[int]:
    return [value for name, value in _whole(own) if VOCABULARIES.search(name)]


def _smaller(name: str, value: Any, heads: int, head_size: int, mapped: dict[int, int], *, widths: bool) -> Any:
    """A number, or a list of widths, by the rule of its kind."""
    if isinstance(value, list | tuple):
        return _smaller_list(name, value) if widths else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        return value
    if HEAD_SIZE.search(name):
        return value // head_size if value % head_size == 0 else value
    if HEADLIKE.search(name) and not NOT_HEADS.search(name):
        return value // heads
    if SOURCES.search(name):
        return min(value, POSITIONS)
    if WINDOWS.search(name):
        return min(value, WINDOW)
    if COUNTED_EXPERTS.search(name):
        return min(value, EXPERTS)
    if CHOSEN_EXPERTS.search(name):
        return min(value, CHOSEN)
    if EXPERT_GROUPS.search(name):
        return min(value, GROUPS if name != "topk_group" else 1)
    if value in mapped and (name in WIDTHS or not NO_WIDTH.search(name)):
        return mapped[value]
    if not widths or NO_WIDTH.search(name) or value <= WIDTH:
        return value
    new = value
    while new > WIDTH and new % 2 == 0:
        new //= 2
    taken = set(mapped.values())
    while new in taken and new % 4 == 0:
        new = new * 3 // 4
    mapped[value] = new
    return new


def _smaller_list(name: str, value: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Widths of stages, all by one factor."""
    numbers = [each for each in value if isinstance(each, int) and not isinstance(each, bool)]
    if len(numbers) < len(value) or not value or NO_WIDTH.search(name) or min(numbers) < 2 * HEAD_SIZES:
        return list(value)
    factor = 1
    while all(each % (2 * factor) == 0 and each // (2 * factor) >= HEAD_SIZES for each in numbers):
        factor *= 2
    return [each // factor for each in numbers]


def _tokens(scopes: Any) -> dict[int, int]:
    """Special tokens that a small vocabulary lacks, and those that stand for them there."""
    found: set[int] = set()
    for own in scopes:
        for name, value in own.items():
            if TOKENS.search(name):
                values = value if isinstance(value, list | tuple) else [value]
                found |= {each for each in values if isinstance(each, int) and each >= VOCABULARY // 2}
    return {token: VOCABULARY - 1 - number for number, token in enumerate(sorted(found))}


def _renumbered(value: Any, tokens: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return [tokens.get(each, each) for each in value]
    return tokens.get(value, value) if isinstance(value, int) else value


def _image(value: Any, own: Fields, patch: int) -> Any:
    """Few patches along each side, and as many more as stages halve them."""
    if isinstance(value, list | tuple):
        return [_image(each, own, patch) for each in value]
    depths = own.get("depths")
    stages = len(depths) if isinstance(depths, list | tuple) else 1
    side = (own["patch_size"] if isinstance(own.get("patch_size"), int) else patch) or PATCHES
    return min(value, side * PATCHES * 2 ** (stages - 1)) if isinstance(value, int) else value


def _rotary(table: Fields, head_size: int) -> Fields:
    """A table of rotary parameters, whose lists of whole numbers divide up a head's features."""
    made = dict(table)
    for name, value in table.items():
        if isinstance(value, dict):
            made[name] = _rotary(value, head_size)
        elif isinstance(value, list) and value and all(isinstance(each, int) for each in value):
            parts = [each // head_size for each in value]
            parts[-1] += sum(value) // head_size - sum(parts)
            made[name] = parts
    return made
