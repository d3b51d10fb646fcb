"""The adapters: on attention heads, on channels, on whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch.func import functional_call

from ..errors import UnsupportedModelError
from ..vanilla.modules import feature_dim, norm_offset, output_sizes, scaled_norm_weight
from .adapter import BLOCK, UNITS, GateAdapter
from .kinds import BlockGate, ChannelGate, GateStart, HeadGate, SigmoidGate


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
