"""Tiny models whose outputs are no distribution over classes, and their right loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from conftest import LM, VISION, Row
from torch.nn import functional

from hawada_peft import Shape


def squares(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found - expected).square().mean()


def bernoulli(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    p, q = expected.double().sigmoid(), found.double().sigmoid()
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean().float()


def softmax(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    logs = functional.log_softmax(found, -1), functional.log_softmax(expected, -1)
    return functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean()


@dataclass(frozen=True)
class Headed:
    """A row, what its loss is called, and that loss between two outputs."""

    row: Row
    metric: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SLIM = Shape(4, 4, 40, 2)
MULTI = {"problem_type": "multi_label_classification", "num_labels": 5}


def _text(family: str, head: str, **fields: object) -> Row:
    return Row(f"{family}{head}", f"{family}Config", LM | fields, SLIM)


def _image(family: str, **fields: object) -> Row:
    more = {"mlp_ratio": 2} if family == "Dinov2" else {}
    slim = Shape(4, 4, 64, 2) if more else SLIM
    return Row(f"{family}ForImageClassification", f"{family}Config", VISION | more | fields, slim)


HEADS: dict[str, Headed] = {
    "llama-reward": Headed(_text("Llama", "ForSequenceClassification", num_labels=1), "mse", squares),
    "qwen2-token-value": Headed(_text("Qwen2", "ForTokenClassification", num_labels=1), "mse", squares),
    "vit-one": Headed(_image("ViT", num_labels=1), "mse", squares),
    "deit-regression": Headed(_image("DeiT", num_labels=3, problem_type="regression"), "mse", squares),
    "llama-bare": Headed(_text("Llama", "Model"), "mse", squares),
    "vit-bare": Headed(Row("ViTModel", "ViTConfig", VISION, SLIM), "mse", squares),
    "vit-masked": Headed(
        Row("ViTForMaskedImageModeling", "ViTConfig", VISION | {"encoder_stride": 8}, SLIM), "mse", squares
    ),
    "llama-multi": Headed(_text("Llama", "ForSequenceClassification", **MULTI), "kl", bernoulli),
    "vit-one-label": Headed(_image("ViT", **(MULTI | {"num_labels": 1})), "kl", bernoulli),
    "vit-multi": Headed(_image("ViT", **MULTI), "kl", bernoulli),
    "dinov2-multi": Headed(_image("Dinov2", **MULTI), "kl", bernoulli),
    "llama-questions": Headed(_text("Llama", "ForQuestionAnswering"), "kl", softmax),
    "llama-classes": Headed(_text("Llama", "ForSequenceClassification", num_labels=3), "kl", softmax),
    "llama-text": Headed(_text("Llama", "ForCausalLM", problem_type="regression"), "kl", softmax),
}
