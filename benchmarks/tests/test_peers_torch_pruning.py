"""The Torch-Pruning peers of the frontier bench: the package's own cuts, which the stock forward runs."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import ROWS, build, difference, inputs_of, logits_of
from transformers import DynamicCache, PreTrainedModel

KINDS = {"text": (ROWS["llama"], {"tie_word_embeddings": True}), "image": (ROWS["vit"], {})}
CASES = [
    ("tp_magnitude", "text"),
    ("tp_magnitude", "image"),
    ("tp_taylor", "text"),
    ("tp_taylor", "image"),
    ("tp_hidden", "text"),
    ("tp_hidden", "image"),
    ("tp_isomorphic", "image"),
]


def teacher(kind: str) -> PreTrainedModel:
    row, fields = KINDS[kind]
    return build(row, **fields)


def cut(key: str, kind: str, amounts: tuple[float, ...]) -> list[PreTrainedModel]:
    pytest.importorskip("torch_pruning")
    from peers.peer import Work
    from peers.with_torch_pruning import TORCH_PRUNING_PEERS

    inputs = inputs_of(teacher(kind))
    labels = inputs["input_ids"] if kind == "text" else torch.tensor([0, 2])
    work = Work(lambda: teacher(kind), [inputs | {"labels": labels}], iter(()), speedup=1.5, steps=0, seed=0)
    peer = TORCH_PRUNING_PEERS[key]
    assert kind in peer.kinds
    prepared = peer.prepare(work)
    return [prepared.cut(teacher(kind), amount) for amount in amounts]


def sizes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Heads, KV groups and FFN channels of each layer."""
    from peers.places import places_of

    places, found = places_of(model), []
    for layer in model.get_submodule(places.layers):
        attention, ffn = layer.get_submodule(places.attention), layer.get_submodule(places.ffn)
        channels = ffn.get_submodule(places.ffn_out).in_features
        found.append((attention.q_proj.out_features // 8, attention.k_proj.out_features // 8, channels))
    return found


@pytest.mark.parametrize(("key", "kind"), CASES)
def test_cuts(key: str, kind: str) -> None:
    nothing, more, everything = models = cut(key, kind, (0.0, 0.5, 1.0))
    assert torch.equal(logits_of(nothing), logits_of(teacher(kind)))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts[0] > counts[1] > counts[2]
    for model in models:
        assert logits_of(model).isfinite().all()
        assert all(heads % groups == 0 and channels % 8 == 0 for heads, groups, channels in sizes(model))
    if key == "tp_isomorphic":
        heads, channels = (sum(layer[axis] for layer in sizes(more)) for axis in (0, 2))
        assert heads == 4 * 4
        assert 4 * 96 / 2 - 4 * 8 <= channels <= 4 * 96 / 2 + 4
        assert all(heads >= 1 and channels >= 8 for heads, _, channels in sizes(everything))
    else:
        assert sizes(more) == [(4, 4, 48)] * 4
    width = 32 if key == "tp_hidden" else 64
    assert list(more.modules())[-1].in_features == width


@pytest.mark.parametrize(("key", "kind"), CASES)
def test_everything_trains(key: str, kind: str) -> None:
    (model,) = cut(key, kind, (0.5,))
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = model(**inputs_of(model)).logits
    logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("key", ["tp_magnitude", "tp_taylor"])
def test_decoding_equals_the_whole(key: str) -> None:
    (model,) = cut(key, "text", (0.5,))
    tokens, past = torch.randint(3, 128, (2, 9)), DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(input_ids=tokens[:, :5], past_key_values=past, use_cache=True).logits
        last = model(input_ids=tokens[:, 5:], past_key_values=past, use_cache=True).logits
        assert difference(torch.cat([first, last], dim=1), model(input_ids=tokens).logits) < 1e-4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from peers.with_torch_pruning import package

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install torch-pruning=="):
        package()
