"""What the output projections of a slim layer are refitted to: what the dense model does there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UnsupportedModelError
from .layerwise import Gains, Keep, Stream


@dataclass(frozen=True)
class Target:
    """
    Where the teacher arrives on one batch.

    Args:
        output: (batch, positions, hidden_size), its residual stream after a block; without gains the output of the
            block's projection.
        dropped: what layers that the slim model does not have added to that, float32; 0 if there are none.
        block: what the block added to the teacher's stream, float32, where that is not the student's in width.
    """

    output: torch.Tensor
    dropped: torch.Tensor | float = 0.0
    block: torch.Tensor | None = None

    def narrowed(self, coordinates: torch.Tensor, block: torch.Tensor, keep: Keep) -> Target:
        """In the coordinates of a narrower stream."""
        output, block = self.output.float(), block.float()
        matrix = coordinates.to(output)
        dropped = self.dropped @ matrix if isinstance(self.dropped, torch.Tensor) else self.dropped
        return Target(keep(output @ matrix), dropped, keep(block @ matrix))


def targets_of(
    teacher: Stream, layer: int, end: int, gains: Gains, coordinates: torch.Tensor | None
) -> tuple[list[Target], list[Target]]:
    """
    Take the teacher through a layer, and through those after it up to `end`, which the slim model does not have: what
    they add is for the FFN of the layer before them to make up for.

    Returns:
        Per batch the target of the attention, and that of the FFN.
    """
    if gains is None and coordinates is not None:
        raise UnsupportedModelError(
            f"layer {layer} does not add its blocks to the residual stream: what is narrower cannot be refitted to it"
        )
    keep = teacher.keep
    attention, ffn, blocks = [], [], []
    for number, stream in enumerate(teacher.hidden):
        output, from_attention, from_ffn = teacher.outputs(layer, number)
        if gains is not None and coordinates is not None:
            blocks.append((keep(gains[0] * from_attention), keep(gains[1] * from_ffn)))
        output = keep(output)
        attention.append(Target(keep(from_attention if gains is None else stream + gains[0] * from_attention)))
        ffn.append(Target(keep(from_ffn) if gains is None else output))
        teacher.hidden[number] = output
    for dropped in range(layer + 1, end):
        teacher.advance(dropped)
    if gains is not None and end > layer + 1:
        arrived = zip(teacher.hidden, ffn, strict=True)
        ffn = [Target(hidden, keep(hidden.float() - before.output.float())) for hidden, before in arrived]
    if coordinates is None:
        return attention, ffn
    return (
        [target.narrowed(coordinates, block, keep) for target, (block, _) in zip(attention, blocks, strict=True)],
        [target.narrowed(coordinates, block, keep) for target, (_, block) in zip(ffn, blocks, strict=True)],
    )


def block_on(
    teacher: Stream,
    layer: int,
    number: int,
    which: int,
    stream: torch.Tensor,
    gains: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What the teacher's attention (0) or FFN (1) would add to the student's stream, in float32."""
    attention, ffn = teacher.attention_out(layer), teacher.ffn_out(layer)
    if which == 0:
        output = teacher.output_on(attention, layer, number, stream)
    else:  # the stream already holds what the student's attention added
        output = teacher.output_on(ffn, layer, number, stream, silent=attention)
    return gains[which].float() * output.float()
