"""The norms that read the residual stream, and by what of them a model is known again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import IncompatibleBaseError, UnsupportedModelError
from ..vanilla.family import Layout


def stream_norms(model: nn.Module, layout: Layout) -> list[nn.Module]:
    """The norms that read the stream, from below their adapters."""
    found = [model.get_submodule(name) for name in layout.norms]
    return [norm.get_base_layer() if isinstance(norm, BaseTunerLayer) else norm for norm in found]


def weight_marks(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number of each norm's weight, by which it is told from others, `w . cos(0, 1, ...)`: (sites,), on the CPU."""
    wide = [weight.detach().cpu().double() for weight in weights]
    return torch.stack([(each @ torch.arange(len(each), dtype=each.dtype).cos()).float() for each in wide])


def is_centred(model: nn.Module, layout: Layout) -> bool:
    """Whether LayerNorms read the stream, which do not see its mean."""
    return isinstance(stream_norms(model, layout)[0], nn.LayerNorm)


def check_marks(layout: Layout, weights: Sequence[torch.Tensor], marks: torch.Tensor) -> None:
    """
    That a model is the one a basis was found on, as far as its norms' weights tell.

    Raises:
        IncompatibleBaseError: if they differ by more than rounding.
    """
    if not marks.any():  # of a basis that was never set
        return
    found, expected = weight_marks(weights), marks.detach().float().cpu()
    if len(found) != len(expected):
        raise IncompatibleBaseError(
            f"the basis of the residual stream was found on another model: {len(expected)} norms read its stream, "
            f"here {len(found)}. A base that was cut since needs a basis of its own: `init_basis`"
        )
    length = torch.stack([weight.detach().cpu().float().norm() for weight in weights])
    far = (found - expected).abs() > 0.005 * length.clamp(min=1e-3)  # above the rounding of another dtype
    if far.any():
        name = layout.norms[int(far.nonzero()[0])]
        raise IncompatibleBaseError(
            f"the basis of the residual stream was found on another model: the weight of {name!r} is another one. A "
            "base that was rotated, trained or cut since needs a basis of its own: `init_basis`"
        )


def check_unshared(model: PreTrainedModel) -> None:
    """
    Check that no weights are shared but those of the embeddings: folded and rotated they would be several.

    Raises:
        UnsupportedModelError: with the names of what is shared.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    known = {id(parameter) for module in embeddings if module is not None for parameter in module.parameters()}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and id(parameter) not in known:
            raise UnsupportedModelError(
                f"{other!r} and {name!r} are one tensor, which the family's row does not know: the residual stream "
                "cannot be rotated. Give each its own, `module.weight = nn.Parameter(module.weight.clone())`, or cut "
                "other axes"
            )
