"""
What is timed: one call of a model under a regime, ready to be repeated.

Long because what a call cannot be is said next to how each kind is made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ..discovery.inputs import Drawn, example_inputs, field_of, main_inputs
from ..errors import InvalidRegimeError
from ..vanilla.family import locate
from .regime import Regime

CAPTURE_WARMUP = 3
"""Calls on a side stream before a CUDA graph is captured, as torch asks for."""


@dataclass(frozen=True)
class Runner:
    """
    One call, ready to be repeated.

    Args:
        call: does the work; returns nothing that is looked at.
        reset: puts back what the call has changed (the KV cache); not timed.
    """

    call: Callable[[], Any]
    reset: Callable[[], Any]


TIMED_INPUTS = ("pixel_values", "input_ids")
"""What a regime says the sizes of."""


def check_call(model: nn.Module, regime: Regime) -> PreTrainedModel:
    """
    Check that a model can be called under a regime; its weights are not looked at, so they may be anywhere.

    Returns:
        The model.

    Raises:
        InvalidRegimeError: with every problem.
    """
    if not isinstance(model, PreTrainedModel):
        raise InvalidRegimeError(f"only transformers models can be timed by regime, got {type(model).__name__}")
    name, problems = type(model).__name__, []
    if unknown := sorted(_needed(model) - set(TIMED_INPUTS)):
        problems.append(
            f"{name} takes {', '.join(unknown)}, and a regime says the sizes of images and of texts: give the sizes "
            "that are to stay, as a Shape, instead of a budget"
        )
    elif takes_several(model):
        problems += _problems_of_several(model, regime)
    elif regime.mode != "forward" and not model.can_generate():
        problems.append(f"{name} does not generate; mode {regime.mode!r} needs that: use 'forward'")
    elif model.main_input_name == "pixel_values":
        if regime.seq_len is not None:
            problems.append(f"{name} takes images: leave seq_len out (got {regime.seq_len}), or give image_size")
    elif regime.image_size is not None:
        problems.append(f"{name} takes tokens: leave image_size out (got {regime.image_size}), and give seq_len")
    else:
        problems += _problems_of_tokens(model, regime)
    if problems:
        raise InvalidRegimeError("\n".join(problems))
    return model


def takes_several(model: PreTrainedModel) -> bool:
    """Whether one text or image does not make a call: of an encoder-decoder, a dual encoder."""
    return bool(model.config.is_encoder_decoder) or len(_needed(model)) > 1


def _needed(model: PreTrainedModel) -> set[str]:
    # Without their other inputs, models that generate run on text alone.
    alone = model.can_generate() and not model.config.is_encoder_decoder
    return {model.main_input_name} | (set() if alone else main_inputs(model))


def _problems_of_several(model: PreTrainedModel, regime: Regime) -> list[str]:
    name, problems = type(model).__name__, []
    if regime.mode != "forward":
        problems.append(f"{name} is timed by a whole forward pass: mode must be 'forward', got {regime.mode!r}")
    if regime.image_size is not None:
        problems.append(f"{name} is timed on images of its config's size: leave image_size out")
    if Drawn(model, regime.batch_size, 1, {}).rows != regime.batch_size:
        problems.append(
            f"{name} has no padding token, and takes one row: batch_size must be 1, got {regime.batch_size}"
        )
    return [*problems, *_problems_of_tokens(model, regime)]


def _problems_of_tokens(model: PreTrainedModel, regime: Regime) -> list[str]:
    name = type(model).__name__
    if regime.length is None:
        return [f"{name} takes tokens: the regime needs seq_len, or prompt and output"]
    needed = regime.length + (regime.mode == "decode")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and needed > limit:
        return [f"{name} has {limit} positions, the regime needs {needed}: ask for fewer tokens"]
    return []


def check_memory(model: PreTrainedModel, regime: Regime) -> None:
    """
    Check that a call of a model under a regime can fit its device.

    Args:
        model: its class, config and sizes count; its weights may be anywhere.
        regime: the conditions.

    Raises:
        InvalidRegimeError: if it cannot.
        UnsupportedModelError: if the model has no family row.
    """
    needs, has = least_bytes(model, regime), device_bytes(regime)
    if needs > has:
        raise InvalidRegimeError(
            f"a call of {type(model).__name__} under {regime} needs {needs / 2**30:,.1f} GiB at least, and the device "
            f"has {has / 2**30:,.1f}: ask for fewer rows (batch_size) or tokens (seq_len)"
        )


def least_bytes(model: PreTrainedModel, regime: Regime) -> int:
    """Bytes of the weights, and of one activation, the KV cache and all logits, where the mode has them."""
    layout, sizes = locate(model), locate(model).dense.sizes()
    each = layout.hidden_size
    if regime.mode == "forward" and model.can_generate():
        each += model.config.get_text_config().vocab_size
    activations = 0 if regime.mode == "decode" else (regime.prompt or regime.seq_len or 1) * each
    cached = 2 * sizes["num_key_value_heads"] * layout.head_dim * sizes["num_hidden_layers"] * regime.cached_tokens
    return (model.num_parameters() + regime.batch_size * (activations + cached)) * regime.torch_dtype.itemsize


def device_bytes(regime: Regime) -> float:
    """The memory of the regime's device; infinite where it is not known."""
    device = torch.device(regime.device)
    if device.type == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf


