"""The gates of a family's positions, and a plan's masks on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from ..errors import InvalidPlanError
from ..vanilla.family import HEADS, Layout
from .adapter import BLOCK, LAYER, UNITS
from .kinds import BlockGate, ChannelGate, GateStart, HeadGate, HiddenGate, SigmoidGate
from .stream_basis import BasisGate

Masks = list[tuple[SigmoidGate, torch.Tensor | None]]


def family_gates(
    layout: Layout, axis: str, features: int, *, kinds: Collection[str], group_size: int, start: GateStart
) -> dict[str, SigmoidGate]:
    """
    New gates for one end of a layer.

    Args:
        layout: the model's row and sizes.
        axis: `"heads"` at the attention's output projection, `"ffn"` at the FFN's.
        features: input features of the module there.
        kinds: what is gated: of `"heads"`, `"ffn"`, `"blocks"`, `"layers"`.
        group_size: channels per gate.
        start: how the gates start.

    Returns:
        Slot to gate.
    """
    gates: dict[str, SigmoidGate] = {}
    if axis in kinds and axis == HEADS:
        gates[UNITS] = HeadGate(features // layout.head_dim, layout.head_dim, start=start, relative=True)
    elif axis in kinds:
        gates[UNITS] = ChannelGate(features, group_size, start=start, relative=True)
    if "blocks" in kinds:
        gates[BLOCK] = BlockGate(start=start, relative=True)
    if "layers" in kinds:
        gates[LAYER] = BlockGate(start=start, relative=True)
    return gates


def stream_gate(layout: Layout, *, centred: bool | None, group_size: int, start: GateStart) -> HiddenGate:
    """
    A new gate on the residual stream.

    Args:
        layout: the model's row and sizes.
        centred: for one on directions of the stream, whether LayerNorms read it; None for one on its channels.
        group_size: neighbouring units per gate.
        start: how the gates start.
    """
    if centred is None:
        return HiddenGate(layout.hidden_size, group_size, start=start, relative=True)
    sites = len(layout.norms)
    return BasisGate(layout.hidden_size, group_size, sites=sites, centred=centred, start=start, relative=True)


def masks_of(gates: Mapping[str, SigmoidGate], kept: Sequence[int] | None, total: int, what: str) -> Masks:
    """
    What a plan makes of the gates at one end of a layer.

    Args:
        gates: slot to gate.
        kept: the units that stay; None if the whole layer goes.
        total: units at this end.
        what: the axis and layer, for messages.

    Returns:
        A mask for every gate; None leaves it open.

    Raises:
        InvalidPlanError: if there is no gate for what is to be closed, or one gate for units that stay and go.
    """
    whole = gates.get(LAYER, gates.get(BLOCK))
    if kept is None:
        if whole is None:
            raise InvalidPlanError(
                f"the plan drops the layer of {what}, which has no gates on `layers` or `blocks`; add 'layers' to the "
                "config's `gates`"
            )
        return [(gate, torch.zeros(1, dtype=torch.bool) if gate is whole else None) for gate in gates.values()]
    units = torch.zeros(total, dtype=torch.bool)
    units[list(kept)] = True
    masks: Masks = [(gate, None) for slot, gate in gates.items() if slot != UNITS]
    if UNITS not in gates:
        if not units.all():
            raise InvalidPlanError(
                f"the plan closes {what}, where there are no gates; add them to the config's `gates`"
            )
        return masks
    gate = gates[UNITS]
    grouped = units.reshape(gate.units, -1)
    if (grouped.any(1) != grouped.all(1)).any():
        raise InvalidPlanError(
            f"the plan splits groups of {total // gate.units} that share a gate in {what}; make it with `model.plan`, "
            "or use gates of group_size=1"
        )
    return [*masks, (gate, None if units.all() else grouped.all(1))]
