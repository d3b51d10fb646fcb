"""The SliceGPT peer of the frontier bench: exact when nothing is cut, smaller, trainable and called as the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ROWS, build, difference, inputs_of, logits_of
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hawada_peft.latency.regime import Regime
from hawada_peft.latency.runner import prepare as prepare_runner

KINDS = {"text": (ROWS["llama"], {"tie_word_embeddings": True}), "image": (ROWS["vit"], {})}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def teacher(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    row, fields = KINDS[kind]
    return build(row, dtype, **fields)


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    """More positions than features of the residual stream, with labels."""
    if kind == "text":
        tokens = torch.randint(0, 128, (2, 8, 24))
        return [{"input_ids": rows, "labels": rows} for rows in tokens]
    return [{"pixel_values": torch.randn(16, 3, 16, 16), "labels": torch.randint(0, 3, (16,))} for _ in range(2)]


def sliced(kind: str, amount: float) -> PreTrainedModel:
    from peers.peer import Work
    from peers.slicegpt import SLICEGPT

    work = Work(lambda: teacher(kind), batches(kind), iter(()), speedup=1.5, steps=0, seed=0)
    assert kind in SLICEGPT.kinds
    prepared = SLICEGPT.prepare(work)
    assert prepared.steps == 0
    return prepared.cut(teacher(kind), amount)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_nothing_cut_is_exact(kind: str) -> None:
    dense = logits_of(teacher(kind))
    assert difference(logits_of(sliced(kind, 0.0)), dense) < 1e-4


def test_more_is_smaller_and_farther(kind: str) -> None:
    dense = logits_of(teacher(kind))
    models = [sliced(kind, amount) for amount in (0.0, 0.25, 0.5, 1.0)]
    sizes = [size(model) for model in models]
    assert sizes == sorted(set(sizes), reverse=True)
    errors = [difference(logits_of(model), dense) for model in models]
    assert all(error == error and error < float("inf") for error in errors)
    assert errors[0] < errors[1] < errors[3]


def test_widths_are_multiples(kind: str) -> None:
    from peers.places import places_of
    from peers.slicegpt import SlicedLayer

    model = sliced(kind, 0.3)
    layers = list(model.get_submodule(places_of(model).layers))
    assert all(isinstance(layer, SlicedLayer) for layer in layers)
    shapes = [
        (tuple(layer.attention_shortcut.weight.shape), tuple(layer.ffn_shortcut.weight.shape)) for layer in layers
    ]
    narrow, full = 48, 64  # 64 - 8 * round(0.3 * 64 / 8); the head keeps the dense width
    assert shapes == [((narrow, narrow), (narrow, narrow))] * 3 + [((narrow, narrow), (full, narrow))]


def test_principal_directions_beat_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the data it saw, deleting the minor components moves the output less than deleting the major ones."""
    import peers.slicegpt

    torch.manual_seed(5)
    inputs = inputs_of(teacher(kind))
    dense = teacher(kind)(**inputs).logits
    good = peers.slicegpt.slice_model(teacher(kind), [inputs], 0.5)(**inputs).logits
    principal = peers.slicegpt._principal
    monkeypatch.setattr(
        peers.slicegpt, "_principal", lambda streams, width: principal(streams, 64).flip(-1)[:, :width]
    )
    bad = peers.slicegpt.slice_model(teacher(kind), [inputs], 0.5)(**inputs).logits
    assert (good - dense).norm() < (bad - dense).norm()


def test_everything_trains(kind: str) -> None:
    model = sliced(kind, 0.25).train()
    model(**batches(kind)[0]).loss.backward()
    missing = [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad or parameter.grad is None
    ]
    assert missing == []
    assert all(
        parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "k_proj.bias" not in name
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_equals_the_whole(cache: str) -> None:
    model = sliced("text", 0.25)
    tokens = torch.randint(3, 128, (2, 9))
    options: dict[str, Any] = {"config": model.config}
    past = DynamicCache(**options) if cache == "dynamic" else StaticCache(**options, max_cache_len=9)
    with torch.inference_mode():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :5], past_key_values=past, use_cache=True).logits
        steps = [
            model(input_ids=tokens[:, i : i + 1], past_key_values=past, use_cache=True).logits for i in range(5, 9)
        ]
    assert difference(torch.cat([first, *steps], dim=1), whole) < 1e-4


@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
def test_runs_under_the_clock(mode: str) -> None:
    regime = Regime(device="cpu", dtype="float32", mode=mode, batch_size=2, seq_len=8)
    runner = prepare_runner(sliced("text", 0.25), regime)
    with torch.inference_mode():
        for _ in range(2):
            runner.call()
            runner.reset()
