"""
SliceGPT (Ashkboos et al., ICLR 2024): the residual stream in its principal components, the minor ones deleted.

Every norm becomes an RMS norm without a scale, which commutes with rotations; what it had besides goes into the
linears beside it. Each block then reads and writes the stream in a basis of its own, and the residual path between two
bases is one small matrix, the shortcut.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .peer import Batch, Peer, Prepared, Work
from .places import Places, places_of, within

MULTIPLE = 8
"""Widths are multiples of it, as `round_interval` in the published code."""

ATTENTION_IN = ("q_proj", "k_proj", "v_proj")


class _Reached(Exception):
    """The first layer is reached: what comes after it is not needed."""


class SlicedLayer(nn.Module):
    """A layer with a matrix on each of its residual paths; takes and gives (batch, positions, width)."""

    def __init__(self, layer: nn.Module, places: Places, norms: list[nn.Module], shortcuts: list[nn.Module]):
        super().__init__()
        self.attention_norm, self.ffn_norm = norms
        self.attention, self.ffn = within(layer, (places.attention, places.ffn))
        self.attention_shortcut, self.ffn_shortcut = shortcuts

    def mix(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The attention's half."""
        mixed = self.attention(self.attention_norm(hidden_states), *args, **kwargs)[0]
        return self.attention_shortcut(hidden_states) + mixed

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The FFN's half."""
        return self.ffn_shortcut(hidden_states) + self.ffn(self.ffn_norm(hidden_states))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.transform(self.mix(hidden_states, *args, **kwargs))


def sliced_width(hidden_size: int, amount: float) -> int:
    """Features of the stream that stay."""
    return max(MULTIPLE, hidden_size - MULTIPLE * round(amount * hidden_size / MULTIPLE))


@torch.no_grad()
def slice_model(model: PreTrainedModel, batches: list[Batch], amount: float) -> PreTrainedModel:
    """
    Rotate and slice a teacher in place.

    Args:
        model: float32, in eval mode. It ends with untied embeddings.
        batches: calibration inputs, on its device.
        amount: share of the residual stream's features that is deleted.

    Returns:
        The same object: the stock class, with narrower layers that have shortcuts.
    """
    places, full = places_of(model), model.config.hidden_size
    width = sliced_width(full, amount)
    layers = model.get_submodule(places.layers)
    eps = _fold_norms(model, places)
    streams, calls = _first_inputs(model, layers[0], batches)
    basis = _principal(streams, width)
    _rotate_embeddings(model, places, basis)
    streams = [_product(stream, basis) for stream in streams]
    for index, layer in enumerate(layers):
        norms = [_norm(width, full, eps), _norm(width, full, eps)]
        # Until the next basis is known, each half gives the stream in its dense basis, from its sliced input.
        sliced = SlicedLayer(layer, places, norms, [_matrix(basis), nn.Identity()])
        _read(within(sliced.attention, ATTENTION_IN), basis, full)
        mixed = [sliced.mix(stream, *args, **kwargs) for stream, (args, kwargs) in zip(streams, calls, strict=True)]
        middle = _principal(mixed, width)
        _write(sliced.attention.get_submodule("o_proj"), middle)
        sliced.attention_shortcut = _matrix(middle.T @ basis)
        sliced.ffn_shortcut = _matrix(middle)
        _read(within(sliced.ffn, places.ffn_in), middle, full)
        streams = [sliced.transform(_product(stream, middle)) for stream in mixed]
        last = index == len(layers) - 1
        # The published default leaves the head whole. A rotation there would change nothing.
        basis = torch.eye(full, dtype=torch.float64, device=basis.device) if last else _principal(streams, width)
        _write(sliced.ffn.get_submodule(places.ffn_out), basis)
        sliced.ffn_shortcut = _matrix(basis.T @ middle)
        streams = [_product(stream, basis) for stream in streams]
        layers[index] = sliced
    return model.requires_grad_(True).eval()


def _fold_norms(model: PreTrainedModel, places: Places) -> float:
    """Scales, shifts and mean subtractions into the linears; the final norm is replaced. Returns the epsilon."""
    head = model.get_submodule(places.head)
    head.weight = nn.Parameter(head.weight.clone())
    model.config.tie_word_embeddings = False
    final = model.get_submodule(places.final_norm)
    writers = []
    readers = [(final, [head])]
    for layer in model.get_submodule(places.layers):
        attention, ffn = within(layer, (places.attention, places.ffn))
        readers.append((layer.get_submodule(places.attention_norm), within(attention, ATTENTION_IN)))
        readers.append((layer.get_submodule(places.ffn_norm), within(ffn, places.ffn_in)))
        writers += [attention.get_submodule("o_proj"), ffn.get_submodule(places.ffn_out)]
    for norm, linears in readers:
        for linear in linears:
            weight = linear.weight.double()
            if isinstance(norm, nn.LayerNorm):
                shift = weight @ norm.bias.double()
                bias = shift if linear.bias is None else linear.bias + shift
                linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
            linear.weight = nn.Parameter((weight * norm.weight.double()).to(linear.weight.dtype))
    eps = final.eps if isinstance(final, nn.LayerNorm) else final.variance_epsilon
    if isinstance(final, nn.LayerNorm):
        size = model.config.hidden_size
        centred = torch.eye(size, dtype=torch.float64, device=final.weight.device) - 1 / size
        for writer in writers:
            _write(writer, centred)
        _rotate_embeddings(model, places, centred)
    name, _, leaf = places.final_norm.rpartition(".")
    setattr(model.get_submodule(name), leaf, _norm(model.config.hidden_size, model.config.hidden_size, eps))
    return eps


