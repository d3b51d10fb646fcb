"""Rows that are written, against what is found of the same models: where both say something, it is the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from conftest import KINDS, ROWS, STANDS_FOR, build, first_of
from families import FURTHER, MIXTURES

from hawada_peft.gates.branches import branches_at
from hawada_peft.vanilla.family import FAMILIES, Family, Layout, locate

ALL = ROWS | KINDS | FURTHER | MIXTURES
ENDS = {"attention_out", "ffn_out"}
CONFIG_FIELDS = {
    "heads_field", "kv_heads_field", "head_dim_field", "ffn_field", "layers_field", "hidden_field"
}  # fmt: skip
PLACES = {"layers", "hidden_norms", "final_norm", "layer_lists"}
"""Written relative to the base model, found by their full names; of lists a row names those that any config has."""
WRITTEN_ALONE = {
    "twin", "twin_fields", "fused", "stream_scales", "router", "experts_field", "chosen_field", "ffn_unit"
}  # fmt: skip
"""Nobody else knows the class that computes the same; the others are found as rules of slicing, or not at all."""
FOUND_ALONE = {
    "ffn_channels", "outer_norms", "stream_readers", "heads_follow", "layer_indices", "layer_stages", "layer_counts",
    "leading", "removed",
}  # fmt: skip
"""What goes with hidden channels where heads do, and numbers of backbones, which edit their own configs."""
NEITHER = {"branches", "pinned", "blend_home"}
"""Found per layer, or chosen for a model."""

NORMS_OF_ALL_HEADS = {"olmo2", "olmo3"}
"""Where one norm is over all heads, a head that is closed changes the others: heads are written, and not found."""
BARE = {"llama-bare", "vit-bare"}
"""Hidden channels are their outputs: the norms are written, and not found."""
AS_LONG_BY_CHANCE = {"beit": {"pool_scales"}}
"""Lists in a config that are no list of layers."""

REPRESENTATIVES = STANDS_FOR.keys() - {"granite"}
"""Its multipliers change nothing that a row says."""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWADA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_every_field_is_compared_or_said_by_one_alone() -> None:
    groups = (ENDS, CONFIG_FIELDS, PLACES, WRITTEN_ALONE, FOUND_ALONE, NEITHER)
    named = [name for group in groups for name in group]
    assert sorted(named) == sorted(field.name for field in fields(Family))


@pytest.mark.usefixtures("rows_of_families")
@pytest.mark.parametrize("name", first_of(ALL, *REPRESENTATIVES))
def test_a_written_row_is_what_is_found(name: str) -> None:
    model = build(ALL[name])
    written = locate(model)
    FAMILIES.clear()
    found = locate(model)
    assert (written.known, found.known is None) == (None, False)
    assert found.stack == written.stack

    differing = {each.name for each in fields(Family) if said(written, each.name) != said(found, each.name)}
    unsaid = {each for each in ENDS | CONFIG_FIELDS if not said(found, each)}
    assert differing & (ENDS | CONFIG_FIELDS) <= unsaid
    assert not any(said(written, each) for each in FOUND_ALONE)
    assert not any(said(found, each) for each in WRITTEN_ALONE - {"experts_field", "chosen_field"})

    every = range(len(model.get_submodule(written.stack)))
    heads = not heads_stay(name, written)
    assert bool(found.family.attention_out) or not heads
    assert found.family.ffn_out
    for layer in every:
        if found.family.attention_out:
            assert found.attention_out(layer) == written.attention_out(layer)
        assert found.ffn_out(layer) == written.ffn_out(layer)
        assert set(branches_at(found, layer)) == set(branches_at(written, layer))

    one, other = written.dense.sizes(), found.dense.sizes()
    compared = ["num_hidden_layers", "intermediate_size"]
    compared += ["num_attention_heads", "num_key_value_heads"] if found.family.attention_out else []
    assert {each: one[each] for each in compared} == {each: other[each] for each in compared}
    assert (written.hidden_size, written.head_dim) == (found.hidden_size, found.head_dim)
    if written.family.ffn_unit:
        assert found.family.ffn_channels == getattr(model.config, written.family.ffn_unit)

    assert bool(found.norms) == bool(written.norms) or (name in BARE if written.norms else True)
    if written.norms and found.norms:
        assert found.norms == written.norms
    lists = {each for each in written.family.layer_lists if getattr(model.config, each, None) is not None}
    assert set(found.family.layer_lists) - AS_LONG_BY_CHANCE.get(name, set()) == lists


def heads_stay(name: str, written: Layout) -> bool:
    """Whether no head goes alone, as a row says by naming no field with the size of a head, or heads are not found."""
    return not written.family.head_dim_field or name in NORMS_OF_ALL_HEADS


def said(layout: Layout, name: str) -> Any:
    """A row's field; config fields by the name that the config stores them under."""
    value = getattr(layout.family, name)
    return layout.tower_config.attribute_map.get(value, value) if name in CONFIG_FIELDS else value
