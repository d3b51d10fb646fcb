"""Sigmoid gates: trainable factors in [0, 1] on heads, channels and blocks.

Long because the kinds differ from the first by a few lines each.

References:
    Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018): gates on structures.
    Xia et al., "Structured Pruning Learns Compact and Accurate Models" (2022): heads, channels and blocks together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..errors import HawAdaError
from .relaxation import Closing, Relaxation
from .scaling import scale, scale_rows


@dataclass(frozen=True)
class GateStart:
    """
    How gates start.

    Args:
        temperature (`float`): T in `g = sigmoid(theta / T)`; larger is softer. Above 0.
        value (`float`): the gate's value at the start, in (0, 1).
        random (`bool`): draw theta from a normal distribution of deviation T instead, far from 1 and from each other.
    """

    temperature: float = 1.0
    value: float = 0.9
    random: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < math.inf:
            problems.append(f"temperature must be finite and above 0, got {self.temperature!r}")
        if not isinstance(self.value, (int, float)) or not 0 < self.value < 1:
            problems.append(f"the start value must be a number inside (0, 1), got {self.value!r}")
        if problems:
            raise HawAdaError("\n".join(problems))

    @cached_property
    def theta(self) -> float:
        """The raw parameter at the start, rounded to bfloat16 so that every dtype holds the same number."""
        exact = self.temperature * math.log(self.value / (1 - self.value))
        return float(torch.tensor(exact).to(torch.bfloat16))


class SigmoidGate(nn.Module):
    """
    Multiplies a tensor by `g = sigmoid(theta / temperature)`.

    Args:
        shape (`int` or `tuple[int, ...]`): the shape of theta, one entry per unit.
        dim (`int`): the axis of the input that the gate's last axis lies on; the gate's other axes lie just before it.
        start (`GateStart`): temperature and start value.
        relative (`bool`): apply `g / g_start` instead of `g`, so that an untrained gate is *exactly* the identity.

    Example:

        >>> gate = SigmoidGate(shape=8)
        >>> gate(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    is_factor = True
    """Whether it multiplies features of the module that it is on, and so folds into that one's weights."""

    binary = False
    """Whether it is 0 or 1 under a plan: nothing could take up a soft value. Those are for training and ranking."""

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        dim: int = -1,
        start: GateStart | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not shape or any(size < 1 for size in shape):
            raise HawAdaError(f"a gate's shape must hold one or more sizes of at least 1, got {shape}")
        start = start or GateStart()
        self.dim = dim
        self.start = start
        self.relative = relative
        theta = torch.randn(shape) * start.temperature if start.random else torch.full(shape, start.theta)
        self.theta = nn.Parameter(theta)
        self.kept: torch.Tensor | None
        # Not saved: a plan travels in the adapter's config. A buffer, so that it follows the gate to its device.
        self.register_buffer("kept", None, persistent=False)
        self.hard_in_training = False
        self.relaxation: Relaxation | None = None
        self.row_thetas: torch.Tensor | None = None
        """In the place of theta, (rows, ...): one for each row of the batch. Set by `theta_per_row` alone."""
        self._start_value: torch.Tensor | None = None

    @property
    def units(self) -> int:
        """The number of units gated."""
        return self.theta.numel()

    def _theta(self) -> torch.Tensor:
        theta = self.theta if self.row_thetas is None else self.row_thetas
        return theta.to(torch.promote_types(theta.dtype, torch.float32))

    def value(self) -> torch.Tensor:
        """`g = sigmoid(theta / temperature)`, in [0, 1], of theta's shape, at least float32."""
        return self._sigmoid(self._theta())

    def _sigmoid(self, theta: torch.Tensor) -> torch.Tensor:
        temperature = self.start.temperature
        return torch.sigmoid(theta if temperature == 1 else theta / temperature)  # a step runs this hundreds of times

    def logits(self) -> torch.Tensor:
        """`theta / temperature`, of theta's shape, at least float32."""
        return self._theta() / self.start.temperature

    def open_probability(self) -> torch.Tensor:
        """How likely each unit stays, in [0, 1], of theta's shape, as the relaxation says; at the start about 1."""
        relaxation = self.relaxation or Closing()
        return relaxation.open_probability(self.logits(), self.start.theta / self.start.temperature)

    def _value_at_start(self, value: torch.Tensor) -> torch.Tensor:
        """What `value` was at the start. Kept: a step asks for it hundreds of times."""
        # It goes through the same operation, element by element, so an untrained gate is exactly 1.
        if torch.compiler.is_compiling():  # a constant of the graph; what is kept would be one more thing to guard
            return self._sigmoid(torch.full_like(value, self.start.theta, requires_grad=False))
        known, wanted = self._start_value, (value.dtype, value.device, value.shape)
        if known is None or (known.dtype, known.device, known.shape) != wanted:
            with torch.inference_mode(False), torch.no_grad():  # no tensor of inference mode: training may follow
                known = self._sigmoid(torch.full_like(value, self.start.theta, requires_grad=False))
            self._start_value = known
        return known

    def factor(self, *, hard: bool) -> torch.Tensor:
        """
        What a unit is multiplied by, of theta's shape, at least float32.

        `g`, or `g / g_start` for a relative gate; times the plan's 0 or 1 when `hard` and a plan is set. In training
        that is not hard, what the `relaxation` says, if there is one. A binary gate is 0 or 1 under a plan; towards
        one in training, units that stay count in full.
        """
        if self.binary and self.kept is not None:
            kept = self.kept.to(self.theta.device)
            if hard:
                return kept.to(torch.promote_types(self.theta.dtype, torch.float32))
            value = self._soft()
            return torch.where(kept, 1 + value - value.detach(), value)
        if not hard:
            return self._soft()
        value = self._value()
        return value if self.kept is None else value * self.kept.to(value.device)

    def _soft(self) -> torch.Tensor:
        """What it is in training, or without a plan."""
        if self.relaxation is not None and self.training:
            return self.relaxation.factor(self.logits(), self.start.theta / self.start.temperature, self.kept)
        return self._value()

    def _value(self) -> torch.Tensor:
        value = self.value()
        return value / self._value_at_start(value) if self.relative else value

    def set_plan(self, kept: torch.Tensor | None, *, in_training: bool = False) -> None:
        """
        Close all units but `kept`, in evaluation and, if `in_training`, in training. `None` closes none.

        Args:
            kept: boolean, of theta's shape.

        Raises:
            HawAdaError: if the shapes differ.
        """
        if kept is not None and tuple(kept.shape) != tuple(self.theta.shape):
            raise HawAdaError(f"the plan's mask has shape {tuple(kept.shape)}, the gate {tuple(self.theta.shape)}")
        # Parameters may still be on the meta device, when an adapter is being loaded.
        device = torch.device("cpu") if self.theta.is_meta else self.theta.device
        self.kept = None if kept is None else kept.to(device=device, dtype=torch.bool)
        self.hard_in_training = in_training  # also of a gate that stays open: no relaxation applies to it then

    def features(self, *, hard: bool | None = None) -> torch.Tensor:
        """
        The factor of every feature along the gated axis; `hard` defaults to what the mode asks for. With one more axis
        in front, of the rows, within `theta_per_row`.
        """
        return self.factor(hard=self._is_hard(hard))

    def kept_units(self, *, hard: bool | None = None) -> torch.Tensor | None:
        """Which units the plan keeps, of theta's shape; None for all. `hard` as in `features`."""
        return self.kept if self._is_hard(hard) else None

    def _is_hard(self, hard: bool | None) -> bool:
        return (self.hard_in_training or not self.training) if hard is None else hard

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Scale `x`; the product is formed in the wider of both dtypes and returned in that of `x`.

        Args:
            x: any layout in which the axes up to `dim` match the gate's shape (or broadcast to it).
        """
        factor = self.features().to(x.device)  # a shared gate may live on another device
        return scale(x, factor, self.dim) if self.row_thetas is None else scale_rows(x, factor, self.dim)

    def extra_repr(self) -> str:
        """The shape and the temperature."""
        return f"shape={tuple(self.theta.shape)}, dim={self.dim}, temperature={self.start.temperature}"


class ChannelGate(SigmoidGate):
    """
    One gate per group of `group_size` neighbouring features.

    Args:
        num_features (`int`): features along the gated axis.
        group_size (`int`): features per gate; must divide `num_features`.
        dim: as in `SigmoidGate`.
        start: as in `SigmoidGate`.
        relative: as in `SigmoidGate`.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int = 1,
        *,
        dim: int = -1,
        start: GateStart | None = None,
        relative: bool = False,
    ) -> None:
        if group_size < 1 or num_features % group_size:
            divisors = [n for n in range(1, min(num_features, 256) + 1) if num_features % n == 0]
            raise HawAdaError(
                f"group_size must divide the {num_features} features, got {group_size}; possible: {divisors}"
            )
        super().__init__(num_features // group_size, dim=dim, start=start, relative=relative)
        self.group_size = group_size

    def features(self, *, hard: bool | None = None) -> torch.Tensor:
        """The factor of every feature: (num_features,), or (rows, num_features) within `theta_per_row`."""
        factor = super().features(hard=hard)
        return factor.repeat_interleave(self.group_size, -1) if self.group_size > 1 else factor


class HeadGate(ChannelGate):
    """
    One gate per attention head, on the concatenated heads at the input of the output projection.

    Args:
        num_heads (`int`): query heads.
        head_dim (`int`): features per head.
        dim: as in `SigmoidGate`.
        start: as in `SigmoidGate`.
        relative: as in `SigmoidGate`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        dim: int = -1,
        start: GateStart | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(num_heads * head_dim, head_dim, dim=dim, start=start, relative=relative)


class HiddenGate(ChannelGate):
    """
    The gate on the channels of the residual stream, one for the whole model.

    Args:
        num_features, group_size, dim, start, relative: as in `ChannelGate`.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int = 1,
        *,
        dim: int = -1,
        start: GateStart | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(num_features, group_size, dim=dim, start=start, relative=relative)
        self.index: torch.Tensor | None
        self.register_buffer("index", None, persistent=False)

    in_basis = False
    """Whether its units are directions of a basis of the stream, not channels."""

    def set_plan(self, kept: torch.Tensor | None, *, in_training: bool = False) -> None:
        """As in `SigmoidGate`."""
        super().set_plan(kept, in_training=in_training)
        # Looked up once: it is needed at every norm, and finding it makes the host wait for the device.
        self.index = None if self.kept is None else self.kept.repeat_interleave(self.group_size).nonzero()[:, 0]

    def ranked(self, scores: torch.Tensor, *, trained: bool = True) -> torch.Tensor:
        """Scores of the units, (units,), by which they are chosen; `trained` if they are the gates' own values."""
        return scores

    def kept_features(self, *, hard: bool | None = None) -> torch.Tensor | None:
        """The indices of the features that the plan keeps, or None for all; `hard` as in `features`."""
        return self.index if self._is_hard(hard) else None


class BlockGate(SigmoidGate):
    """
    One gate on a whole tensor: what a block, or all blocks of a layer, add to the residual stream.

    Args:
        start: as in `SigmoidGate`.
        relative: as in `SigmoidGate`.
        parts (`int`): blocks of its layer; with all of them closed the layer is the identity.
    """

    def __init__(self, *, start: GateStart | None = None, relative: bool = False, parts: int = 2) -> None:
        super().__init__(1, start=start, relative=relative)
        self.parts = parts


class BlendGate(BlockGate):
    """
    One gate on a layer that is no sum of its input and of what it adds: it blends the layer's output and its input.

    No weight can take up such a factor. So it is binary under a plan: the layer is there as it is, or gone. Soft
    values are for training and ranking alone.
    """

    is_factor = False
    binary = True


class ExpertGate(ChannelGate):
    """
    One gate per routed expert: its logarithm is added to the router's logits, so that a closed expert is never chosen
    and the others share what it had. A router without a bias has no place for a soft value: it is binary under a plan.
    """

    is_factor = False
    binary = True
