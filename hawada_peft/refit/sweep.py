"""Layer after layer, the teacher beside the student: targets, moments, and the refitted projection."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch

from ..planning.plan import Plan
from ..processes import Reduce
from .layerwise import Stream, residual_gains
from .projections import Refit, as_projection, choose, new_moments
from .targets import block_on, targets_of

logger = logging.getLogger(__name__)


def refit_layers(
    teacher: Stream,
    student: Stream,
    plan: Plan,
    masks: Sequence[torch.Tensor | None],
    fit_count: int,
    dampings: Sequence[float],
    correction: float,
    coordinates: torch.Tensor | None,
    reduce: Reduce,
) -> Iterator[Refit]:
    """Refit layer after layer; the first `fit_count` batches are fitted to, the others choose the damping."""
    ends = [*plan.layers[1:], plan.dense.sizes()["num_hidden_layers"]]
    for layer in range(plan.layers[0]):
        teacher.advance(layer)
    for index, (layer, end) in enumerate(zip(plan.layers, ends, strict=True)):
        gains, dense_gains = residual_gains(student, index), residual_gains(teacher, layer)
        if gains is None or dense_gains is None:
            gains = dense_gains = None
        targets = targets_of(teacher, layer, end, dense_gains, coordinates)
        names = student.layout.attention_out(index), student.layout.ffn_out(index)
        for which, (name, wanted) in enumerate(zip(names, targets, strict=True)):
            module = as_projection(student.model.get_submodule(name), name)
            fit, held = new_moments(module), new_moments(module)
            kept: list[tuple[torch.Tensor, torch.Tensor]] = []
            for number, mask in enumerate(masks):
                inputs, stream = student.inputs_at(module, index, number, gains)
                added = wanted[number].output.float()
                if dense_gains is not None:
                    block = wanted[number].block
                    added = block_on(teacher, layer, number, which, stream, dense_gains) if block is None else block
                    added = added + wanted[number].dropped
                    added = added + correction * (wanted[number].output.float() - stream.float() - added)
                rows = slice(None) if mask is None else mask.flatten()
                moments = fit if number < fit_count else held
                moments.add(inputs.flatten(0, -2)[rows], added.flatten(0, -2)[rows])
                if gains is not None and which == 1:
                    kept.append((student.keep(inputs), student.keep(stream)))
            wanted.clear()
            gain = None if gains is None else gains[which]
            yield choose(name, module, fit, held, gain, dampings, reduce)
            for number, (inputs, stream) in enumerate(kept):  # what the layer gives, without another pass through it
                student.hidden[number] = student.keep(stream + gain * module(inputs))
        if gains is None:
            student.advance(index)
        logger.debug("layer %d of %d is refitted", index + 1, len(plan.layers))
