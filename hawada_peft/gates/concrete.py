"""The adapters: on attention heads, on channels, on whole blocks, on experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import RowsError, UnsupportedModelError
from ..vanilla.modules import channels_dim, feature_dim, norm_offset, output_sizes, scaled_norm_weight
from .adapter import BLOCK, EXPERT_UNITS, UNITS, GateAdapter, scaled
from .kinds import BlockGate, ChannelGate, ExpertGate, GateStart, HeadGate, SigmoidGate


class ChannelAdapter(GateAdapter):
    """
    Gates the input features of a Linear, Conv1D or convolution: the FFN channels, when it wraps `down_proj` or `fc2`.

    Arguments as in `GateAdapter`, and:

    Keyword Args:
        group_size (`int`): neighbouring features per gate.
        start (`GateStart`): how the gates start.
        relative (`bool`): as in `SigmoidGate`.
    """

    def make_gates(  # type: ignore[override]  # each class names its own options
        self, group_size: int = 1, start: GateStart | None = None, relative: bool = False
    ) -> dict[str, SigmoidGate]:
        """A `ChannelGate` on the input."""
        dim = feature_dim(self.base_layer)
        return {UNITS: ChannelGate(self.in_features, group_size, dim=dim, start=start, relative=relative)}


class AttentionHeadAdapter(GateAdapter):
    """
    Gates the attention heads at the input of the output projection (`o_proj`), where a closed head adds nothing.

    Arguments as in `GateAdapter`, and:

    Keyword Args:
        head_dim (`int`): features per head; must divide the module's input features.
        start (`GateStart`): how the gates start.
        relative (`bool`): as in `SigmoidGate`.
    """

    def make_gates(  # type: ignore[override]
        self, head_dim: int | None = None, start: GateStart | None = None, relative: bool = False
    ) -> dict[str, SigmoidGate]:
        """A `HeadGate` on the input."""
        if head_dim is None or self.in_features % head_dim:
            raise UnsupportedModelError(
                f"head_dim must divide the {self.in_features} input features of the attention output projection, got "
                f"{head_dim}: pass head_dim=model.config.hidden_size // model.config.num_attention_heads, or what the "
                "model's config states."
            )
        dim = feature_dim(self.base_layer)
        return {UNITS: HeadGate(self.in_features // head_dim, head_dim, dim=dim, start=start, relative=relative)}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `GateAdapter`, of what a plan leaves inside of the heads."""
        return super().forward(self.in_heads(x, kwargs.get("adapter_names")), *args, **kwargs)


class QueryAdapter(GateAdapter):
    """
    Narrows what a projection to queries gives, inside of each head, under a plan. It has no gates.

    Args:
        base_layer, adapter_name, gates, inference_mode: as in `GateAdapter`.
    """

    adapter_layer_names = (UNITS,)
    output_slots = ()
    sizes_of = staticmethod(output_sizes)

    def make_gates(self, **options: Any) -> dict[str, SigmoidGate]:
        """None."""
        return {}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `GateAdapter`, with each head's features narrowed."""
        rows = kwargs.get("adapter_names")
        return self.in_heads(super().forward(x, *args, **kwargs), rows)


