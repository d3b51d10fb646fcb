"""
Norms over units that go: over the channels of the residual stream, which carry its gate; over the units of a layer.

Long because a norm under a plan is computed as the slim model does, whatever its units are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from ..errors import UnsupportedModelError
from ..vanilla.modules import output_sizes
from .adapter import HIDDEN_UNITS, UNITS, GateAdapter, scaled
from .bases import BasisGate
from .kinds import GateStart, HiddenGate, SigmoidGate


def norm_sizes(module: nn.Module) -> tuple[int, int]:
    """
    The input and output features of a LayerNorm or RMSNorm.

    Raises:
        UnsupportedModelError: for other modules, and for norms whose weight is not the factor of their output.
    """
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 1:
        if isinstance(module, nn.LayerNorm):
            return len(weight), len(weight)
        if set(module._parameters) == {"weight"} and not module._modules:
            zeros = {"weight": torch.zeros(len(weight), device="cpu")}
            if not functional_call(module, zeros, (torch.ones(1, len(weight), device="cpu"),)).any():
                return len(weight), len(weight)
    raise UnsupportedModelError(
        f"A module of type {type(module).__name__} cannot carry the gate on the residual stream. That takes a "
        "torch.nn.LayerNorm, or an RMSNorm whose output is proportional to its weight (not to 1 + weight): leave "
        "'hidden' out of the config's `gates`, or correct `hidden_norms` and `final_norm` of the family row."
    )


def kept_norm(norm: nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    What a norm that knows only some of the features makes of them; the other features become 0.

    It is computed as the slim model does, statistics included, so that rounding is the same too.

    Args:
        norm: as in `norm_sizes`.
        x: (..., features).
        index: the features that stay, rising.

    Returns:
        A tensor like x.
    """
    index = index.to(x.device)
    kept = {name: parameter[index] for name, parameter in norm._parameters.items() if parameter is not None}
    narrow = x.index_select(-1, index)
    if isinstance(norm, nn.LayerNorm):
        y = functional.layer_norm(narrow, index.shape, kept["weight"], kept.get("bias"), norm.eps)
    elif isinstance(norm, nn.RMSNorm):  # it keeps its size beside its weight
        y = functional.rms_norm(narrow, index.shape, kept["weight"], norm.eps)
    else:
        y = functional_call(norm, kept, (narrow,))
    return y.new_zeros(x.shape).index_copy(-1, index, y)


