"""
A model taken apart: its layers called one after the other, on hidden states kept for all calibration batches.

Long because a layer is called in several ways: whole, up to a projection, on other hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import HawAdaError
from ..vanilla.batches import Batch, has_rows, main_input, rows_of
from ..vanilla.family import Layout
from ..vanilla.outputs import prediction_of
from ..vanilla.prefix import Passed
from .calls import Call

Gains = tuple[torch.Tensor, torch.Tensor] | None

Tensors = TypeVar("Tensors", bound=tuple[torch.Tensor, ...])

Keep = Callable[[torch.Tensor], torch.Tensor]
"""Where a tensor is kept that is needed later: in memory, or in a file."""


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Keeps a tensor as it is."""
    return tensor


class _EnoughError(Exception):
    """Ends a forward pass at the module whose input was wanted."""


@dataclass
class Stream:
    """
    The residual stream of one model on all calibration batches, at one depth.

    Args:
        model: in evaluation mode.
        layout: its family row and sizes.
        hidden: (batch, positions, hidden_size) per batch, as the next layer takes it.
        calls: per batch, how every layer is called.
        rows: of the first batch, 1 or all, that `row_calls` go with.
        row_calls: how every layer is called on those.
        keep: where hidden states are kept.
        between: what the layers pass on beside the hidden states that the next one takes; empty if nothing.
        wrapped: whether they give tuples.
        gains: of layers, as far as they were asked for (`residual_gains`).
    """

    model: PreTrainedModel
    layout: Layout
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    rows: int = 0
    row_calls: list[Call] = field(default_factory=list)
    keep: Keep = in_memory
    between: str = ""
    wrapped: bool = False
    gains: dict[int, Gains] = field(default_factory=dict)

    @classmethod
    def start(cls, model: PreTrainedModel, layout: Layout, batches: Sequence[Batch], keep: Keep = in_memory) -> Stream:
        """
        The stream before the first layer, and the calls.

        One row of each kind of batch goes through the whole body. Layers that are called there with the very same
        objects as an earlier one are called like that one on the other batches of the kind, which stop at the last
        layer that has something new.
        """
        stream = cls(model, layout, keep=keep)
        kinds: dict[Any, list[Call]] = {}
        for batch in batches:
            kind = tuple((name, value.shape[1:] if _is_tensor(value) else ()) for name, value in sorted(batch.items()))
            if kind not in kinds:
                row, kinds[kind] = stream._record(stream._first_row(batch), len(stream.layers))
                if not stream.row_calls:
                    stream.rows, stream.row_calls = len(row), kinds[kind]
            sample = kinds[kind]
            like = [next(index for index, other in enumerate(sample) if other.same(call)) for call in sample]
            hidden, calls = stream._record(batch, max(like) + 1)
            if not all(call.absent == other.absent for call, other in zip(calls, sample, strict=False)):
                # Masks that were not needed for the first row: whose they are shows only where there are some.
                hidden, calls = stream._record(batch, len(stream.layers))
                kinds[kind], like = calls, list(range(len(calls)))
            stream.calls.append([calls[index] for index in like])
            stream.hidden.append(keep(hidden))
        return stream

    def _first_row(self, batch: Batch) -> Batch:
        """A batch of one of its rows; the batch, if it cannot be taken apart."""
        rows = len(main_input(self.model, batch))
        return rows_of(batch, slice(1), rows) if has_rows(batch, rows) else batch

    def _record(self, batch: Batch, count: int) -> tuple[torch.Tensor, list[Call]]:
        """What goes into the first layer, and how the first `count` layers are called."""
        # A cache would grow with every call of a layer.
        options = {"use_cache": False} if "use_cache" in self.model.config.to_dict() else {}
        calls: list[Call] = []
        inputs: list[torch.Tensor] = []
        given: list[torch.Tensor] = []

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append(Call(args[1:], kwargs))
            inputs[:] = inputs or [hidden]
            if given and hidden is not given[0] and not torch.equal(hidden, given[0]):
                self.between = f"layer {len(calls) - 1} gets other hidden states than layer {len(calls) - 2} gives"
            if len(calls) == count:
                raise _EnoughError

        def passed(_module: nn.Module, _args: Any, output: Any) -> None:
            self.wrapped = isinstance(output, tuple)
            given[:] = [value for value in (output if isinstance(output, tuple) else (output,)) if _is_tensor(value)]
            if len(given) > 1:
                self.between = f"layer {len(calls) - 1} gives more than hidden states"

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True, prepend=True).remove)
                hooks.callback(layer.register_forward_hook(passed).remove)
            with suppress(_EnoughError):
                cast(nn.Module, self.model.base_model)(**(options | dict(batch)))
        if not inputs:
            raise HawAdaError(
                f"a calibration batch of {sorted(batch)} runs no layer of {self.layout.stack!r}, which is to be "
                "refitted: give batches with what it sees, or leave the calibration out"
            )
        return inputs[0], calls

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

    def call(self, layer: int, number: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """A layer's output on a batch's stream, or on other hidden states of its shape."""
        return self._called(layer, self.calls[number][layer], self.hidden[number] if hidden is None else hidden)

    def _called(self, layer: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        output = self.layers[layer](hidden, *call.args, **call.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    @property
    def row(self) -> torch.Tensor:
        """The stream that `row_calls` go with: (rows, positions, hidden_size)."""
        return self.hidden[0][: self.rows]

    def call_row(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A layer's output on hidden states of the shape of `row`."""
        return self._called(layer, self.row_calls[layer], hidden)

    def outputs(self, layer: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The outputs of a layer, of its attention's projection and of its FFN's, on a batch's stream."""
        return self._outputs(layer, self.calls[number][layer], self.hidden[number])

    def outputs_of_row(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same on `row`."""
        return self._outputs(layer, self.row_calls[layer], self.row)

    def _outputs(
        self, layer: int, call: Call, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention, ffn = self.attention_out(layer), self.ffn_out(layer)
        found: dict[nn.Module, torch.Tensor] = {}

        def keep(module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            found[module] = output

        with ExitStack() as hooks:
            for module in (attention, ffn):
                hooks.callback(module.register_forward_hook(keep).remove)
            output = self._called(layer, call, hidden)
        return output, found[attention], found[ffn]

    def inputs_at(self, module: nn.Module, layer: int, number: int, gains: Gains) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What one of a layer's two projections gets on a batch's stream.

        Args:
            module: the projection.
            layer: which.
            number: of the batch, from 0.
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
                self.call(layer, number)
        stream = self.hidden[number]
        if attention and gains is not None:
            stream = stream + gains[0] * attention[0]
        return found[0], stream

    def output_on(
        self, module: nn.Module, layer: int, number: int, hidden: torch.Tensor, silent: nn.Module | None = None
    ) -> torch.Tensor:
        """
        What one of a layer's two projections gives on other hidden states.

        Args:
            module: the projection.
            layer: which.
            number: of the batch, from 0.
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
                self.call(layer, number, hidden)
        return found[0]

    def prediction(self, number: int, batch: Batch) -> torch.Tensor:
        """
        What the model predicts (`prediction_of`) for a batch whose stream is behind the last layer.

        The model's own forward pass, in which no layer computes anything. Not for models that others use meanwhile.

        Args:
            number: of the batch, from 0.
            batch: its keyword arguments.
        """
        with self._passed(number):
            return prediction_of(self.model(**batch), self.model)

    def end(self, number: int, batch: Batch) -> None:
        """As `prediction`, without a head, for who watches what is behind the last layer."""
        with self._passed(number):
            cast(nn.Module, self.model.base_model)(**batch)

    @contextmanager
    def _passed(self, number: int) -> Iterator[None]:
        """While no layer computes anything, and the last one gives a batch's stream."""
        layers = cast(nn.ModuleList, self.layers)
        real, hidden = list(layers), self.hidden[number]
        try:
            for index, layer in enumerate(real):
                layers[index] = Passed(layer, (hidden,) if self.wrapped else hidden)
            yield
        finally:
            for index, layer in enumerate(real):
                layers[index] = layer

    def advance(self, layer: int) -> None:
        """Take the stream through a layer."""
        for number in range(len(self.hidden)):
            self.hidden[number] = self.keep(self.call(layer, number))


class Known:
    """
    Tensors that are computed once.

    Args:
        room: bytes of them that are kept, the first ones; further ones are made each time.
    """

    def __init__(self, room: int) -> None:
        self._room, self._kept = room, dict[Any, tuple[torch.Tensor, ...]]()

    def value(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives."""
        if key in self._kept:
            return cast(Tensors, self._kept[key])
        found = make()
        size = sum(each.nbytes for each in found)
        if size <= self._room:
            self._room -= size
            self._kept[key] = found
        return found


@dataclass
class KnownStream(Stream):
    """
    The stream of a model that is gone through several times, from the start: what its layers give is computed once.

    Args:
        model, layout, hidden, calls, rows, row_calls, keep, between, wrapped, gains: as of `Stream`.
        known: the outputs of layers on the batches.
    """

    known: Known = field(default_factory=lambda: Known(0))

    def again(self) -> KnownStream:
        """The same, to be taken through the layers, while this one stays before the first."""
        return replace(self, hidden=list(self.hidden))

    def outputs(self, layer: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of `Stream`."""
        return self.known.value((self.layout.tower, layer, number), partial(super().outputs, layer, number))

    def advance(self, layer: int) -> None:
        """Take the stream through a layer."""
        for number in range(len(self.hidden)):
            self.hidden[number] = self.outputs(layer, number)[0]


def residual_gains(stream: Stream, layer: int) -> Gains:
    """
    What multiplies the outputs of a layer's two projections where they are added to the residual stream.

    Found by calling the layer on zeros with one projection's output replaced by ones and the other's by zeros, and
    checked on a row of the first batch: `output = input + gain_a * attention + gain_f * ffn`.

    Returns:
        Two tensors of (hidden_size,); None if the layer does not add its blocks up like this (a norm in between).
    """
    if layer not in stream.gains:
        stream.gains[layer] = _found_gains(stream, layer)
    return stream.gains[layer]


def _found_gains(stream: Stream, layer: int) -> Gains:
    ends, row = (stream.attention_out(layer), stream.ffn_out(layer)), stream.row
    zeros = torch.zeros_like(row)

    def probe(attention: float, ffn: float) -> torch.Tensor:
        with ExitStack() as hooks:
            for module, value in zip(ends, (attention, ffn), strict=True):
                hooks.callback(
                    module.register_forward_hook(
                        lambda _module, _args, out, value=value: torch.full_like(out, value)
                    ).remove
                )
            return stream.call_row(layer, zeros).flatten(0, -2)[0]

    gains = probe(1.0, 0.0), probe(0.0, 1.0)
    wide = torch.promote_types(row.dtype, torch.float32)
    output, attention, ffn = (tensor.to(wide) for tensor in stream.outputs_of_row(layer))
    expected = row + gains[0].to(wide) * attention + gains[1].to(wide) * ffn
    rounding = 8 * torch.finfo(row.dtype).eps
    return gains if (output - expected).norm() <= rounding * output.norm() else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