def prepare(model: nn.Module, regime: Regime) -> Runner:
    """
    Make the call of a model under a regime.

    Args:
        model: a transformers model in the regime's dtype on its device; set to evaluation mode.
        regime: the conditions of one call: one of `Regime.parts`.

    Raises:
        InvalidRegimeError: if the model is elsewhere, of another dtype, or cannot run that way.
    """
    model = check_call(model, regime)
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if weight.dtype != regime.torch_dtype or weight.device.type != torch.device(regime.device).type:
        raise InvalidRegimeError(
            f"the model is {weight.dtype} on {weight.device}, the regime asks for {regime.dtype} on {regime.device}: "
            "move the model (`model.to(...)`) or change the regime"
        )
    model.eval()
    inputs = make_inputs(model, regime)
    with torch.inference_mode():
        runner = {"forward": _forward, "prefill": _prefill, "decode": _decode}[regime.mode](model, regime, inputs)
        return _capture(runner, torch.device(regime.device)) if regime.backend == "cuda_graph" else runner


def make_inputs(model: PreTrainedModel, regime: Regime) -> dict[str, torch.Tensor]:
    """
    Random inputs of the regime's size, the same at every call.

    Returns:
        By name: (batch, channels, size, size) of the regime's dtype for a vision model, else token ids (batch, seq);
        for a model that takes several, all that `example_inputs` draws: each text of `seq_len` tokens, a decoder's of
        half as many, images of the config's size.
    """
    if takes_several(model):
        return example_inputs(model, rows=regime.batch_size, length=cast(int, regime.seq_len))
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = regime.image_size or field_of(model.config, "image_size")
        pixels = (regime.batch_size, field_of(model.config, "num_channels"), size, size)
        drawn = torch.randn(pixels, generator=generator).to(device=regime.device, dtype=regime.torch_dtype)
    else:
        shape = (regime.batch_size, cast(int, regime.seq_len))
        vocabulary = model.config.get_text_config().vocab_size
        drawn = torch.randint(vocabulary, shape, generator=generator).to(regime.device)
    return {model.main_input_name: drawn}


def _forward(model: PreTrainedModel, regime: Regime, inputs: dict[str, torch.Tensor]) -> Runner:
    options = {"use_cache": False} if model.can_generate() else {}
    run = _compiled(model, regime)
    return Runner(call=lambda: run(**inputs, **options), reset=_nothing)


def _prefill(model: PreTrainedModel, regime: Regime, given: dict[str, torch.Tensor]) -> Runner:
    inputs = given["input_ids"]
    run, options = _compiled(model, regime), _last_logits(model)
    if regime.static_cache is None:
        return Runner(call=lambda: run(input_ids=inputs, use_cache=True, **options), reset=_nothing)
    cache = StaticCache(config=model.config, max_cache_len=regime.static_cache)
    if regime.backend != "eager":
        options["attention_mask"] = _mask(inputs.shape[0], 0, inputs.shape[1], regime.static_cache, inputs.device)
    call = Runner(
        lambda: run(input_ids=inputs, past_key_values=cache, use_cache=True, **options), lambda: _rewind(cache, 0)
    )
    model(input_ids=inputs, past_key_values=cache, use_cache=True)  # makes the cache's tensors
    call.reset()
    return call


def _decode(model: PreTrainedModel, regime: Regime, given: dict[str, torch.Tensor]) -> Runner:
    inputs = given["input_ids"]
    filled, options = inputs.shape[1], _last_logits(model)
    run, token = _compiled(model, regime), inputs[:, -1:].clone()
    if regime.backend == "eager" and regime.static_cache is None:
        cache: Any = DynamicCache(config=model.config)
        model(input_ids=inputs, past_key_values=cache, use_cache=True, **options)

        def crop() -> None:
            if cache.get_seq_length() > filled:
                cache.crop(filled - cache.get_seq_length())

        return Runner(lambda: run(input_ids=token, past_key_values=cache, use_cache=True, **options), crop)
    room = regime.static_cache or filled + 1
    cache = StaticCache(config=model.config, max_cache_len=room)
    model(input_ids=inputs, past_key_values=cache, use_cache=True, **options)
    # As `generate` prepares it outside of what is compiled.
    mask = _mask(inputs.shape[0], filled, 1, room, inputs.device)
    _rewind(cache, filled)
    return Runner(
        lambda: run(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, **options),
        lambda: _rewind(cache, filled),
    )


def _mask(rows: int, filled: int, new: int, room: int, device: torch.device) -> torch.Tensor:
    """Which positions of a static cache each new token sees: (rows, 1, new, room), bool."""
    places = torch.arange(room, device=device)
    return (places <= filled + places[:new, None]).expand(rows, 1, new, room).contiguous()


def _rewind(cache: Any, filled: int) -> None:
    """Leave the first tokens in a static cache; what follows them is overwritten."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(filled)


def _last_logits(model: Any) -> dict[str, Any]:
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def _compiled(model: PreTrainedModel, regime: Regime) -> Callable[..., Any]:
    return torch.compile(model, dynamic=False) if regime.backend == "compile" else model


def _capture(runner: Runner, device: torch.device) -> Runner:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUP):
            runner.call()
            runner.reset()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.call()
    runner.reset()
    return Runner(call=graph.replay, reset=runner.reset)


def _nothing() -> None:
    """Nothing to put back."""
