"""Copied next to PEFT's tests: its shared bodies on a vision model, and what PEFT refuses to outside tuners."""

from __future__ import annotations

import copy
from pathlib import Path

import plugin
import pytest
import torch
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForImageClassification

from . import test_feature_extraction_models as shared
from .test_custom_models import MLP, ModelConv2D


class TestViTModels(shared.TestPeftFeatureExtractionModel):
    transformers_class = AutoModelForImageClassification

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16) / 1000}


def test_mixing_with_other_methods_is_refused() -> None:
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(MLP(), plugin.Ours(target_modules=["lin0"]), mixed=True)


def test_hotswap_is_refused_and_load_adapter_replaces_it(tmp_path: Path) -> None:
    base, x = MLP(), torch.randn(3, 10)
    source = get_peft_model(copy.deepcopy(base), plugin.Ours(target_modules=["lin0"], init_weights=False)).eval()
    source.save_pretrained(tmp_path)
    model = get_peft_model(base, plugin.Ours(target_modules=["lin0"])).eval()
    assert not torch.allclose(model(x), source(x))
    with pytest.raises(ValueError, match=plugin.NAMES["type"]):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(x), source(x))


@pytest.mark.parametrize(("base", "name"), [(MLP, "lin0"), (ModelConv2D, "conv2d")])
def test_failed_safe_merge_leaves_the_base_untouched(base: type[torch.nn.Module], name: str) -> None:
    model = get_peft_model(base(), plugin.Ours(target_modules=[name]))
    layer = model.base_model.model.get_submodule(name)
    before = {key: value.clone() for key, value in layer.get_base_layer().state_dict().items()}
    for key, parameter in layer.named_parameters():
        if plugin.Model.prefix in key:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged"):
        layer.merge(safe_merge=True)
    assert layer.merged_adapters == []
    for key, value in layer.get_base_layer().state_dict().items():
        assert torch.equal(value, before[key])
