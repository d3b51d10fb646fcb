"""A config as a tree of numbers: which there are, and a new config with some of them changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

from ...vanilla.resize import plain_fields

Path = tuple[str | int, ...]
"""Where a number is: names of fields, and positions in lists."""

Number = int | float

REMOVED = object()
"""Instead of a value: the field is left out."""

NOT_WIDTHS = re.compile(
    "token|vocab|labels|label2id|version|dropout|layerdrop|eps$|theta|range|temperature|_prob|seed|gain|loss|quant"
    "|_ids?$|position_emb|positions|max_length|buckets|max_window|sliding_window$|window_size|chunk|cache|use_|tie_"
    "|image_size|patch_|image_seq|num_channels|num_frames|num_mel|tubelet|crop|mask_|mm_tokens|spatial_merge|temporal"
    "|stride|kernel|dilation|downsample|scale_factor|sr_ratios|scaling|multiplier|lambda|coef|rope_param"
    "|num_queries|num_points|num_detection|codevector|_negatives|xvector|tdnn|ctc_|sep_|pretraining"
)
"""Names of fields that say something of data, of training or of positions: no widths, and not tried as such."""

LISTED_LAYERS = re.compile("index|indices|idx|only_layers")
"""Names of lists that hold numbers of layers."""

CHOSEN_EXPERTS = re.compile("per_tok|top_?k$|^moe_topk")
"""Names of numbers of experts that are chosen for a token."""

DESCRIPTIONS = ("id2label", "label2id", "rope_parameters", "rope_scaling", "task_specific_params")
"""Fields that are tables of something else."""

LONGEST = 16
"""Entries of a list of numbers that are told apart; longer ones hold something for each layer."""


def dotted(path: Path) -> str:
    """A path as text: `"text_config.intermediate_size"`, `"depths.1"`."""
    return ".".join(map(str, path))


def parsed(text: str) -> Path:
    """The path of a text that `dotted` gave."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))


def value_at(tree: Mapping[str, Any], path: Path) -> Any:
    """What a tree of a config holds at a path."""
    found: Any = tree
    for part in path:
        found = found[part]
    return found


LAYERS = re.compile("layers$|^depth$")
"""Names of fields that count layers."""


def numbers_of(tree: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Number]]:
    """Every number that may be a width or a count, with its path."""
    for name, value in tree.items():
        here = (*above, name)
        if name in DESCRIPTIONS or name.startswith("_"):
            continue
        if isinstance(value, dict):
            yield from numbers_of(value, here)
        elif isinstance(value, bool) or NOT_WIDTHS.search(name):
            continue
        elif _counts(name, value):
            yield here, value
        elif isinstance(value, list | tuple) and len(value) <= LONGEST and _widths(name, value):
            yield from (((*here, index), each) for index, each in enumerate(value) if each >= 1)


def _counts(name: str, value: Any) -> bool:
    if isinstance(value, int):
        return value > 1 or (value == 1 and LAYERS.search(name) is not None)  # a list of one layer is still one
    return isinstance(value, float) and value > 0 and "ratio" in name


def _widths(name: str, values: list[Any] | tuple[Any, ...]) -> bool:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    return numbers and not LISTED_LAYERS.search(name)


def left_out(config: PreTrainedConfig) -> Iterator[Path]:
    """Paths of whole numbers that a config leaves out, and its class knows."""
    for scope, inner in scopes_of(config):
        for each in fields(inner) if is_dataclass(inner) else ():
            known = "int" in str(each.type) and not NOT_WIDTHS.search(each.name) and not each.name.startswith("_")
            if known and _is_left_out(inner, each.name):
                yield (*scope, each.name)


def _is_left_out(config: PreTrainedConfig, name: str) -> bool:
    try:
        return getattr(config, name, 0) is None
    except RuntimeError:  # a size by layer (`per_layer_config`)
        return False


def scopes_of(config: PreTrainedConfig, above: Path = ()) -> Iterator[tuple[Path, PreTrainedConfig]]:
    """A config and its sub-configs at any depth, with their paths."""
    yield above, config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from scopes_of(inner, (*above, name))


def edited(config: PreTrainedConfig, changes: Mapping[Path, Any]) -> PreTrainedConfig:
    """
    A new config of the same class with some values changed.

    Args:
        config: left as it is.
        changes: path to new value; `REMOVED` leaves the field out.

    Raises:
        Exception: whatever the class raises on values that it refuses; see `builds.REFUSES`.
    """
    tree = plain_fields(copy.deepcopy(config.to_dict()))
    for path, value in changes.items():
        at: Any = tree
        for part in path[:-1]:
            if isinstance(at[part], tuple):
                at[part] = list(at[part])
            at = at[part]
        if value is REMOVED:
            at.pop(path[-1], None)
        else:
            at[path[-1]] = value
    made = type(config)(**tree)  # `from_dict` would write it out for a log, and for that build the default one
    for (_, old), (_, new) in zip(scopes_of(config), scopes_of(made), strict=False):
        new._attn_implementation = old._attn_implementation
        new._experts_implementation = old._experts_implementation
    return made
