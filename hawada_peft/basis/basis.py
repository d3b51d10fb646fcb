"""A basis of the residual stream, and the change of coordinates that keeps some of its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError
from ..gates.bases import BasisGate, helmert, scale_at
from ..gates.placement import NO_BASIS, NO_CHANNELS
from ..gates.reading import hidden_gate
from ..planning.plan import Plan
from ..vanilla.family import Layout
from .marks import check_marks, stream_norms
from .parts import stream_map
from .turn import Lookup, Turn


@dataclass(frozen=True)
class Basis:
    """
    Directions of the residual stream, in descending order of importance.

    Args:
        vectors (`Tensor`): (features, units), orthonormal columns. Where LayerNorms read the stream the first is the
            mean, which they do not see, and the others sum to zero.
        scales (`Tensor`): (widths, sites), the factor of each norm when only the first units are kept, by the parts of
            them in `WIDTHS`.
        marks (`Tensor`): (sites,), by which the model it was found on is known again (`weight_marks`).
        centred (`bool`): whether LayerNorms read the stream.
    """

    vectors: torch.Tensor
    scales: torch.Tensor
    marks: torch.Tensor
    centred: bool

    def cpu(self) -> Basis:
        """The same with its tensors on the CPU."""
        return replace(self, vectors=self.vectors.cpu(), scales=self.scales.cpu(), marks=self.marks.cpu())

    @property
    def nbytes(self) -> int:
        """Bytes that it adds to an adapter."""
        return sum(tensor.numel() * 4 for tensor in (self.vectors, self.scales, self.marks))


def turn_of(
    model: PreTrainedModel,
    layout: Layout,
    basis: Basis,
    kept: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    lookup: Lookup | None = None,
) -> Turn:
    """
    The change of coordinates to some directions of a basis.

    With U the kept directions it is `x @ U`; where LayerNorms read the stream `x @ U H^T`, with H the basis of the
    vectors that sum to zero (`helmert`), so that a narrow LayerNorm's own mean is zero. A narrow norm does not know
    how much of the stream is cut, nor that what is left is not quite what it should be: a factor for each norm, by
    least squares, brings its output to the dense one's (`fit_scales`).

    Args:
        model: the dense vanilla model, on any device.
        layout: its family row and sizes.
        basis: of its stream.
        kept: the units that stay, rising; all if left out.
        factor: what each unit is multiplied by where the stream is read, (units,); nothing if left out.
        lookup: gives the model's tensors by name, if it has none itself.

    Raises:
        IncompatibleBaseError: if the basis was found on another model.
        InvalidPlanError: if the mean is not among the kept units of a centred basis.
        UnsupportedModelError: as `stream_map`.
    """
    weights = [(lookup or model.get_parameter)(f"{name}.weight") for name in layout.norms]
    check_marks(layout, weights, basis.marks)
    units = torch.arange(layout.hidden_size) if kept is None else kept.cpu()
    vectors = basis.vectors.detach().cpu()
    wide = torch.promote_types(torch.promote_types(vectors.dtype, model.dtype), torch.float32)
    write = vectors[:, units].to(wide)
    gains = torch.ones(len(units), dtype=wide) if factor is None else factor.detach().cpu()[units].to(wide)
    table = basis.scales.detach().cpu()
    scales = torch.ones_like(table[0]) if kept is None else scale_at(table, len(units) / len(vectors))
    scales = scales.to(wide)[:, None]
    constant = bool((weights[-1] == weights[-1][0]).all())
    tied = is_tied(model) and constant
    read, factors = write, scales * gains
    if basis.centred:
        if units[0] != 0:
            raise InvalidPlanError(
                "the plan removes unit 0 of the residual stream, its mean, which a LayerNorm always takes off: keep "
                "it, or make the plan with `model.plan`"
            )
        flat = helmert(len(units), dtype=wide).T
        write = (write - write.mean(0))[:, 1:]
        write, read, factors = write @ flat, (write * gains[1:]) @ flat, scales.expand(-1, len(units))
        tied = tied and bool((gains == 1).all())
    return Turn(layout, stream_map(layout), write, read, factors, tied)


def rows_untied(model: PreTrainedModel, layout: Layout, lookup: Lookup | None = None) -> int:
    """
    The rows of the output projection that a turned model has and the dense one has not; 0 if nothing is untied.

    Args:
        model: the dense model.
        layout: its family row and sizes.
        lookup: gives the model's tensors by name, if it has none itself.
    """
    norm = cast(torch.Tensor, stream_norms(model, layout)[-1].weight)
    weight = norm if lookup is None else lookup(f"{layout.norms[-1]}.weight")
    if not is_tied(model) or bool((weight == weight[0]).all()):
        return 0
    return len(cast(torch.Tensor, model.get_output_embeddings().weight))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the embedding is the output projection as well."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def basis_gate(base: nn.Module, layout: Layout, adapter_name: str) -> BasisGate | None:
    """An adapter's gate on directions of the stream, if it has one."""
    gate = hidden_gate(base, layout, adapter_name)
    return gate if isinstance(gate, BasisGate) else None


def gate_basis(gate: BasisGate) -> Basis:
    """The basis that a gate acts in."""
    return Basis(gate.vectors, gate.scales, gate.marks, gate.centred)


def moved_stream(base: nn.Module, layout: Layout, adapter_name: str) -> bool:
    """Whether an adapter scales directions of the residual stream, which no norm's weight can take up."""
    gate = basis_gate(base, layout, adapter_name)
    return gate is not None and bool((gate.soft() != 1).any())


def stream_basis(
    base: nn.Module,
    layout: Layout,
    adapter_names: Sequence[str],
    plan: Plan,
    *,
    fold: bool,
    given: Basis | None = None,
) -> tuple[Basis, torch.Tensor | None] | tuple[None, None]:
    """
    The basis in which adapters gate the residual stream, if they do and it matters, and their factors.

    Args:
        base: the base model with adapters in it.
        layout: its family row and sizes.
        adapter_names: whose gates.
        plan: what stays.
        fold: whether soft values are folded in.
        given: the basis of a plan that was made without the adapters, for those that do not gate the stream.

    Raises:
        InvalidPlanError: if the plan keeps directions and the adapters gate channels, or the reverse; if several
            adapters have bases, or another one than the plan's.
    """
    gates = [gate for name in adapter_names if (gate := basis_gate(base, layout, name)) is not None]
    if given is not None and plan.rotated:
        if not any(hidden_gate(base, layout, name) is not None for name in adapter_names):
            return given, None
        if gates and not torch.allclose(gates[0].vectors.cpu().float(), given.vectors.float(), atol=1e-4):
            raise InvalidPlanError(
                "the plan keeps directions of another basis than the adapter's: use the adapter that it was made with"
            )
    if plan.hidden is not None and plan.rotated != bool(gates):
        raise InvalidPlanError(NO_BASIS if plan.rotated else NO_CHANNELS)
    if not gates:
        return None, None
    if len(adapter_names) > 1:
        raise InvalidPlanError(
            f"the adapters {list(adapter_names)} gate the residual stream in different bases: merge one of them at a "
            "time"
        )
    factor = gates[0].soft() if fold else None
    kept = slice(None) if plan.hidden is None else list(plan.hidden)
    if factor is not None and bool((factor[kept] == 1).all()):
        factor = None
    if plan.hidden is None and factor is None:
        return None, None
    return gate_basis(gates[0]), factor
