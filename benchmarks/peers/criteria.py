"""What criteria share: what flows through modules on calibration batches, and how an amount becomes a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import Layout

from .peer import Batch
from .surgery import ROUNDING, Keep, all_heads

See = Callable[[torch.Tensor, torch.Tensor], None]


def unlabelled(batch: Batch) -> Batch:
    """A batch without its labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def observe(model: PreTrainedModel, batches: Iterable[Batch], seen: Iterable[tuple[nn.Module, See]]) -> None:
    """Run batches; each module's function is given its first input and its output, once per batch."""
    hooks = [module.register_forward_hook(_hook(see)) for module, see in seen]
    try:
        for batch in batches:
            model(**unlabelled(batch))
    finally:
        for hook in hooks:
            hook.remove()


def _hook(see: See) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor | tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        see(inputs[0].detach(), (output[0] if isinstance(output, tuple) else output).detach())

    return hook


class Moments:
    """Running sums of a module's inputs, over tokens: (features,) in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums, self.squares = torch.zeros(()), torch.zeros(())

    def see(self, x: torch.Tensor, _: torch.Tensor) -> None:
        """Add a batch."""
        x = x.flatten(0, -2).double()
        self.sums, self.squares = self.sums.to(x.device) + x.sum(0), self.squares.to(x.device) + x.square().sum(0)
        self.tokens += len(x)

    @property
    def mean(self) -> torch.Tensor:
        """Of each feature."""
        return self.sums / self.tokens

    @property
    def variance(self) -> torch.Tensor:
        """Of each feature."""
        return (self.squares / self.tokens - self.mean.square()).clamp(min=0)


def left(total: int, amount: float, step: int = 1) -> int:
    """
    How many of `total` units stay if an amount of them goes: the nearest multiple of `step`, at least one step.

    Raises:
        ValueError: if the amount is not in [0, 1].
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"the amount to cut must lie in [0, 1], got {amount}")
    return min(total, max(step, step * round(total * (1 - amount) / step)))


def best(scores: torch.Tensor, number: int) -> list[int]:
    """The indices of the highest scores, ascending. Of equal ones the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:number].tolist())


def best_heads(layout: Layout, scores: torch.Tensor, per_group: int) -> list[int]:
    """The query heads with the highest scores, equally many in each KV group."""
    dense = layout.dense.heads_per_group
    groups = scores.reshape(-1, dense)
    return [group * dense + head for group, row in enumerate(groups) for head in best(row, per_group)]


def uniform(
    layout: Layout, amount: float, groups: Mapping[int, torch.Tensor], channels: Mapping[int, torch.Tensor]
) -> dict[int, Keep]:
    """Cut the same from every layer that has scores: whole KV groups, and FFN channels, the lowest first."""
    sizes = layout.dense.sizes()
    number, width = left(sizes["num_key_value_heads"], amount), left(sizes["intermediate_size"], amount, ROUNDING)
    return {
        layer: Keep(all_heads(layout, best(groups[layer], number)), best(channels[layer], width)) for layer in groups
    }


def heads_and_channels(layout: Layout, amount: float, heads: torch.Tensor, channels: torch.Tensor) -> Keep:
    """Cut an amount of a layer: query heads, equally many in each KV group, and FFN channels, the lowest first."""
    per_group = left(layout.dense.heads_per_group, amount)
    if layout.dense.heads_per_group == 1:  # each head is a group of its own
        chosen: Sequence[int] = best(heads, left(len(heads), amount))
    else:
        chosen = best_heads(layout, heads, per_group)
    return Keep(chosen, best(channels, left(len(channels), amount, ROUNDING)))
