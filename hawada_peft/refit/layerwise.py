"""A model taken apart: its layers called one after the other, on hidden states kept for all calibration batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..vanilla.family import Layout

Batch = Mapping[str, Any]
Gains = tuple[torch.Tensor, torch.Tensor] | None


class _EnoughError(Exception):
    """Ends a forward pass at the module whose input was wanted."""


@dataclass
class Call:
    """How the model calls one layer on one batch, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """
    The residual stream of one model on all calibration batches, at one depth.

    Args:
        model: in evaluation mode.
        layout: its family row and sizes.
        hidden: (batch, positions, hidden_size) per batch, as the next layer takes it.
        calls: per batch, how every layer is called.
    """

    model: PreTrainedModel
    layout: Layout
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    @classmethod
    def start(cls, model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> Stream:
        """The stream before the first layer, and the calls, from one forward pass of the body per batch."""
        stream = cls(model, layout)
        body = cast(nn.Module, model.base_model)
        # A cache would grow with every call of a layer.
        options = {"use_cache": False} if "use_cache" in model.config.to_dict() else {}
        for batch in batches:
            calls: list[Call] = []
            inputs: list[torch.Tensor] = []

            def record(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                calls: list[Call] = calls,
                inputs: list[torch.Tensor] = inputs,
            ) -> None:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                calls.append(Call(args[1:], kwargs))
                inputs[:] = inputs or [hidden]

            with ExitStack() as hooks:
                for layer in stream.layers:
                    hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
                body(**(options | dict(batch)))
            stream.hidden.append(inputs[0])
            stream.calls.append(calls)
        return stream

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers, in order."""
        return cast(Sequence[nn.Module], self.model.get_submodule(self.layout.stack))

    def attention_out(self, layer: int) -> nn.Module:
        """The attention's output projection of a layer."""
        return self.model.get_submodule(self.layout.attention_out(layer))

    def ffn_out(self, layer: int) -> nn.Module:
        """The FFN's output projection of a layer."""
        return self.model.get_submodule(self.layout.ffn_out(layer))

    def call(self, layer: int, batch: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """A layer's output on a batch's stream, or on other hidden states of its shape."""
        call = self.calls[batch][layer]
        output = self.layers[layer](self.hidden[batch] if hidden is None else hidden, *call.args, **call.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def outputs(self, layer: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The outputs of a layer, of its attention's projection and of its FFN's, on a batch's stream."""
        attention, ffn = self.attention_out(layer), self.ffn_out(layer)
        found: dict[nn.Module, torch.Tensor] = {}

        def keep(module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            found[module] = output

        with ExitStack() as hooks:
            for module in (attention, ffn):
                hooks.callback(module.register_forward_hook(keep).remove)
            output = self.call(layer, batch)
        return output, found[attention], found[ffn]

    def inputs_at(self, module: nn.Module, layer: int, batch: int, gains: Gains) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What one of a layer's two projections gets on a batch's stream.

        Args:
            module: the projection.
            layer, batch: which.
            gains: of the layer, as `residual_gains` gives them.

        Returns:
            Its inputs, (batch, positions, features), and the residual stream that its output is added to.
        """
        found: list[torch.Tensor] = []
        attention: list[torch.Tensor] = []

        def stop(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0])
            raise _EnoughError

        with ExitStack() as hooks:
            hooks.callback(module.register_forward_pre_hook(stop).remove)
            first = self.attention_out(layer)
            hooks.callback(first.register_forward_hook(lambda _module, _args, out: attention.append(out)).remove)
            with suppress(_EnoughError):
                self.call(layer, batch)
        stream = self.hidden[batch]
        if attention and gains is not None:
            stream = stream + gains[0] * attention[0]
        return found[0], stream

    def output_on(
        self, module: nn.Module, layer: int, batch: int, hidden: torch.Tensor, silent: nn.Module | None = None
    ) -> torch.Tensor:
        """
        What one of a layer's two projections gives on other hidden states.

        Args:
            module: the projection.
            layer, batch: which.
            hidden: instead of the batch's stream.
            silent: the other projection, if its output is to be replaced by zeros.
        """
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            found.append(output)
            raise _EnoughError

        with ExitStack() as hooks:
            hooks.callback(module.register_forward_hook(stop).remove)
            if silent is not None:
                hooks.callback(silent.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out)).remove)
            with suppress(_EnoughError):
                self.call(layer, batch, hidden)
        return found[0]

    def advance(self, layer: int) -> None:
        """Take the stream through a layer."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.call(layer, batch)


def residual_gains(stream: Stream, layer: int) -> Gains:
    """
    What multiplies the outputs of a layer's two projections where they are added to the residual stream.

    Found by calling the layer on zeros with one projection's output replaced by ones and the other's by zeros, and
    checked on the first batch: `output = input + gain_a * attention + gain_f * ffn`.

    Returns:
        Two tensors of (hidden_size,); None if the layer does not add its blocks up like this (a norm in between).
    """
    ends = stream.attention_out(layer), stream.ffn_out(layer)
    zeros = torch.zeros_like(stream.hidden[0])

    def probe(attention: float, ffn: float) -> torch.Tensor:
        with ExitStack() as hooks:
            for module, value in zip(ends, (attention, ffn), strict=True):
                hooks.callback(
                    module.register_forward_hook(
                        lambda _module, _args, out, value=value: torch.full_like(out, value)
                    ).remove
                )
            return stream.call(layer, 0, zeros).flatten(0, -2)[0]

    gains = probe(1.0, 0.0), probe(0.0, 1.0)
    output, attention, ffn = (tensor.float() for tensor in stream.outputs(layer, 0))
    expected = stream.hidden[0].float() + gains[0].float() * attention + gains[1].float() * ffn
    rounding = 8 * torch.finfo(stream.hidden[0].dtype).eps
    return gains if (output - expected).norm() <= rounding * output.norm() else None
