"""An export counts as done when it was reloaded as any user would load it, and computed the same."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..errors import VerificationError
from .checkpoint import stored_names, stored_tensors
from .facts import ExportFacts, known_base
from .folder import new_folder
from .hub import checked_report, write_card
from .shards import DTYPES
from .skeleton import auto_class_of, skeleton_of

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to their largest magnitude, that counts as rounding."""

Inputs = Mapping[str, torch.Tensor]


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


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Inputs of the kind that a model takes, drawn at random but always the same.

    Returns:
        `pixel_values` of (2, channels, height, width) or `input_ids` of (2, 16).
    """
    generator = torch.Generator().manual_seed(0)
    device, config = model.device, model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=model.dtype)}
    tokens = torch.randint(config.get_text_config().vocab_size, (2, 16), generator=generator)
    return {"input_ids": tokens.to(device)}


def output_of(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """
    The model's logits (else last hidden states, else last feature map) in evaluation mode; the mode is put back.
    Inputs are taken to the model's device.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode():
            output = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    finally:
        model.train(training)
    for name in ("logits", "last_hidden_state"):
        if name in output:
            return output[name]
    return output["feature_maps"][-1]


def verify_slim(
    folder: str | os.PathLike[str],
    reference: nn.Module | torch.Tensor,
    inputs: Inputs | None = None,
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


def save_slim(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    reference: nn.Module | torch.Tensor | None = None,
    inputs: Inputs | None = None,
    processor: Any = None,
    card: ExportFacts | None = None,
) -> Verification:
    """
    Save a slim model, verified: the folder appears complete, or not at all.

    The files are written beside the folder, reloaded and compared, and only then renamed.

    Args:
        model: the slim model.
        folder: must not exist yet, or be empty.
        reference: what the reloaded model must compute: a model, or logits for `inputs`. The slim model if left out;
            the gated model under its plan is the stronger check.
        inputs: what to compare on; drawn at random if left out.
        processor: a tokenizer or image processor to save with it; or the folder or id of a model to take it from.
        card (`ExportFacts`, *optional*): what is known about the export: a `README.md` and a `hawada_report.json` are
            written with it. `ExportFacts()` will do.

    Returns:
        `Verification`: what was measured.

    Raises:
        FileExistsError: if the folder holds something.
        VerificationError: as `verify_slim`.
        HawAdaError: if the facts contradict the model.
    """
    if card is not None:
        card = dataclasses.replace(card, base=card.base or known_base(model.name_or_path))
        checked_report(model, card)  # before anything is written
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if isinstance(processor, str | os.PathLike):
            processor = AutoProcessor.from_pretrained(processor)
        if processor is not None:
            processor.save_pretrained(temporary)
        verification = verify_slim(temporary, model if reference is None else reference, inputs)
        if card is not None:
            write_card(temporary, card, verification)
    logger.info("%s: verified, logits differ by at most %.3g", folder, verification.max_difference)
    return verification
