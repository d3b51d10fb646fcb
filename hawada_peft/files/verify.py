"""An export counts as done when it was reloaded as any user would load it, and computed the same."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..errors import VerificationError
from ..vanilla.batches import Batch
from ..vanilla.outputs import example_inputs, output_of
from ..vanilla.skeleton import auto_class_of, skeleton_of
from .checkpoint import stored_names, stored_tensors
from .shards import DTYPES

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to their largest magnitude, that counts as rounding."""


@dataclass(frozen=True)
class Verification:
    """
    What a verified folder was found to be.

    Args:
        auto_class (`str`): the class that loaded it.
        max_difference (`float`): largest difference of logits (or hidden states) to the reference.
        scale (`float`): largest magnitude of the reference.
        parameters (`int`): in the reloaded model.
    """

    auto_class: str
    max_difference: float
    scale: float
    parameters: int


def verify_slim(
    folder: str | os.PathLike[str],
    reference: nn.Module | torch.Tensor,
    inputs: Batch | None = None,
    *,
    tolerance: float | None = None,
) -> Verification:
    """
    Reload a saved model through its Auto class, and compare it with what it was saved from.

    Args:
        folder: what `save_pretrained` wrote.
        reference: the model in memory (slim, or gated under its plan), or the logits of one for `inputs`.
        inputs: what to compare on; drawn at random if left out. Needed with logits.
        tolerance: allowed difference relative to the largest logit; by dtype (`TOLERANCE`) if left out.

    Returns:
        `Verification`: what was measured.

    Raises:
        VerificationError: if the folder does not load without custom code, lacks or has unexpected weights, or
            computes something else.
    """
    folder = Path(folder)
    auto, loaded = reload(folder)
    _check_class(folder, loaded, reference)
    if inputs is None:
        if isinstance(reference, torch.Tensor):
            raise VerificationError("pass the `inputs` that the reference logits were computed from")
        inputs = example_inputs(loaded)
    expected = reference if isinstance(reference, torch.Tensor) else output_of(reference, inputs)
    found = output_of(nn.Module.to(loaded, expected.device), inputs)
    if found.shape != expected.shape:
        raise VerificationError(f"{folder} gives logits of {tuple(found.shape)}, expected {tuple(expected.shape)}")
    difference = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    allowed = (TOLERANCE[loaded.dtype] if tolerance is None else tolerance) * scale
    if not difference <= allowed:  # NaN fails too
        raise VerificationError(
            f"{folder} computes something else than the model it was saved from: logits differ by {difference:.3g}, "
            f"allowed is {allowed:.3g} ({loaded.dtype}, largest logit {scale:.3g}). Do not use this folder."
        )
    return Verification(auto.__name__, difference, scale, loaded.num_parameters())


def verify_files(folder: str | os.PathLike[str], expected: PreTrainedModel) -> None:
    """
    Check a saved model's folder without reading its weights: what its config builds, and what its files list.

    Args:
        folder: what was written.
        expected: the model it should hold; may be on the meta device.

    Raises:
        VerificationError: if the folder does not load through its Auto class as the expected one's class, or the files
            do not list exactly the expected tensors, with their shapes and dtypes.
    """
    folder = Path(folder)
    _check_class(folder, reload(folder, device_map="meta")[1], expected)
    state = expected.state_dict()
    wanted = {
        key: (DTYPES[state[name].dtype], tuple(state[name].shape)) for key, name in stored_names(expected).items()
    }
    found = {key: (stored.dtype, stored.shape) for key, stored in stored_tensors(folder).items()}
    wrong = [
        f"{key}: {found.get(key, 'missing')}, expected {wanted.get(key, 'nothing')}"
        for key in sorted(wanted.keys() | found.keys())
        if found.get(key) != wanted.get(key)
    ]
    if wrong:
        raise VerificationError(f"{folder} does not hold what it should: {'; '.join(wrong[:5])}")


def reload(folder: Path, **options: Any) -> tuple[Any, PreTrainedModel]:
    """
    Load a folder through its Auto class, without custom code, and with exactly the weights that its class has.

    Args:
        folder: of a vanilla model.
        options: of `from_pretrained`.

    Returns:
        The Auto class and the model.

    Raises:
        VerificationError: if it does not load so.
    """
    try:
        auto = auto_class_of(skeleton_of(AutoConfig.from_pretrained(folder)))
        loaded, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        raise VerificationError(
            f"{folder} does not load with transformers {transformers.__version__}: {error}"
        ) from error
    wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if wrong:
        raise VerificationError(f"{folder} does not hold exactly the weights of {type(loaded).__name__}: {wrong}")
    return auto, loaded


def _check_class(folder: Path, loaded: PreTrainedModel, reference: nn.Module | torch.Tensor) -> None:
    if isinstance(reference, PreTrainedModel) and type(loaded) is not type(reference):
        raise VerificationError(f"{folder} loads as {type(loaded).__name__}, saved was {type(reference).__name__}")