def _norm(width: int, full: int, eps: float) -> nn.RMSNorm:
    """
    The mean of squares is over the dense size, as published: x / sqrt(sum(x^2) / full + eps), less the factor
    sqrt(full / width), which `_read` gives to the linears.
    """
    return nn.RMSNorm(width, eps=eps * full / width, elementwise_affine=False)


def _first_inputs(
    model: PreTrainedModel, layer: nn.Module, batches: list[Batch]
) -> tuple[list[torch.Tensor], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the layers are called with: the first stream of each batch, and the other arguments."""
    found: list[Any] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    options = {"use_cache": False} if model.can_generate() else {}
    for batch in batches:
        with suppress(_Reached):
            model(**{name: value for name, value in batch.items() if name != "labels"}, **options)
    hook.remove()
    return [args[0] for args, _ in found], [(args[1:], kwargs) for args, kwargs in found]


def _principal(streams: list[torch.Tensor], width: int) -> torch.Tensor:
    """The directions with the largest second moments of the stream before the norm, as columns in float64."""
    size = streams[0].shape[-1]
    moments = torch.zeros(size, size, dtype=torch.float64, device=streams[0].device)
    for stream in streams:
        rows = stream.flatten(0, -2).double()
        moments += rows.T @ rows
    return torch.linalg.eigh(moments).eigenvectors.flip(-1)[:, :width]


def _product(stream: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return stream @ basis.to(stream.dtype)


def _matrix(weight: torch.Tensor) -> nn.Linear:
    """A linear of a weight (out, in); of `new.T @ old` it takes rows from one basis to another."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.float().contiguous())
    return linear


def _read(linears: list[nn.Module], basis: torch.Tensor, full: int) -> None:
    """Let linears take their input in a basis, from a norm of its width."""
    for linear in linears:
        scale = (full / basis.shape[1]) ** 0.5
        linear.weight = nn.Parameter((scale * linear.weight.double() @ basis).to(linear.weight.dtype))
        linear.in_features = basis.shape[1]


def _write(linear: nn.Module, basis: torch.Tensor) -> None:
    """Let a linear give its output in a basis."""
    linear.weight = nn.Parameter((basis.T @ linear.weight.double()).to(linear.weight.dtype))
    linear.out_features = basis.shape[1]
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis.T @ linear.bias.double()).to(linear.bias.dtype))


def _rotate_embeddings(model: PreTrainedModel, places: Places, basis: torch.Tensor) -> None:
    """Let all that makes the first stream write it in a basis: tokens, or patches, class token and positions."""
    embedded = model.get_submodule(places.embedded)
    if isinstance(embedded, nn.Embedding):
        embedded.weight = nn.Parameter(_product(embedded.weight.double(), basis).to(embedded.weight.dtype))
        embedded.embedding_dim = basis.shape[1]
        return
    patches = embedded.patch_embeddings.projection
    kernel = torch.einsum("ochw,on->nchw", patches.weight.double(), basis)
    patches.weight = nn.Parameter(kernel.to(patches.weight.dtype).contiguous())
    patches.bias = nn.Parameter((patches.bias.double() @ basis).to(patches.bias.dtype))
    patches.out_channels = basis.shape[1]
    for name in ("cls_token", "position_embeddings"):
        tokens = getattr(embedded, name)
        setattr(embedded, name, nn.Parameter((tokens.double() @ basis).to(tokens.dtype)))


def prepare(work: Work) -> Prepared:
    """Keep the calibration batches: the bases depend on the amount, since each block is fitted on sliced input."""
    return Prepared(lambda model, amount: slice_model(model, work.batches, amount))


SLICEGPT = Peer(
    name="SliceGPT",
    source="Ashkboos et al., ICLR 2024, arXiv:2401.15024; github.com/microsoft/TransformerCompression",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted=(
        "Images: the same for a ViT; its class token, positions and patches are rotated as token embeddings are. "
        "The norms keep the teacher's epsilon, so that amount 0 is exact. The basis stays the principal one, without "
        "the final random rotation, which changes no output. Dropout on the residual paths is left out. As published, "
        "the final norm and the head keep the dense width."
    ),
)
