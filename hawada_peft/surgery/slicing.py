"""Slicing of tensors and of single modules: dtype, device, bias and requires_grad are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidPlanError

Indices = Sequence[int] | torch.Tensor
Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d, nn.Conv3d)


def slice_tensor(tensor: torch.Tensor, dim: int, keep: Indices) -> torch.Tensor:
    """
    Select entries along one dimension.

    Args:
        tensor: any.
        dim: the dimension.
        keep: the indices to keep, in the order wanted.

    Returns:
        A new contiguous tensor of the same dtype on the same device.

    Raises:
        InvalidPlanError: if an index does not exist.
    """
    index = torch.as_tensor(keep, dtype=torch.long)
    if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= tensor.shape[dim]:
        raise InvalidPlanError(
            f"indices to keep must exist and lie in 0..{tensor.shape[dim] - 1} on dimension {dim}, got "
            f"{index.tolist()[:16]}{' ...' if index.numel() > 16 else ''}"
        )
    return tensor.index_select(dim, index.to(tensor.device))


def slice_linear(
    linear: nn.Linear | Conv1D, *, keep_in: Indices | None = None, keep_out: Indices | None = None
) -> nn.Linear | Conv1D:
    """
    A new Linear (or transformers' Conv1D) with some of the input or output features.

    Args:
        linear: the module; left as it is.
        keep_in: input features to keep; all if left out.
        keep_out: output features to keep; all if left out.

    Raises:
        InvalidPlanError: if an index does not exist.
    """
    in_dim, out_dim = (0, 1) if isinstance(linear, Conv1D) else (1, 0)
    weight = _slice(linear.weight, {in_dim: keep_in, out_dim: keep_out})
    bias = None if linear.bias is None else _slice(linear.bias, {0: keep_out})
    with torch.device("meta"):
        if isinstance(linear, Conv1D):
            result: nn.Linear | Conv1D = Conv1D(weight.shape[1], weight.shape[0])
        else:
            result = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _fill(result, linear, weight, bias)


def slice_embedding(
    embedding: nn.Embedding, *, keep_dim: Indices | None = None, keep_rows: Indices | None = None
) -> nn.Embedding:
    """
    A new Embedding with some of the features, or of the rows.

    Args:
        embedding: the module; left as it is.
        keep_dim: features of the vectors to keep; all if left out.
        keep_rows: rows (tokens, positions) to keep; all if left out. A padding index moves along with its row.

    Raises:
        InvalidPlanError: if an index does not exist, or the row of the padding index would go.
    """
    weight = _slice(embedding.weight, {1: keep_dim, 0: keep_rows})
    padding = embedding.padding_idx
    if padding is not None and keep_rows is not None:
        rows = torch.as_tensor(keep_rows).tolist()
        if padding not in rows:
            raise InvalidPlanError(f"keep_rows must keep the padding row {padding}")
        padding = rows.index(padding)
    with torch.device("meta"):
        result = nn.Embedding(
            weight.shape[0],
            weight.shape[1],
            padding_idx=padding,
            max_norm=embedding.max_norm,
            norm_type=embedding.norm_type,
            scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse,
        )
    return _fill(result, embedding, weight, None)


def slice_conv(conv: Conv, *, keep_in: Indices | None = None, keep_out: Indices | None = None) -> Conv:
    """
    A new convolution with some of the input or output channels.

    Args:
        conv: the module, with one group; left as it is.
        keep_in: input channels to keep; all if left out.
        keep_out: output channels to keep; all if left out.

    Raises:
        InvalidPlanError: if an index does not exist, or the convolution is grouped.
    """
    if conv.groups != 1:
        raise InvalidPlanError(f"cannot slice channels of a convolution with {conv.groups} groups; only of one group")
    weight = _slice(conv.weight, {1: keep_in, 0: keep_out})
    bias = None if conv.bias is None else _slice(conv.bias, {0: keep_out})
    with torch.device("meta"):
        result = type(conv)(
            weight.shape[1],
            weight.shape[0],
            kernel_size=conv.kernel_size,  # type: ignore[arg-type]  # the class's own tuple
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            bias=bias is not None,
            padding_mode=conv.padding_mode,
        )
    return _fill(result, conv, weight, bias)


Module = TypeVar("Module", bound=nn.Module)


def _slice(parameter: torch.Tensor, keeps: dict[int, Indices | None]) -> nn.Parameter:
    tensor = parameter.data
    for dim, keep in keeps.items():
        if keep is not None:
            tensor = slice_tensor(tensor, dim, keep)
    tensor = tensor.clone() if tensor is parameter.data or tensor.data_ptr() == parameter.data_ptr() else tensor
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _fill(result: Module, source: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> Module:
    result.weight = weight
    if bias is not None:
        result.bias = bias
    return result.train(source.training)
