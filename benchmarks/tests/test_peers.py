"""The peers of the frontier bench: surgery computes what closed units compute, and every peer keeps the contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import LM_ROW, MIXED_ROW, ROWS, VISION_ROW, Row, build, difference, inputs_of, logits_of
from peers import criteria, llm_pruner, registry, replaceme, surgery
from peers import peer as contract
from torch.nn import functional
from transformers import PreTrainedModel

from hawada_peft import slim
from hawada_peft.errors import InvalidPlanError, UnsupportedModelError
from hawada_peft.vanilla.family import locate

WIDTH = ("flap", "wanda_sp", "llm_pruner", "minitron_width", "ancestor")
DEPTH = ("minitron_depth", "shortgpt", "replaceme")
KINDS = {"text": LM_ROW, "image": VISION_ROW}
each_peer = pytest.mark.parametrize("name", [*WIDTH, *DEPTH])
each_kind = pytest.mark.parametrize("kind", KINDS)


def batches(kind: str, number: int = 3) -> list[dict[str, torch.Tensor]]:
    """Random inputs with labels."""
    draw = torch.Generator().manual_seed(5)
    if kind == "text":
        tokens = [torch.randint(3, 128, (2, 12), generator=draw) for _ in range(number)]
        return [{"input_ids": ids, "labels": ids} for ids in tokens]
    labels = [torch.randint(0, 3, (2,), generator=draw) for _ in range(number)]
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=draw), "labels": classes} for classes in labels]


def prepared(name: str, kind: str) -> Any:
    """A peer that has seen the work."""
    return registry.PEERS[name].prepare(work_on(lambda: build(KINDS[kind]), kind))


def work_on(load: Callable[[], PreTrainedModel], kind: str = "text", steps: int = 3) -> Any:
    """What a peer is given."""
    given = batches(kind)
    return contract.Work(load, given, itertools.cycle(given), speedup=1.5, steps=steps, seed=0)


def some(model: PreTrainedModel) -> dict[int, Any]:
    """Another cut in each of three layers: whole KV groups, heads in each group, channels."""
    layout = locate(model)
    per_group = layout.dense.heads_per_group
    whole, first = surgery.all_heads(layout, [3, 0]), [group * per_group for group in range(4)]
    return {
        0: surgery.Keep(heads=whole, channels=range(1, 17)),
        1: surgery.Keep(heads=first),
        3: surgery.Keep(channels=range(0, 96, 2)),
    }


@pytest.mark.parametrize("row", [LM_ROW, MIXED_ROW, ROWS["llama-mha"], VISION_ROW])
def test_removed_units_compute_as_closed_ones(row: Row) -> None:
    model, closed = build(row), build(row)
    surgery.keep_units(model, some(model))
    surgery.zero_units(closed, some(closed))
    assert model.num_parameters() < closed.num_parameters()
    assert difference(logits_of(model), logits_of(closed)) < 1e-5
    assert difference(logits_of(closed), logits_of(build(row))) > 1e-3


def test_layers_that_stay_compute_as_before() -> None:
    model, expected = build(MIXED_ROW), build(MIXED_ROW)
    surgery.keep_layers(model, [0, 3])
    stack = expected.model.layers
    for gone in (1, 2):  # a layer that adds nothing to the stream
        torch.nn.init.zeros_(stack[gone].self_attn.o_proj.weight)
        torch.nn.init.zeros_(stack[gone].mlp.down_proj.weight)
    assert difference(logits_of(model), logits_of(expected)) < 1e-5
    kinds = build(MIXED_ROW).config.layer_types
    assert model.config.layer_types == [kinds[0], kinds[3]]
    assert len(set(kinds)) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("row", [LM_ROW, MIXED_ROW])
def test_the_cache_holds_layers_of_unlike_sizes(row: Row, implementation: str) -> None:
    model: Any = build(row, attn_implementation=implementation)
    surgery.keep_units(model, some(model))
    stack = model.model.layers
    assert {layer.self_attn.num_key_value_groups for layer in stack} == {1, 2}
    ids = inputs_of(model)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached, fresh = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, fresh)
    whole = model(cached)
    prefill = model(cached[:, :4], use_cache=True)
    assert {layer.keys.shape[1] for layer in prefill.past_key_values.layers} == {2, 4}
    rest = model(cached[:, 4:], past_key_values=prefill.past_key_values)
    assert difference(rest.logits, whole.logits[:, 4:]) < 1e-5


def test_surgery_refuses_what_no_model_is() -> None:
    model = build(LM_ROW)
    with pytest.raises(InvalidPlanError, match=r"equally many heads, got \[2, 1\]"):
        surgery.keep_units(model, {0: surgery.Keep(heads=[0, 1, 2])})
    with pytest.raises(InvalidPlanError, match="one must stay"):
        surgery.keep_layers(model, [])
    model.model.layers[0].self_attn.extra = torch.nn.Linear(64, 3)
    with pytest.raises(UnsupportedModelError, match="extra"):
        surgery.keep_units(model, {0: surgery.Keep(heads=[0, 1])})


@each_kind
@each_peer
def test_a_peer_keeps_the_contract(name: str, kind: str) -> None:
    peer = prepared(name, kind)
    dense = build(KINDS[kind])
    parameters, logits = dense.num_parameters(), logits_of(dense)
    uncut = peer.cut(build(KINDS[kind]), 0.0)
    assert difference(logits_of(uncut), logits) < 1e-5
    sizes = []
    for amount in (0.1, 0.35, 0.6, 1.0):
        model = peer.cut(build(KINDS[kind]), amount)
        assert torch.isfinite(logits_of(model)).all()
        sizes.append(model.num_parameters())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[1] < parameters
    with pytest.raises(ValueError, match="amount"):
        peer.cut(build(KINDS[kind]), 1.5)
    assert peer.steps == (3 if name == "ancestor" else 0)


@each_peer
def test_a_cut_is_the_same_twice_and_generates(name: str) -> None:
    peer = prepared(name, "text")
    models = [peer.cut(build(LM_ROW), 0.5) for _ in range(2)]
    assert torch.equal(*(logits_of(model) for model in models))
    ids = inputs_of(models[0])["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, fresh = models[0].generate(ids, **options), models[0].generate(ids, use_cache=False, **options)
    assert torch.equal(cached, fresh)


def silent() -> Any:
    """A quarter of all heads and channels does nothing."""
    model: Any = build(ROWS["llama-mha"])
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[8:24] = 0  # heads 1 and 2
        layer.mlp.up_proj.weight.data[10:34] = 0
    return model


@pytest.mark.parametrize("name", [name for name in WIDTH if name != "ancestor"])
def test_units_that_do_nothing_go_first(name: str) -> None:
    model = registry.PEERS[name].prepare(work_on(silent)).cut(silent(), 0.125)
    assert model.num_parameters() < 0.97 * silent().num_parameters()
    assert difference(logits_of(model), logits_of(silent())) < 1e-5


def test_trained_gates_close_units_that_do_nothing() -> None:
    """Samples are noisy and steps few: most of what goes does nothing, where a quarter would by chance."""

    def rows(model: Any) -> torch.Tensor:
        layers = model.model.layers
        return torch.cat(
            [row for layer in layers for row in (layer.self_attn.v_proj.weight, layer.mlp.up_proj.weight)]
        )

    dense, cut = (
        rows(silent()),
        rows(registry.PEERS["ancestor"].prepare(work_on(silent, steps=32)).cut(silent(), 0.25)),
    )
    gone = len(dense) - len(cut)
    idle = int((dense == 0).all(1).sum()) - int((cut == 0).all(1).sum())
    assert gone > 100
    assert idle > gone / 2


@pytest.mark.parametrize("name", WIDTH)
def test_ffn_sizes_are_multiples_of_8(name: str) -> None:
    model = prepared(name, "text").cut(build(LM_ROW), 0.37)
    sizes = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert min(sizes) < 96
    assert all(size % 8 == 0 and size >= 8 for size in sizes)


def test_flap_gives_the_mean_of_what_goes_to_the_bias() -> None:
    """The first block's output keeps its mean over the calibration tokens."""
    peer = prepared("flap", "text")
    dense, model = build(LM_ROW), peer.cut(build(LM_ROW), 0.6)
    outputs: dict[str, torch.Tensor] = {}
    for key, each in (("dense", dense), ("cut", model)):
        seen: list[torch.Tensor] = []
        output = each.model.layers[0].self_attn.o_proj
        criteria.observe(each, batches("text"), [(output, lambda _, y, seen=seen: seen.append(y))])
        outputs[key] = torch.stack(seen).flatten(0, -2).mean(0)
    assert model.model.layers[0].self_attn.o_proj.in_features < dense.model.layers[0].self_attn.o_proj.in_features
    assert difference(outputs["cut"], outputs["dense"]) < 1e-5


