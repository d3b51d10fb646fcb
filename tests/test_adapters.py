"""The adapters by themselves, on every kind of module that gates can be placed on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import assert_same_state, state_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from hawada_peft.errors import UnsupportedModelError
from hawada_peft.gates import AttentionHeadAdapter, BlockAdapter, ChannelAdapter, GateAdapter
from hawada_peft.gates.adapter import BLOCK, UNITS
from hawada_peft.vanilla.modules import feature_dim, feature_sizes

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 4),
    "linear without bias": lambda: nn.Linear(8, 4, bias=False),
    "conv1d of transformers": lambda: Conv1D(4, 8),
    "conv1d": lambda: nn.Conv1d(8, 4, 3),
    "conv2d": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "conv2d in groups": lambda: nn.Conv2d(8, 4, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(8, 4, 2),
}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTERS: list[tuple[type[GateAdapter], dict[str, int]]] = [
    (ChannelAdapter, {}),
    (ChannelAdapter, {"group_size": 4}),
    (AttentionHeadAdapter, {"head_dim": 2}),
    (BlockAdapter, {}),
]
every_module = pytest.mark.parametrize("name", MODULES)


def example(module: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    tail = (5,) * len(module.kernel_size) if isinstance(module, CONVS) else ()
    return torch.randn(3, 8, *tail, dtype=dtype)


def wrap(cls: type[GateAdapter], base: nn.Module, **options: int) -> GateAdapter:
    adapter = cls(base, **options).double().eval()
    for gate in adapter.gates("default").values():
        nn.init.normal_(gate.theta)
    return adapter


EVERY_PAIR = [
    pytest.param(
        name,
        cls,
        options,
        id=f"{cls.__name__}{options or ''} on {name}",
    )
    for name, make in MODULES.items()
    for cls, options in ADAPTERS
]
every_pair = pytest.mark.parametrize(("name", "cls", "options"), EVERY_PAIR)


@every_pair
def test_scales_input_features_and_output(name: str, cls: type[GateAdapter], options: dict[str, int]) -> None:
    base = MODULES[name]().double()
    adapter, x = wrap(cls, base, **options), example(base)
    inputs, output = adapter.input_factor(["default"]), adapter.output_factor(["default"])
    scaled = x if inputs is None else x * inputs.reshape(-1, *(1,) * (x.ndim - 2))
    expected = base(scaled) * (1 if output is None else output)
    assert (inputs is None) != (output is None)
    torch.testing.assert_close(adapter(x), expected)


@every_pair
def test_folding_computes_the_same(name: str, cls: type[GateAdapter], options: dict[str, int]) -> None:
    base = MODULES[name]().double()
    adapter, x = wrap(cls, base, **options), example(base)
    gated, before = adapter(x), state_of(adapter)
    adapter.merge(safe_merge=True)
    torch.testing.assert_close(base(x), gated)
    torch.testing.assert_close(adapter(x), gated)
    adapter.unmerge()
    assert_same_state(state_of(adapter), before)


@every_module
def test_disabling_unmerges_and_passes_through(name: str) -> None:
    base = MODULES[name]().double()
    x = example(base)
    dense = base(x)
    adapter = wrap(ChannelAdapter, base)
    adapter.merge()
    adapter.enable_adapters(False)
    assert torch.equal(adapter(x), dense)
    assert not adapter.merged


@every_module
def test_rows_of_a_batch_take_their_own_gates(name: str) -> None:
    base = MODULES[name]().double()
    x = example(base)
    dense = base(x)
    adapter = wrap(ChannelAdapter, base)
    gated = adapter(x)
    mixed = adapter(x, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([gated[0], dense[1], gated[2]]))


@every_module
def test_base_is_neither_copied_nor_frozen(name: str) -> None:
    base = MODULES[name]()
    adapter = ChannelAdapter(base)
    assert adapter.get_base_layer() is base
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_closed_channels_are_folded_to_zero() -> None:
    base = nn.Linear(8, 4)
    adapter = ChannelAdapter(base).eval()
    keep = torch.arange(8) % 2 == 0
    adapter.gates("default")[UNITS].set_plan(keep)
    adapter.merge()
    assert torch.equal(base.weight.any(0), keep)


def test_closed_block_takes_its_bias_along() -> None:
    base = nn.Linear(8, 4)
    adapter = BlockAdapter(base).eval()
    adapter.gates("default")[BLOCK].set_plan(torch.tensor([False]))
    assert not adapter(torch.randn(3, 8)).any()


def test_layer_gate_is_shared_and_held_once() -> None:
    first, second = ChannelAdapter(nn.Linear(8, 4)), ChannelAdapter(nn.Linear(8, 4))
    gate = BlockAdapter(nn.Linear(1, 1)).gates("default")[BLOCK]
    first.update_layer("default", {"hawada_layer": gate})
    second.share("hawada_layer", first)
    assert second.gates("default")["hawada_layer"] is gate
    assert not [name for name, _ in second.named_parameters() if "hawada_layer" in name]


def test_unknown_name_has_no_gates() -> None:
    assert ChannelAdapter(nn.Linear(8, 4)).gates("other") == {}


def test_safe_merge_refuses_nan_and_leaves_the_weights() -> None:
    base = nn.Linear(8, 4)
    adapter, before = ChannelAdapter(base), base.weight.clone()
    adapter.gates("default")[UNITS].theta.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected.*default"):
        adapter.merge(safe_merge=True)
    assert torch.equal(base.weight, before)
    assert not adapter.merged


def test_quantised_weight_is_refused() -> None:
    base = nn.Linear(8, 4)
    base.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"torch.int8.*unquantized"):
        ChannelAdapter(base).merge()


def test_unmerging_follows_a_change_of_dtype() -> None:
    adapter = ChannelAdapter(nn.Linear(8, 4))
    adapter.merge()
    adapter.double()
    adapter.unmerge()
    assert adapter.base_layer.weight.dtype == torch.float64


@pytest.mark.parametrize("module", [nn.Embedding(4, 8), nn.LayerNorm(8), nn.ConvTranspose1d(8, 4, 3)])
def test_other_modules_are_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{type(module).__name__} is not supported.*Linear, Conv1d"):
        ChannelAdapter(module)


@pytest.mark.parametrize("head_dim", [None, 3])
def test_head_dim_must_divide_the_features(head_dim: int | None) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"must divide the 8 input features.* got {head_dim}"):
        AttentionHeadAdapter(nn.Linear(8, 4), head_dim=head_dim)


def test_names_per_row_must_be_as_many_as_rows() -> None:
    with pytest.raises(ValueError, match=r"Length of `adapter_names`.*1 and 3"):
        ChannelAdapter(nn.Linear(8, 4))(torch.ones(3, 8), adapter_names=["default"])


@every_module
def test_sizes_and_axis_of_features(name: str) -> None:
    base = MODULES[name]()
    assert feature_sizes(base) == (8, 4)
    assert example(base).shape[feature_dim(base)] == 8


def test_repr_names_the_package() -> None:
    assert repr(ChannelAdapter(nn.Linear(8, 4))).startswith("hawada.ChannelAdapter")


def test_abstract_adapter_is_not_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        GateAdapter(nn.Linear(8, 4))
