"""
The abstract adapter: wraps a module, applies its gates, folds them into its weights on request.

Long because PEFT asks one class for all that a layer does.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import BrokenGatesError
from ..vanilla.modules import (
    Base,
    check_unquantized,
    feature_dim,
    feature_sizes,
    fold_factors,
    parameters_of,
    scales_through,
)
from .bases import HeadMap
from .kinds import BlendGate, SigmoidGate
from .scaling import scale, scale_rows

UNITS, BLOCK, LAYER, HIDDEN_UNITS = "hawada_units", "hawada_block", "hawada_layer", "hawada_hidden"
EXPERT_UNITS = "hawada_experts"
"""
The slots of an adapter: gates on the input's features, on the output, one that all of a layer's blocks share, one on
the residual stream that all norms share; on the experts that a router chooses from.
"""

HEAD_MAPS = "hawada_in_heads"
"""Where an adapter has bases inside of heads, which are no gates."""


class GateAdapter(nn.Module, BaseTunerLayer, ABC):
    """
    Wraps a target module and multiplies its input features and its output by gates, one set per adapter name.

    It owns no base weights, prunes nothing and trains nothing. The gates of a name are found by `gates(name)`.

    Args:
        base_layer (`nn.Module`): the module to wrap.
        adapter_name (`str`): the name of the first set of gates.
        gates (`Mapping[str, SigmoidGate]`, *optional*): slot to gate; the class's own choice if left out.
        inference_mode (`bool`): make the gates without gradients.
    """

    adapter_layer_names: tuple[str, ...] = (UNITS, BLOCK, LAYER)
    other_param_names: tuple[str, ...] = (HEAD_MAPS,)
    output_slots: tuple[str, ...] = (BLOCK, LAYER)
    sizes_of = staticmethod(feature_sizes)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        *,
        gates: Mapping[str, SigmoidGate] | None = None,
        inference_mode: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = self.sizes_of(base_layer)
        self.base_layer = base_layer
        for slot in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, slot, nn.ModuleDict())
        self.training = base_layer.training
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        # Other adapters that hold a gate shared with this one, by its slot; a dict hides them from nn.Module.
        self._gate_homes: dict[str, list[GateAdapter]] = {}
        self._blending: RemovableHandle | None = None
        self._row_names: list[str] | None = None  # of the pass forward that is under way
        # The dense weight and bias while merged: closed gates cannot be divided out again.
        self._dense: tuple[torch.Tensor, ...] = ()
        self.update_layer(adapter_name, self.make_gates(**options) if gates is None else gates, inference_mode)

    @abstractmethod
    def make_gates(self, **options: Any) -> dict[str, SigmoidGate]:
        """The gates this class of adapter places by itself: slot to gate."""

    def update_layer(self, adapter_name: str, gates: Mapping[str, SigmoidGate], inference_mode: bool = False) -> None:
        """Add the gates of one more adapter name, or replace those it has. They get the mode of the module."""
        for slot, gate in gates.items():
            getattr(self, slot)[adapter_name] = gate.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def share(self, slot: str, home: GateAdapter) -> None:
        """Use the gate that lives in a slot of `home` for every name that has none here."""
        homes = self._gate_homes.setdefault(slot, [])
        if home is not self and home not in homes:
            homes.append(home)

    @property
    def head_maps(self) -> nn.ModuleDict:
        """Of the features of heads that pass here, by the name of the adapter."""
        return cast(nn.ModuleDict, getattr(self, HEAD_MAPS))

    def set_head_map(self, adapter_name: str, head_map: HeadMap) -> None:
        """Let features of heads that pass here be narrowed under a plan."""
        self.head_maps[adapter_name] = head_map
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def in_heads(self, x: torch.Tensor, rows: list[str] | None = None) -> torch.Tensor:
        """
        What is left of features of heads in the bases that plans narrow: (..., heads * features).

        Args:
            x: of the same shape.
            rows: one adapter name per row, if they differ.
        """
        if self.disable_adapters or not self.head_maps:
            return x
        if rows is not None:
            parts = [self._narrowed(row[None], [name]) for row, name in zip(x, rows, strict=True)]
            return torch.cat(parts) if parts else x
        return self._narrowed(x, self.merged_adapters if self.merged else self.active_adapters)

    def _narrowed(self, x: torch.Tensor, adapter_names: Iterable[str]) -> torch.Tensor:
        for name in adapter_names:
            if name in self.head_maps:
                x = self.head_maps[name](x)
        return x

    def blend(self, layer: nn.Module) -> None:
        """Let the `BlendGate` in the layer's slot blend what the layer around this adapter gives, until `release`."""
        if self._blending is None:
            # First of all hooks, so that whatever records hidden states records what the layer gives to the next one.
            self._blending = layer.register_forward_hook(self._blended, with_kwargs=True, prepend=True)

    def _blended(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        rows, self._row_names = self._row_names, None
        merged = self.merged and not self.disable_adapters
        names = self.merged_adapters if merged else [] if self.disable_adapters else self.active_adapters
        factor = self.blend_factor(names, hard=True if merged else None) if rows is None else self._row_factors(rows)
        if factor is None:
            return None
        x, y = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        factor = factor.to(y.device)
        blended = scaled(y, factor) + scaled(x, 1 - factor)  # exactly y at 1, exactly x at 0
        return (blended, *output[1:]) if isinstance(output, tuple) else blended

    def blend_factor(self, adapter_names: Iterable[str], *, hard: bool | None = None) -> torch.Tensor | None:
        """
        The part of the layer's own output in what is passed on, of its input the rest: (1,), or (rows, 1) within
        `theta_per_row`; None where nothing blends.
        """
        gates = [self.gates(name).get(LAYER) for name in adapter_names]
        factors = [gate.features(hard=hard) for gate in gates if isinstance(gate, BlendGate)]
        return math.prod(factors[1:], start=factors[0]) if factors else None

    def _row_factors(self, adapter_names: list[str]) -> torch.Tensor | None:
        """(rows, 1), one adapter name per row."""
        return _stack([self.blend_factor([name]) for name in adapter_names])

    def gates(self, adapter_name: str) -> dict[str, SigmoidGate]:
        """What this adapter gates under a name: slot to gate; empty if the name has no gates here."""
        found: dict[str, SigmoidGate] = {}
        for slot in self.adapter_layer_names:
            modules = getattr(self, slot)
            if adapter_name in modules:
                found[slot] = modules[adapter_name]
        for slot, homes in self._gate_homes.items():
            for home in homes:
                if slot not in found and adapter_name in getattr(home, slot):
                    found[slot] = getattr(home, slot)[adapter_name]
        return found

    def input_factor(self, adapter_names: Iterable[str], *, hard: bool | None = None) -> torch.Tensor | None:
        """
        The product of the gates on the input: (in_features,), or (rows, in_features) within `theta_per_row`; None
        where there are none.
        """
        return _product([self.gates(name).get(UNITS) for name in adapter_names], hard)

    def output_factor(self, adapter_names: Iterable[str], *, hard: bool | None = None) -> torch.Tensor | None:
        """
        The product of the gates on the output: (1,), (features,) at a norm, with an axis of the rows in front within
        `theta_per_row`; None where there are none.
        """
        return _product([self.gates(name).get(slot) for name in adapter_names for slot in self.output_slots], hard)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        The wrapped module's output under the active gates.

        Args:
            x: (..., in_features), or (batch, in_channels, ...) for convolutions.

        Keyword Args:
            adapter_names (`list[str]`): one adapter name per row of the batch; `"__base__"` for none.
        """
        adapter_names = self._row_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            if adapter_names is not None:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            return self._base_output(x, self.merged_adapters, True, *args, **kwargs)
        if adapter_names is not None:
            if len(adapter_names) != len(x):
                raise ValueError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(adapter_names)} and {len(x)} respectively."
                )
            return self._forward_rows(x, adapter_names, *args, **kwargs)
        return self._gated(x, self.active_adapters, *args, **kwargs)

    def _gated(self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs, output = self.input_factor(adapter_names), self.output_factor(adapter_names)
        if inputs is not None and output is not None and scales_through(self.base_layer):
            inputs, output = inputs * output, None  # one pass less, and no output kept for the backward pass
        if inputs is not None:
            x = scaled(x, inputs, feature_dim(self.get_base_layer()))
        y = self._base_output(x, adapter_names, None, *args, **kwargs)
        return y if output is None else scaled(y, output.to(y.device))  # a shared gate may live on another device

    def _base_output(
        self, x: torch.Tensor, adapter_names: Iterable[str], hard: bool | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """What the wrapped module makes of x under the plans of some adapters; only a norm depends on them."""
        return self.base_layer(x, *args, **kwargs)

    def _forward_rows(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        names = sorted(set(adapter_names))
        rows = torch.tensor([names.index(name) for name in adapter_names], dtype=torch.long, device=x.device)
        inputs = _stack([self.input_factor([name]) for name in names])
        output = _stack([self.output_factor([name]) for name in names])
        dim = feature_dim(self.get_base_layer())
        if inputs is not None:
            x = scale_rows(x, inputs[rows], dim)
        y = self.base_layer(x, *args, **kwargs)
        return y if output is None else scale_rows(y, output[rows], dim)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Fold the gates into the wrapped module's weight and bias, in the dtypes they have.

        Args:
            safe_merge (`bool`): check the result for NaN and infinity before the weights are replaced.
            adapter_names (`list[str]`, *optional*): names to merge; the active ones if left out.

        Raises:
            BrokenGatesError: if the gates, or with `safe_merge` the folded weights, hold such values.
            UnsupportedModelError: if the weight is quantized.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.gates(name) and name not in self.head_maps:
                continue
            base = cast(Base, self.get_base_layer())
            check_unquantized(base)
            with torch.no_grad():
                factors = [self.input_factor([name], hard=True), self.output_factor([name], hard=True)]
                folded = fold_factors(base, *factors)
            checked = [factor for factor in factors if factor is not None] + (folded if safe_merge else [])
            if not all(torch.isfinite(tensor).all() for tensor in checked):
                raise BrokenGatesError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if not self._dense:
                self._dense = tuple(parameter.data for parameter in parameters_of(base))
            for parameter, tensor in zip(parameters_of(base), folded, strict=True):
                parameter.data = tensor
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the dense weight and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for parameter, dense in zip(parameters_of(cast(Base, self.get_base_layer())), self._dense, strict=True):
            parameter.data = dense.to(device=parameter.device, dtype=parameter.dtype)
        self._dense = ()
        self.merged_adapters.clear()

    def release(self) -> None:
        """Let go of the weights kept for `unmerge` and of other adapters: this one is taken off its module."""
        self._dense = ()
        self._gate_homes.clear()
        if self._blending is not None:
            self._blending.remove()
            self._blending = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the bare module stays loadable: its keys are those of `base_layer`, and it brings no gates.
        own = tuple(f"{prefix}{name}." for name in self._modules)
        bare = [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]
        for key in bare:
            state_dict[f"{prefix}base_layer.{key[len(prefix) :]}"] = state_dict.pop(key)
        if bare:
            for name, tensor in self.state_dict(prefix=prefix, keep_vars=True).items():
                if name.startswith(f"{prefix}hawada_"):
                    state_dict.setdefault(name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return "hawada." + super().__repr__()


def _product(gates: Iterable[SigmoidGate | None], hard: bool | None) -> torch.Tensor | None:
    product: torch.Tensor | None = None
    for gate in gates:
        if gate is not None and gate.is_factor:
            features = gate.features(hard=hard)
            product = features if product is None else product * features
    return product


def scaled(x: torch.Tensor, factor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """By one factor for all rows, (features,), or by one for each, (rows, features)."""
    return scale(x, factor, dim) if factor.ndim == 1 else scale_rows(x, factor, dim)


def _stack(factors: list[torch.Tensor | None]) -> torch.Tensor | None:
    """(names, features), ones where a name has no gates; None if none has."""
    known = next((factor for factor in factors if factor is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if factor is None else factor for factor in factors])