def plain_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a norm makes of x before its weight and bias: (..., features), or of fewer features if x has fewer."""
    ones = torch.ones(x.shape[-1], dtype=norm.get_parameter("weight").dtype, device=x.device)
    if isinstance(norm, nn.LayerNorm):
        return functional.layer_norm(x, ones.shape, ones, None, norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return functional.rms_norm(x, ones.shape, ones, norm.eps)
    return functional_call(norm, {"weight": ones}, (x,))


def narrow_norm(norm: nn.Module, x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """
    What a norm of only some directions makes of the stream before its weight and bias, as the slim model does.

    Args:
        norm: as in `norm_sizes`.
        x: (..., features).
        directions: (features, units); of a centred basis the first is zero, and counts in the norm's size.

    Returns:
        (..., units).
    """
    if not isinstance(norm, nn.LayerNorm):
        return plain_norm(norm, x @ directions)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    narrow = ((wide - wide.mean(-1, keepdim=True)).to(x.dtype) @ directions).to(wide.dtype)
    return (narrow * (narrow.square().mean(-1, keepdim=True) + norm.eps).rsqrt()).to(x.dtype)


def widened(norm: nn.Module, narrow: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """
    The output of a norm of only some directions, with its weight and bias: (..., features).

    Args:
        norm: as in `norm_sizes`.
        narrow: (..., units), of `narrow_norm`, scaled or not.
        directions: (features, units).
    """
    y, bias = (narrow @ directions.T) * norm.get_parameter("weight"), norm._parameters.get("bias")
    return y if bias is None else y + bias


def norm_in_basis(
    norm: nn.Module, x: torch.Tensor, gate: BasisGate, site: int, *, hard: bool | None = None
) -> torch.Tensor:
    """
    A norm's output under a gate on directions of the stream.

    Without a plan the directions of the norm's output are scaled. With one the norm knows the kept directions alone,
    and is computed as the slim model does: their coordinates, the norm of those, and its factor. Of a centred basis
    the first unit is the mean: 0, but counted in the size, as in the slim model's LayerNorm.

    Args:
        norm: as in `norm_sizes`.
        x: (..., features).
        gate: of the basis.
        site: the norm's place among those that read the stream.
        hard: as in `SigmoidGate.features`.

    Returns:
        A tensor like x.
    """
    index, factor = gate.kept_features(hard=hard), gate.features(hard=hard).to(x.device)
    if index is None and _is_one(factor):
        return norm(x)
    directions = gate.directions(index, x.dtype).to(x.device)
    if index is None:
        added = scaled(plain_norm(norm, x) @ directions, factor - 1) @ directions.T
        return norm(x) + added * norm.get_parameter("weight")
    factor = factor.index_select(-1, index.to(x.device)) * gate.scale(site, len(index)).to(factor)
    return widened(norm, scaled(narrow_norm(norm, x, directions), factor), directions)


def _is_one(factor: torch.Tensor) -> bool:
    """Whether factors are known to change nothing; on other devices than the CPU that costs more than it saves."""
    known = not factor.requires_grad and factor.device.type == "cpu" and not torch.compiler.is_compiling()
    return known and bool((factor == 1).all())


class NormAdapter(GateAdapter):
    """
    A norm, of whose features a plan leaves some: its statistics are those of these alone, as in the slim model.

    Args:
        base_layer, adapter_name, gates, inference_mode: as in `GateAdapter`.
    """

    @abstractmethod
    def _kept(self, adapter_names: Iterable[str], hard: bool | None) -> torch.Tensor | None:
        """The features that the plans leave, rising, or None for all."""

    def _base_output(
        self, x: torch.Tensor, adapter_names: Iterable[str], hard: bool | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        index = self._kept(adapter_names, hard)
        return self.base_layer(x, *args, **kwargs) if index is None else kept_norm(self.get_base_layer(), x, index)

    def _forward_rows(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) == 0:
            return self.base_layer(x, *args, **kwargs)
        names = sorted(set(adapter_names))
        rows = [[row for row, each in enumerate(adapter_names) if each == name] for name in names]
        parts = [self._gated(x[mine], [name], *args, **kwargs) for name, mine in zip(names, rows, strict=True)]
        order = torch.tensor([row for mine in rows for row in mine], device=x.device).argsort()
        return torch.cat(parts)[order]


class UnitNormAdapter(NormAdapter):
    """
    A norm over all units of a layer that a gate elsewhere in it closes, such as one over all query heads. It has no
    gates of its own, and does nothing without a plan.

    Args:
        base_layer, adapter_name, gates, inference_mode: as in `GateAdapter`.
    """

    adapter_layer_names = (UNITS,)
    output_slots = ()
    sizes_of = staticmethod(output_sizes)

    together: int = 1
    """Gates whose units are one unit here: query heads per KV group."""

    def make_gates(self, **options: Any) -> dict[str, SigmoidGate]:
        """None."""
        return {}

    def follow(self, home: GateAdapter, together: int) -> None:
        """Leave the units that the plan of the gate in `home` leaves: of so many gates each."""
        self.share(UNITS, home)
        self.together = together

    def input_factor(self, adapter_names: Iterable[str], *, hard: bool | None = None) -> torch.Tensor | None:
        """None: the gate scales the module that it is on."""
        return None

    def _kept(self, adapter_names: Iterable[str], hard: bool | None) -> torch.Tensor | None:
        kept: torch.Tensor | None = None
        for name in adapter_names:
            gate = self.gates(name).get(UNITS)
            if gate is not None and (units := gate.kept_units(hard=hard)) is not None:
                kept = units if kept is None else kept & units
        if kept is None:
            return None
        groups = kept.reshape(-1, self.together).any(1)
        return groups.repeat_interleave(self.in_features // len(groups)).nonzero()[:, 0]


class HiddenAdapter(NormAdapter):
    """
    Gates the channels of the residual stream at a norm that reads it.

    A channel that no norm passes on is in nobody's input, so what is still added to it does not matter. Soft gates
    scale the norm's output and fold into its weight. Under a plan the norm's statistics are those of the kept channels
    alone, as in the slim model: nothing has to be corrected there, `eps` neither.

    One adapter of the model holds the gate; the others share it (`share_hidden_gate`).

    Args:
        base_layer, adapter_name, gates, inference_mode: as in `GateAdapter`.
        group_size (`int`): neighbouring channels per gate.
        start (`GateStart`): how the gates start.
        relative (`bool`): as in `SigmoidGate`.
    """

    adapter_layer_names = (HIDDEN_UNITS,)
    output_slots = (HIDDEN_UNITS,)
    sizes_of = staticmethod(norm_sizes)

    def make_gates(  # type: ignore[override]  # each class names its own options
        self, group_size: int = 1, start: GateStart | None = None, relative: bool = False
    ) -> dict[str, SigmoidGate]:
        """A `HiddenGate`."""
        return {HIDDEN_UNITS: HiddenGate(self.in_features, group_size, start=start, relative=relative)}

    site: int = 0
    """The norm's place among those that read the stream; set where it is put in a model."""

    def share_hidden_gate(self, home: GateAdapter) -> None:
        """Use the gate that lives in `home` for every name that has none here."""
        self.share(HIDDEN_UNITS, home)

    def _kept(self, adapter_names: Iterable[str], hard: bool | None) -> torch.Tensor | None:
        kept: torch.Tensor | None = None
        for name in adapter_names:
            gate = self.gates(name).get(HIDDEN_UNITS)
            index = gate.kept_features(hard=hard) if isinstance(gate, HiddenGate) else None
            if index is not None:
                kept = index if kept is None else kept[torch.isin(kept, index)]
        return kept

    def stays(self) -> torch.Tensor | None:
        """
        1 for the channels that the plans of the adapters leave in this pass, 0 for others: (features,), or (rows,
        features) where each row has its own adapter; None if all stay.
        """
        if self.disable_adapters:
            return None
        if self._row_names is not None:
            masks = [self._mask([name], None) for name in self._row_names]
            if all(mask is None for mask in masks):
                return None
            ones = torch.ones(self.in_features)
            return torch.stack([ones if mask is None else mask.to(ones.device) for mask in masks])
        if self.merged:
            return self._mask(self.merged_adapters, True)
        return self._mask(self.active_adapters, None)

    def _mask(self, adapter_names: Iterable[str], hard: bool | None) -> torch.Tensor | None:
        index = self._kept(adapter_names, hard)
        if index is None:
            return None
        return torch.zeros(self.in_features, device=index.device).index_fill(0, index, 1.0)

    def _basis(self, adapter_names: Iterable[str]) -> BasisGate | None:
        """The gate in a basis of its own, if one of the adapters has it; then it is the only one here."""
        found = [self.gates(name)[HIDDEN_UNITS] for name in adapter_names if HIDDEN_UNITS in self.gates(name)]
        if not any(isinstance(gate, BasisGate) for gate in found):
            return None
        if len(found) > 1:
            raise UnsupportedModelError(
                f"the adapters {list(adapter_names)} gate the residual stream in different bases, which cannot be "
                "combined: activate one of them at a time"
            )
        return cast(BasisGate, found[0])

    def _base_output(
        self, x: torch.Tensor, adapter_names: Iterable[str], hard: bool | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        names = list(adapter_names)
        basis = self._basis(names)
        if basis is not None:
            return norm_in_basis(self.get_base_layer(), x, basis, self.site, hard=hard)
        return super()._base_output(x, names, hard, *args, **kwargs)
