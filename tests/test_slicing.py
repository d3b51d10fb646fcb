"""Slicing of single modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hawada_peft.errors import InvalidPlanError
from hawada_peft.surgery import slice_conv, slice_embedding, slice_linear
from hawada_peft.surgery.slicing import slice_tensor

IN, OUT = [5, 0, 2], [1, 3]
CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
MODULES = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "conv1d of transformers": lambda: Conv1D(4, 6),
    **{cls.__name__: lambda cls=cls: cls(6, 4, 3, stride=2, padding=1, padding_mode="circular") for cls in CONVS},
    "embedding": lambda: nn.Embedding(4, 6),
}


def prepared(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = MODULES[name]().to(dtype).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter).requires_grad_(False)
    return module


def sliced(module: nn.Module, keep_in: list[int] | None = None, keep_out: list[int] | None = None) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return slice_embedding(module, keep_dim=keep_in, keep_rows=keep_out)
    cut = slice_linear if isinstance(module, nn.Linear | Conv1D) else slice_conv
    return cut(module, keep_in=keep_in, keep_out=keep_out)


@pytest.mark.parametrize("name", MODULES)
def test_matches_manual_indexing(name: str) -> None:
    module = prepared(name)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    found = sliced(module, IN, OUT)
    found_weight = found.weight.T if isinstance(module, Conv1D) else found.weight
    assert torch.equal(found_weight, weight[OUT][:, IN])
    if getattr(module, "bias", None) is not None:
        assert torch.equal(found.bias, module.bias[OUT])


@pytest.mark.parametrize("name", [name for name in MODULES if name != "embedding"])
def test_computes_what_the_dense_module_computes_with_the_rest_at_zero(name: str) -> None:
    module = prepared(name, torch.float64)
    x = torch.randn(2, 6, *(5,) * (module.weight.ndim - 2), dtype=torch.float64)
    masked = torch.zeros_like(x)
    masked[:, IN] = x[:, IN]
    torch.testing.assert_close(sliced(module, IN, OUT)(x[:, IN]), module(masked)[:, OUT])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_keeps_dtype_device_mode_and_requires_grad(name: str, dtype: torch.dtype) -> None:
    module = prepared(name, dtype)
    module.weight.requires_grad_(True)
    found = sliced(module, IN)
    assert type(found) is type(module)
    assert found.training is module.training
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in module.parameters()]
    assert {(p.dtype, p.device) for p in found.parameters()} == {(dtype, module.weight.device)}


@pytest.mark.parametrize("name", MODULES)
def test_works_on_the_meta_device(name: str) -> None:
    found = sliced(prepared(name).to("meta"), keep_out=None)
    assert found.weight.is_meta


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("keep", [None, [0, 1]])
def test_source_is_left_alone_and_shares_no_memory(name: str, keep: list[int] | None) -> None:
    module = prepared(name)
    before = module.weight.clone()
    found = sliced(module, keep)
    found.weight.data.zero_()
    assert torch.equal(module.weight, before)


def test_options_of_a_convolution_survive() -> None:
    found = slice_conv(nn.Conv2d(6, 4, (3, 5), stride=2, padding=1, dilation=2, padding_mode="reflect"), keep_in=IN)
    assert (found.kernel_size, found.stride, found.padding) == ((3, 5), (2, 2), (1, 1))
    assert (found.dilation, found.padding_mode, found.in_channels, found.out_channels) == ((2, 2), "reflect", 3, 4)


def test_padding_index_moves_with_its_row() -> None:
    embedding = nn.Embedding(4, 6, padding_idx=2)
    assert slice_embedding(embedding, keep_rows=[3, 2]).padding_idx == 1
    with pytest.raises(InvalidPlanError, match="padding row 2"):
        slice_embedding(embedding, keep_rows=[0, 1])


def test_grouped_convolution_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match="2 groups"):
        slice_conv(nn.Conv1d(4, 4, 3, groups=2), keep_in=[0])


@pytest.mark.parametrize("keep", [[6], [-1], []])
def test_indices_that_do_not_exist_are_refused(keep: list[int]) -> None:
    with pytest.raises(InvalidPlanError, match=r"0\.\.5 on dimension 1"):
        slice_linear(nn.Linear(6, 4), keep_in=keep)


def test_tensor_slice_is_contiguous() -> None:
    found = slice_tensor(torch.arange(12).reshape(3, 4), 1, torch.tensor([3, 0]))
    assert found.is_contiguous()
    assert found.tolist() == [[3, 0], [7, 4], [11, 8]]
