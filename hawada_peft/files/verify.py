"""An export counts as done when it was reloaded as any user would load it, and computed the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..errors import VerificationError
from ..vanilla.skeleton import auto_class_of, skeleton_of
from .checkpoint import stored_tensors
from .foreign import config_problems, file_problems, tensor_problems
from .pieces import stored_form
from .shards import DTYPES

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to their largest magnitude, that counts as rounding."""


def compare(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> tuple[float, float]:
    """
    Compare all that two models compute.

    Args:
        found, expected: outputs by name, as `outputs_of` gives them.
        dtype: of the weights.
        tolerance: allowed difference relative to the largest magnitude; by dtype (`TOLERANCE`) if left out.

    Returns:
        The largest difference and the largest magnitude expected, of the output that differs most.

    Raises:
        VerificationError: if there are other outputs, of other sizes, or they differ by more than rounding.
    """
    if found.keys() != expected.keys():
        raise VerificationError(f"the outputs are {sorted(found)}, expected are {sorted(expected)}")
    worst = (0.0, 0.0)
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise VerificationError(f"{name} are {tuple(found[name].shape)}, expected are {tuple(tensor.shape)}")
        difference = (found[name].double() - tensor.double()).abs().max().item()
        scale = tensor.double().abs().max().item()
        allowed = (TOLERANCE[dtype] if tolerance is None else tolerance) * scale
        if not difference <= allowed:  # NaN fails too
            raise VerificationError(
                f"{name} differ by {difference:.3g}, allowed is {allowed:.3g} ({dtype}, largest magnitude {scale:.3g})"
            )
        if not worst[1] or difference * worst[1] >= worst[0] * scale:
            worst = difference, scale
    return worst


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
    loaded = reload(folder, device_map="meta")[1]
    if type(loaded) is not type(expected):
        raise VerificationError(f"{folder} loads as {type(loaded).__name__}, saved was {type(expected).__name__}")
    problems = [*file_problems(folder), *config_problems(folder), *tensor_problems(folder)]
    if problems:
        raise VerificationError(f"{folder} is not vanilla: {'; '.join(problems)}")
    wanted = {key: (DTYPES[each.dtype], tuple(each.shape)) for key, each in stored_form(expected).items()}
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
