"""What `save_pretrained` makes of a model's tensors: other names, and stacked experts one by one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Piece:
    """
    A tensor in a file as a part of a model's.

    Args:
        name (`str`): of the model's.
        entry (`int`, *optional*): the one along its first dimension; left out, the tensor is all of it.
        start (`int`): the first of this entry's rows.
        end (`int`): behind the last.
    """

    name: str
    entry: int | None = None
    start: int = 0
    end: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a file holds of a model's tensor."""
        return tensor if self.entry is None else tensor[self.entry, self.start : self.end]


def stored_form(model: PreTrainedModel, *, tied: bool = False) -> dict[str, torch.Tensor]:
    """
    What `save_pretrained` writes of a model, on the meta device: key in the file to a tensor of its shape and dtype,
    in the order of writing.

    Args:
        model: may be on the meta device.
        tied: also the tied tensors that are not written.
    """
    return revert_weight_conversion(model, _state(model, tied))


def stored_pieces(model: PreTrainedModel, *, tied: bool = False) -> dict[str, Piece]:
    """
    What the tensors are that `save_pretrained` writes: key in the file to the model's tensor, or the part of it.

    Which part is found by having transformers store numbers that say where they come from.

    Args:
        model: may be on the meta device.
        tied: also the tied tensors that are not written.

    Raises:
        UnsupportedModelError: if the files hold weights in yet another form (permuted, rescaled).
    """
    state = _state(model, tied)
    names = {id(tensor): name for name, tensor in state.items()}
    form = revert_weight_conversion(model, dict(state))
    found = {key: Piece(names[id(tensor)]) for key, tensor in form.items() if id(tensor) in names}
    if len(found) < len(form):
        found = _apart(model, state, form, found)
    return {key: found[key] for key in form}


def _state(model: PreTrainedModel, tied: bool) -> dict[str, torch.Tensor]:
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    if not tied:
        state = remove_tied_weights_from_state_dict(state, model)
    copies = {id(tensor): tensor.to("meta") for tensor in state.values()}  # tied ones stay one
    return {name: copies[id(tensor)] for name, tensor in state.items()}


def _apart(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    form: Mapping[str, torch.Tensor],
    found: Mapping[str, Piece],
) -> dict[str, Piece]:
    """The pieces of weights that are stacked in the model: each row is a number, and each number a row."""
    coded, offset = dict(state), 0
    entries: list[tuple[str, int]] = []
    starts: list[int] = []
    for name, tensor in state.items():
        if tensor.ndim == 3:
            count, rows = tensor.shape[:2]
            coded[name] = torch.arange(offset, offset + count * rows).reshape(count, rows, 1)
            entries += [(name, entry) for entry in range(count)]
            starts += range(offset, offset + count * rows, rows)
            offset += count * rows
    pieces = dict(found)
    for key, codes in revert_weight_conversion(model, coded).items():
        if key in found:
            continue
        numbers = codes.flatten()
        known = not codes.is_meta and codes.ndim == 2 and bool((numbers.diff() == 1).all())
        at = bisect_right(starts, int(numbers[0])) - 1 if known else 0
        name, entry = entries[at] if entries else ("", 0)
        if not known or tuple(form[key].shape) != (len(numbers), state[name].shape[2]):
            raise UnsupportedModelError(
                f"transformers stores {key} of {type(model).__name__} in another form than the model has it: use "
                "`merge_and_unload` and `save_pretrained`"
            )
        start = int(numbers[0]) - starts[at]
        pieces[key] = Piece(name, entry, start, start + len(numbers))
    return pieces
