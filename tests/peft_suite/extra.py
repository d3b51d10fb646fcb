"""Copied next to PEFT's tests: the shared bodies on a vision model, and what PEFT keeps closed to outside tuners."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageClassification

from .test_feature_extraction_models import TestPeftFeatureExtractionModel as _Shared


class TestViTModels(_Shared):
    transformers_class = AutoModelForImageClassification

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16) / 1000}
