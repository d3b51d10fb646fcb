"""Second moments of what the norms pass on, and of the loss's gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import HawAdaError
from ..gates.hidden import plain_norm
from ..progress import Progress, progress_bar
from ..vanilla.batches import Batch, check_batch, position_mask, without_labels
from ..vanilla.family import Layout
from ..vanilla.heads import head_of
from ..vanilla.mode import evaluating
from ..vanilla.outputs import get_student_logits
from .marks import stream_norms

MOMENTS = "moments of the stream"
"""What it is shown as."""

ENTRIES = 2**23
"""Entries of all second moments of one kind together; sites are summed to groups of neighbours above that."""


@dataclass(frozen=True)
class Moments:
    """
    Args:
        stream: (groups, features, features), sums of n n^T over positions, n what a norm makes before its weight.
        gradient: (groups, features, features), sums of g g^T, g the gradient by n of the loss of drawn targets; None
            if none were taken.
        positions: that were counted.
    """

    stream: torch.Tensor
    gradient: torch.Tensor | None
    positions: int

    def check(self) -> Moments:
        """
        Itself.

        Raises:
            HawAdaError: if nothing was counted, or something is not finite.
        """
        if self.positions == 0:
            raise HawAdaError("no calibration batches were given; pass at least one")
        for what, total in (("the residual stream", self.stream), ("the loss's gradients", self.gradient)):
            if total is not None and not torch.isfinite(total).all():
                raise HawAdaError(
                    f"{what} on the calibration batches holds NaN or infinity; check the model's weights and the data"
                )
        return self


def groups_of(layout: Layout) -> int:
    """Into how many groups of neighbours the norms of a model are taken."""
    return min(len(layout.norms), max(1, ENTRIES // layout.hidden_size**2))


def collect_moments(
    model: nn.Module, layout: Layout, batches: Sequence[Batch], *, seed: int = 0, progress: Progress | None = None
) -> Moments:
    """
    One forward and one backward pass per batch.

    The loss is that of targets drawn from the model's own predictions (the true Fisher), whatever its head predicts.
    Sums are float32, float64 for a float64 model.

    Args:
        model: dense, in any mode; adapters in it are not to be active. Its weights get no gradients.
        layout: its family row and sizes.
        batches: keyword arguments of its forward pass; labels are left out, and padding does not count.
        seed: of the draws, the same on every device.
        progress: makes a progress bar.

    Raises:
        HawAdaError: if there are no batches, or something is not finite.
    """
    size, sites, groups = layout.hidden_size, len(layout.norms), groups_of(layout)
    device, dtype = kind_of(model)
    sums = [torch.zeros(groups, size, size, device=device, dtype=dtype) for _ in range(2)]
    generator, positions = torch.Generator().manual_seed(seed), 0
    for batch in progress_bar(progress, iterable=batches, desc=MOMENTS, leave=False):
        check_batch(model, batch)
        inputs = without_labels(batch, device)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(
            site: int,
            norm: nn.Module,
            x: torch.Tensor,
            output: torch.Tensor,
            found: list[tuple[torch.Tensor, torch.Tensor]] = found,
        ) -> torch.Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            found.append((plain_norm(norm, x.detach()), output))
            return output

        with torch.enable_grad(), watching(model, layout, keep):
            loss = _drawn_loss(model, inputs, generator)
            gradients = torch.autograd.grad(loss, [output for _, output in found])
        norms: Any = stream_norms(model, layout)
        for site, ((plain, _), gradient) in enumerate(zip(found, gradients, strict=True)):
            weight = norms[site].weight.detach()
            group = site * groups // sites
            for total, tensor in zip(sums, (plain, gradient * weight), strict=True):
                flat = counted(tensor, inputs).to(dtype)
                total[group].addmm_(flat.T, flat)
        positions += len(counted(found[0][0], inputs))
    return Moments(sums[0], sums[1], positions).check()


Watch = Callable[[int, nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a site, its norm, the norm's input and its output: the output that the model goes on with."""


@contextmanager
def watching(model: nn.Module, layout: Layout, watch: Watch) -> Iterator[None]:
    """Call `watch` at every norm that reads the stream, in evaluation mode."""
    hooks, busy = [], list[int]()
    for site, module in enumerate(stream_norms(model, layout)):

        def hook(norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor, site: int = site) -> Any:
            if busy:
                return None  # `watch` calls the norm itself
            busy.append(site)
            try:
                return watch(site, norm, args[0], output)
            finally:
                busy.clear()

        hooks.append(module.register_forward_hook(hook))
    try:
        with evaluating(model):
            yield
    finally:
        for handle in hooks:
            handle.remove()


def kind_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """A model's device, and the dtype in which its sums are formed."""
    parameter = next(model.parameters())
    return parameter.device, torch.promote_types(parameter.dtype, torch.float32)


def counted(tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of (batch, positions, features) the positions that hold data and not padding: (counted, features)."""
    flat, mask = tensor.flatten(0, -2), position_mask(batch, tensor.shape[:-1])
    return flat if mask is None else flat[mask.flatten()]


def _drawn_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """The negative log-likelihood of targets that are drawn by a model's own predictions: ()."""
    outputs = get_student_logits(model, batch)
    head, flat = head_of(model, outputs), counted(outputs, batch)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return head.surprise(flat, head.draw(flat.detach(), generator)).sum()
