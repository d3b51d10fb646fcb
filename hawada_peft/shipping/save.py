"""A slim model in memory becomes a verified folder."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, PreTrainedModel

from ..files.folder import new_folder
from ..files.verify import Verification, logger, verify_slim
from ..vanilla.batches import Batch
from .facts import ExportFacts, known_base
from .write import checked_report, write_card


def save_slim(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    reference: nn.Module | torch.Tensor | None = None,
    inputs: Batch | None = None,
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