def test_llm_pruner_leaves_the_first_and_the_last_layers() -> None:
    pruned = llm_pruner.pruned_layers
    assert pruned(32) == range(4, 30)
    assert pruned(6) == range(1, 5)
    model = prepared("llm_pruner", "text").cut(build(LM_ROW), 0.5)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [96, 48, 48, 96]


@pytest.mark.parametrize("name", ["shortgpt", "replaceme"])
def test_a_layer_that_adds_nothing_is_dropped(name: str) -> None:

    def idle() -> PreTrainedModel:
        model = build(LM_ROW)
        for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
        return model

    model = registry.PEERS[name].prepare(work_on(idle)).cut(idle(), 0.25)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert difference(logits_of(model), logits_of(idle())) < 1e-3  # a map is trained, though nothing is missing


@torch.no_grad()
def test_replaceme_turns_the_stream_back() -> None:
    work, dense = work_on(lambda: build(LM_ROW)), build(LM_ROW)
    model = registry.PEERS["replaceme"].prepare(work).cut(build(LM_ROW), 0.5)
    turned = replaceme.turned(dense, work.batches)
    first = 1 if turned[1, 2] < turned[2, 3] else 2
    plain = slim(dense, replaceme.without(locate(dense), range(first, first + 2)))

    def closeness(small: PreTrainedModel) -> float:
        found = 0.0
        for batch in map(criteria.unlabelled, work.batches):
            streams = [each.model(**batch).last_hidden_state for each in (small, dense)]
            found += float(functional.cosine_similarity(*streams, dim=-1).mean())
        return found

    assert closeness(model) > closeness(plain)


@torch.no_grad()
def test_minitron_depth_drops_the_run_with_the_least_loss() -> None:

    def loss(model: PreTrainedModel) -> float:
        return sum(float(model(**batch).loss) for batch in batches("text"))

    found = loss(prepared("minitron_depth", "text").cut(build(LM_ROW), 0.5))
    others = []
    for kept in ([0, 1], [0, 3], [2, 3]):
        model = build(LM_ROW)
        surgery.keep_layers(model, kept)
        others.append(loss(model))
    assert found == pytest.approx(min(others), rel=1e-6)
    assert max(others) > min(others)


def test_every_peer_says_where_it_comes_from() -> None:
    assert set(WIDTH) | set(DEPTH) <= set(registry.PEERS)
    for peer in registry.PEERS.values():
        assert peer.source
        assert peer.kinds <= {"text", "image"}
    assert len({peer.name for peer in registry.PEERS.values()}) == len(registry.PEERS)
