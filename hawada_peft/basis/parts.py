"""Where the residual stream is written and read: the part that every parameter plays, found on a tiny copy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..discovery.inputs import example_inputs
from ..errors import UnsupportedModelError
from ..surgery.axes import find_axes
from ..vanilla.family import Layout, hidden_home, locate
from ..vanilla.shape import HIDDEN
from .tiny import tiny_copy

WRITER, READER, READER_BIAS, NORM, NORM_BIAS, SCALE = "writer", "reader", "reader bias", "norm", "norm bias", "scale"
"""The parts a parameter may play in the residual stream."""


@dataclass(frozen=True)
class Part:
    """
    What a parameter has to do with the residual stream.

    Args:
        kind (`str`): one of those above. Embeddings, tokens, positions and biases of writers are writers too.
        dim (`int`): the dimension that lies along the stream; of no meaning for a `READER_BIAS`.
        partner (`str`): of a reader and its bias the norm through which it reads, of a writer the vector that scales
            what it writes; empty if there is none. Named as in `find_axes`.
        stretches (`int`): how often the stream lies side by side along the dimension (DINOv2's classifier: 2).
    """

    kind: str
    dim: int
    partner: str = ""
    stretches: int = 1


def stream_map(layout: Layout) -> dict[str, Part]:
    """
    The parts of all parameters that have to do with the residual stream.

    Which parameters those are is found by `find_axes`. What a projection reads is found by letting each norm of a tiny
    copy give a number of its own: whoever reads through it sees that number alone.

    Args:
        layout: the dense model's, with its class and config.

    Returns:
        By the names of `find_axes`: relative to a layer, or with a dot before it.

    Raises:
        UnsupportedModelError: if a parameter's part is not known: with its name and why.
    """
    hidden_home(layout)  # refuses rows without norms
    tiny = tiny_copy(layout)
    small, prefix = locate(tiny), f"{layout.stack}.0."
    rules = _rules(layout)
    full = {short: f"{prefix}{short}" if not short.startswith(".") else short[1:] for short in rules}
    norms = {_short(name, prefix): name for name in _first_norms(small)}
    sources, parts = _norm_of_readers(tiny, norms), dict[str, Part]()
    tensors = tiny.state_dict().keys()
    scales = dict(layout.family.stream_scales)
    scaled_by = {writer: scale for scale, writer in scales.items()}
    for short, (dim, stretches) in rules.items():
        owner, _, which = short.rpartition(".")
        if full[short] not in tensors:
            raise UnsupportedModelError(_refusal(layout, short, "is in layers of another kind than the first"))
        module = tiny.get_submodule(full[short].rpartition(".")[0])
        if owner in norms:
            parts[short] = Part(NORM if which == "weight" else NORM_BIAS, dim)
        elif short in scales:
            parts[short] = Part(SCALE, dim)
        elif isinstance(module, (nn.Linear, Conv1D)) and dim == _input_dim(module) and which == "weight":
            norm = sources.get(full[short].rpartition(".")[0])
            if norm is None:
                raise UnsupportedModelError(_refusal(layout, short, "reads the residual stream past the row's norms"))
            parts[short] = Part(READER, dim, norm, stretches)
            if module.bias is not None and f"{norm}.bias" in rules:
                parts[f"{owner}.bias"] = Part(READER_BIAS, 0, norm)
        elif stretches > 1 or (isinstance(module, nn.LayerNorm) or owner.endswith("norm")):
            raise UnsupportedModelError(
                _refusal(layout, short, "is a norm that the row does not name among those that read the stream")
            )
        else:
            parts[short] = Part(WRITER, dim, scaled_by.get(owner, ""))
    _check_biases(layout, parts)
    return parts


def _rules(layout: Layout) -> dict[str, tuple[int, int]]:
    """By parameter: the dimension along the stream, and how often the stream lies along it."""
    found: dict[str, tuple[int, int]] = {}
    for name, rules in find_axes(layout, hidden=True).items():
        along = [rule for rule in rules if HIDDEN in rule.segments]
        if len(along) > 1 or any(set(rule.segments) != {HIDDEN} for rule in along):
            raise UnsupportedModelError(_refusal(layout, name, "both reads and writes the residual stream"))
        for rule in along:
            found[name] = rule.dim, len(rule.segments)
    return found


def _first_norms(layout: Layout) -> tuple[str, ...]:
    """The norms of the first layer, and the one after the layers."""
    return (*layout.norms[: len(layout.family.hidden_norms)], layout.norms[-1])


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) if name.startswith(prefix) else f".{name}"


def _input_dim(module: nn.Module) -> int:
    return 0 if isinstance(module, Conv1D) else 1


def _norm_of_readers(tiny: PreTrainedModel, norms: Mapping[str, str]) -> dict[str, str]:
    """By the name of a linear module: the short name of the norm whose output, and nothing else, it sees."""
    numbers = {short: float(place) for place, short in enumerate(norms, start=2)}
    seen: dict[str, str] = {}

    def give(number: float) -> Any:
        return lambda _module, _args, output: torch.full_like(output, number)

    def look(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            first = args[0].flatten()[0]
            if (args[0] == first).all():
                given = [short for short, number in numbers.items() if number == float(first)]
                seen.update(dict.fromkeys([name], given[0]) if given else {})

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for short, name in norms.items():
            hooks.callback(tiny.get_submodule(name).register_forward_hook(give(numbers[short])).remove)
        for name, module in tiny.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                hooks.callback(module.register_forward_pre_hook(look(name)).remove)
        tiny(**example_inputs(tiny))
    return seen


def _check_biases(layout: Layout, parts: Mapping[str, Part]) -> None:
    """A norm's bias goes into the biases of those that read through it: they must have one."""
    biased = {short.rpartition(".")[0] for short, part in parts.items() if part.kind == NORM_BIAS}
    without = [
        short
        for short, part in parts.items()
        if part.kind == READER and part.partner in biased and f"{short.rpartition('.')[0]}.bias" not in parts
    ]
    if without:
        raise UnsupportedModelError(
            _refusal(layout, without[0], "has no bias that could take up that of the norm it reads through")
        )


def _refusal(layout: Layout, name: str, why: str) -> str:
    return (
        f"the residual stream of model_type={layout.model_type!r} cannot be rotated exactly: {name.lstrip('.')!r} "
        f"{why}. Cut its channels as they are: leave out `rotate`."
    )
