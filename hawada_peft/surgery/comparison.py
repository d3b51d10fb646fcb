"""
What a slim model must compute, and whether it does.

Long because it also says which of what differs is rounding, and what a model computes with beside its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..discovery.inputs import example_inputs
from ..errors import BrokenGatesError, HawAdaError, InvalidPlanError, VerificationError
from ..files.verify import TOLERANCE, compare
from ..gates.adapter import GateAdapter
from ..gates.kinds import SigmoidGate
from ..vanilla.batches import Batch, check_batch
from ..vanilla.heads import is_bare
from ..vanilla.outputs import outputs_of
from .dense import put_back
from .source import StreamChange, below_at

STATES = "last_hidden_state"
"""The output of a model without a head that lies in the residual stream."""

ROUNDED = 2.0**-8
"""Buffers that differ by less than this part were cast to bfloat16 and back."""

LENGTH = "max_seq_len_cached"
"""Where transformers notes the longest input, of which rotary frequencies are kept."""


@dataclass(frozen=True)
class Reference:
    """
    What the gated model computed under its plan: what the slim model has to compute before it is refitted or trained.

    Args:
        inputs: keyword arguments of the forward pass.
        outputs: all that it gives, by name; as `outputs_of` says.
    """

    inputs: Batch
    outputs: Mapping[str, torch.Tensor]


def reference_of(
    base: PreTrainedModel, adapter_names: Sequence[str], inputs: Batch | None, *, fresh: PreTrainedModel | None
) -> Reference:
    """
    Run a gated model once, in evaluation mode, as its masks are set. It changes: call it within `put_back`.

    Args:
        base: with gates in it.
        adapter_names: whose gates count.
        inputs: keyword arguments of the forward pass; drawn at random if left out.
        fresh: the dense model as its class makes it, if it does. Buffers that no file holds are taken from it where a
            cast has rounded them or a long input has changed them.

    Raises:
        BadDataError: if the model cannot take the inputs.
        HawAdaError: if the model does not run on drawn inputs.
    """
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(True)
            module.set_adapter(list(adapter_names))
    for name, module in [] if fresh is None else fresh.named_modules():
        used = below_at(base, name)
        long = vars(used).get(LENGTH, 0) != vars(module).get(LENGTH, 0)
        if long:
            setattr(used, LENGTH, getattr(module, LENGTH))
        for key in module._non_persistent_buffers_set & module._buffers.keys():
            exact = module._buffers[key]
            if long or _rounded(used._buffers.get(key), exact):
                used._buffers[key] = exact
    if inputs is not None:
        check_batch(base, inputs)
        return Reference(inputs, outputs_of(base, inputs))
    try:
        drawn = example_inputs(base)
        return Reference(drawn, outputs_of(base, drawn))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise HawAdaError(
            f"{type(base).__name__} does not run on inputs drawn at random ({type(error).__name__}: {error}), so the "
            "slim model cannot be compared with it: pass `inputs`, keyword arguments of its forward pass, or "
            "`verify=False`"
        ) from error


def _rounded(used: torch.Tensor | None, exact: torch.Tensor | None) -> bool:
    if exact is None or used is None or used.shape != exact.shape or not exact.is_floating_point():
        return False
    return bool((used.double() - exact.double()).abs().le(ROUNDED * exact.double().abs()).all())


def check_computes(
    model: PreTrainedModel,
    reference: Reference,
    base: nn.Module,
    fresh: nn.Module | None,
    turn: StreamChange | None = None,
    hidden: Sequence[int] | None = None,
) -> None:
    """
    Compare what a slim model computes with its reference.

    Args:
        model: the slim model; left as it is.
        reference: of the gated model.
        base: the gated model, for what else is in it.
        fresh: the dense model as its class makes it.
        turn: the slim model's coordinates, if they are new ones. Norms that compute in float32
            round other numbers then, whatever the dtype; hidden states are compared in the dense coordinates.
        hidden: the channels of the residual stream that stay, where the slim model's hidden states are narrower.

    Raises:
        VerificationError: if they differ beyond rounding; it names what was found in the gated model that a slim model
            cannot have.
    """
    with put_back(model, always=True):
        found = outputs_of(model, reference.inputs)
    expected, tolerance = dict(reference.outputs), None
    if turn is not None:
        tolerance = turned_tolerance(model.dtype, model.device)
    if is_bare(model) and STATES in found:
        if turn is not None and turn.write is not None and fresh is not None:
            found[STATES] = turn.restored(fresh, found[STATES])
        elif hidden is not None:
            narrow = [name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape]
            expected |= {name: expected[name][..., list(hidden)] for name in {STATES, *narrow}}  # a pooled one, too
    try:
        compare(found, expected, model.dtype, tolerance)
        return
    except VerificationError as error:
        gap = str(error)
    causes = [f"the weight {name} holds NaN or infinite values" for name in _broken(base)]
    causes += [] if fresh is None else differences(base, fresh)
    told = f"Found in the gated model: {'; '.join(causes[:5])}" if causes else "Nothing in the gated model explains it"
    raise VerificationError(
        f"the slim model computes something else than the gated one: {gap}. {told}. The gated model is as it was; "
        "`verify=False` gives the slim model all the same"
    )


def turned_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """
    What counts as rounding between two coordinates of the residual stream.

    Norms compute in float32, whatever the dtype. On a GPU products of float32 may be those of TF32, whose mantissa is
    that of float16; whether they are, torch does not always say.
    """
    least = torch.float16 if device.type == "cuda" and dtype == torch.float32 else torch.float32
    return max(TOLERANCE.get(dtype, 0.0), TOLERANCE[least])


def differences(base: nn.Module, fresh: nn.Module) -> list[str]:
    """
    What a model computes with beside its weights and its class: hooks, replaced code, other modules, edited settings.

    Args:
        base: with adapters in it.
        fresh: a model of the same class, built from the same config.
    """
    found = []
    for name, wanted in fresh.named_modules():
        try:
            module = below_at(base, name)
        except AttributeError:
            found.append(f"no module {name!r}")
            continue
        what = name or type(module).__name__
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"forward hooks on {what}")
        if "forward" in vars(module) and "_hf_hook" not in vars(module):
            found.append(f"a replaced forward of {what}")
        if type(module) is not type(wanted):
            found.append(f"{what} is a {type(module).__name__}, not a {type(wanted).__name__}")
        added = [key for key, child in module._modules.items() if child is not None and key not in wanted._modules]
        found += [f"the added module {key!r} in {what}" for key in added]
        found += [f"{what}.{key} is {mine!r}, not {theirs!r}" for key, mine, theirs in _settings(module, wanted)]
        found += [f"the buffer {what}.{key} was changed" for key in _buffers(module, wanted)]
    return found


def _settings(module: nn.Module, wanted: nn.Module) -> list[tuple[str, object, object]]:
    plain = (bool, int, float, str)
    mine, theirs = vars(module), vars(wanted)
    return [
        (key, mine[key], value)
        for key, value in theirs.items()
        if not key.startswith("_") and key != "training" and type(value) in plain and mine.get(key, value) != value
    ]


def _buffers(module: nn.Module, wanted: nn.Module) -> list[str]:
    keys = wanted._non_persistent_buffers_set
    pairs = {key: (module._buffers.get(key), wanted._buffers.get(key)) for key in keys}
    return [
        key
        for key, (mine, theirs) in pairs.items()
        if mine is not None and theirs is not None and (mine.shape != theirs.shape or not mine.equal(theirs.to(mine)))
    ]


def check_finite(model: nn.Module) -> None:
    """
    Refuse weights that are no numbers.

    Raises:
        BrokenGatesError: naming the first parameter that holds NaN or infinity.
    """
    for name in _broken(model):
        raise BrokenGatesError(
            f"the weight {name!r} of the slim model holds NaN or infinite values: the gates, LoRA or "
            "the dense model's weight are broken. Nothing has been changed"
        )


def _broken(model: nn.Module) -> Iterator[str]:
    return (name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all())


def check_binary(base: nn.Module, adapter_names: Sequence[str]) -> None:
    """
    Refuse soft values that no weight can take up: of gates that are binary under a plan, without one.

    Raises:
        InvalidPlanError: if there are some that no plan has made binary.
    """
    for name, module in base.named_modules():
        gates = [gate for each in adapter_names for gate in _own_gates(module, each) if gate.binary]
        soft = [value for gate in gates if (value := gate.factor(hard=True).detach()).ne(1).any()]
        if soft:
            raise InvalidPlanError(
                f"gates at {name} are at {float(soft[0].min()):.3g}, and no weight can take that up: it blends a "
                "layer's output and input, or weighs experts against each other. Apply a plan, under which layers "
                "and experts stay or go (`model.apply_plan(model.plan(keep_ratio={'layers': 0.75}))`)"
            )


def _own_gates(module: nn.Module, adapter_name: str) -> Sequence[SigmoidGate]:
    return [*module.gates(adapter_name).values()] if isinstance(module, GateAdapter) else []


def check_gates(base: nn.Module) -> None:
    """
    Refuse gates that are no numbers.

    Raises:
        BrokenGatesError: naming the first one.
    """
    for name, module in base.named_modules():
        if isinstance(module, SigmoidGate) and not torch.isfinite(module.theta).all():
            raise BrokenGatesError(
                f"the gates {name} hold NaN or infinite values: training diverged. Load an earlier checkpoint, or "
                "lower the learning rate"
            )