class BlockAdapter(GateAdapter):
    """
    Gates the whole output of a module: what a block adds to the residual, when it wraps the block's last projection
    or the norm behind that.

    A norm is computed as the slim model does, with the factor in its weight: some norms round that to float32.

    Arguments as in `GateAdapter`, and:

    Keyword Args:
        start (`GateStart`): how the gate starts.
        relative (`bool`): as in `SigmoidGate`.
    """

    def make_gates(  # type: ignore[override]
        self, start: GateStart | None = None, relative: bool = False
    ) -> dict[str, SigmoidGate]:
        """A `BlockGate` on the output."""
        return {BLOCK: BlockGate(start=start, relative=relative)}

    sizes_of = staticmethod(output_sizes)

    @cached_property
    def offset(self) -> float | None:
        """Of the norm that it wraps (`norm_offset`); None for other modules."""
        return norm_offset(self.get_base_layer())

    def _gated(self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        factor, base = self.output_factor(adapter_names), self.get_base_layer()
        if factor is None or self.offset is None or self.training or factor.ndim > 1:
            return super()._gated(x, adapter_names, *args, **kwargs)
        weight, bias = base.get_parameter("weight"), base._parameters.get("bias")
        factor = factor.to(weight.device)
        tensors = {"weight": scaled_norm_weight(weight, factor, self.offset).to(weight.dtype)}
        if bias is not None:
            tensors["bias"] = (bias * factor).to(bias.dtype)
        return cast(torch.Tensor, functional_call(base, tensors, (x, *args), kwargs))


class ExpertsAdapter(ChannelAdapter):
    """
    Gates the channels of all experts of a layer, which are stacked in raw weights, and their sum.

    Channels are gated in the weights of the last projection: its class offers no other place. Training makes gradients
    of the size of that weight, one layer at a time.

    Arguments as in `ChannelAdapter`.
    """

    def _gated(self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        inputs, output = self.input_factor(adapter_names), self.output_factor(adapter_names)
        if any(factor is not None and factor.ndim > 1 for factor in (inputs, output)):
            raise RowsError("experts see the tokens of all rows in one axis: there is no factor for each row")
        if inputs is None:
            y = self._base_output(x, adapter_names, None, *args, **kwargs)
        else:
            down = base.get_parameter("down_proj")
            factor = inputs.to(device=down.device)
            scaled_down = (down * (factor[:, None] if channels_dim(base) == 1 else factor)).to(down.dtype)
            y = functional_call(base, {"down_proj": scaled_down}, (x, *args), kwargs)
        return y if output is None else scaled(y, output.to(y.device))


class RouterAdapter(GateAdapter):
    """
    Gates the experts that a router chooses from: log g is added to its logits, -infinity for a closed expert.

    Args:
        base_layer, adapter_name, gates, inference_mode: as in `GateAdapter`.
        start (`GateStart`): how the gates start.
        relative (`bool`): as in `SigmoidGate`.
    """

    adapter_layer_names = (EXPERT_UNITS,)
    output_slots = ()

    @staticmethod
    def sizes_of(module: nn.Module) -> tuple[int, int]:
        """The features of a token, and the experts."""
        experts, features = module.get_parameter("weight").shape
        return features, experts

    def make_gates(  # type: ignore[override]
        self, start: GateStart | None = None, relative: bool = False
    ) -> dict[str, SigmoidGate]:
        """An `ExpertGate`."""
        return {EXPERT_UNITS: ExpertGate(self.out_features, start=start, relative=relative)}

    def input_factor(self, adapter_names: Iterable[str], *, hard: bool | None = None) -> torch.Tensor | None:
        """None: nothing is scaled."""
        return None

    def expert_factor(self, adapter_names: Iterable[str], *, hard: bool | None = None) -> torch.Tensor | None:
        """What each expert counts, (experts,), or (rows, experts) within `theta_per_row`; None without gates."""
        gates = [self.gates(name).get(EXPERT_UNITS) for name in adapter_names]
        factors = [gate.features(hard=hard) for gate in gates if gate is not None]
        return math.prod(factors[1:], start=factors[0]) if factors else None

    def _base_output(
        self, x: torch.Tensor, adapter_names: Iterable[str], hard: bool | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        base, factor = self.get_base_layer(), self.expert_factor(adapter_names, hard=hard)
        if factor is None:
            return cast(torch.Tensor, self.base_layer(x, *args, **kwargs))
        if factor.ndim > 1:
            raise RowsError("a router sees the tokens of all rows in one axis: there is no factor for each row")
        closed = factor == 0
        added = factor.clamp_min(torch.finfo(factor.dtype).tiny).log().masked_fill(closed, -torch.inf)
        corrections = {
            name: buffer.masked_fill(closed, -torch.inf)  # a closed expert is not chosen for its correction either
            for name, buffer in base._buffers.items()
            if buffer is not None and buffer.shape == closed.shape
        }
        with _Added(added):
            return cast(torch.Tensor, functional_call(base, corrections, (x, *args), kwargs))

    def _forward_rows(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        raise UnsupportedModelError("one adapter per row is not known for routers: they see the tokens of all rows")


class _Added(TorchFunctionMode):
    """Within it a number for each output is added to what a linear map of so many outputs gives."""

    def __init__(self, added: torch.Tensor) -> None:
        super().__init__()
        self.added = added

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear and output.shape[-1:] == self.added.shape:
            return output + self.added.to(output)
        return output
