"""What became of a slimming, and how it becomes a verified folder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedModel

from ..errors import HawAdaError, UnsupportedModelError
from ..files.folder import check_free, new_folder
from ..files.pieces import stored_form
from ..planning.plan import Plan
from ..race.record import RaceRecord
from ..refit.reconstruction import Reconstruction
from ..search.result import SearchResult
from ..surgery.comparison import Reference
from ..vanilla.batches import Batch
from ..vanilla.modules import check_loaded, check_unquantized
from ..vanilla.resize import make_plain, origin_of, rename
from .checks import Verification
from .facts import ExportFacts, QualityChange, known_base
from .figures import Latency
from .passport import PassportLine
from .verify import Reference as Expected
from .verify import verify_slim
from .write import checked_report, write_card

logger = logging.getLogger(__name__)


def save_slim(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    reference: Expected | None = None,
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
        VerificationError: if `verify_slim` finds something wrong: the same rules as those of `hawada verify`.
        UnsupportedModelError: if weights are quantized or offloaded.
        HawAdaError: if the facts contradict the model.
    """
    if not isinstance(folder, str | os.PathLike):
        raise HawAdaError(f"folder must be a folder, got {folder!r}")
    if not isinstance(card, ExportFacts | None):
        raise HawAdaError(f"card must be ExportFacts, got a {type(card).__name__}")
    saves = callable(getattr(processor, "save_pretrained", None))
    if not saves and not isinstance(processor, str | os.PathLike | None):
        raise HawAdaError(f"processor must be a tokenizer or an image processor, or a folder, got {processor!r:.80}")
    check_free(folder)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"save_slim takes a slim transformers model, got a {type(model).__name__}: of a gated one, merge it first"
        )
    check_loaded(model)
    origin = origin_of(model)
    if card is not None:
        card = dataclasses.replace(card, base=card.base or known_base(origin))
        checked_report(model, card)  # before anything is written
    check_unquantized(model)
    make_plain(model)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if isinstance(processor, str | os.PathLike):
            processor = AutoProcessor.from_pretrained(processor)
        if processor is not None:
            processor.save_pretrained(temporary)
        reference = model if reference is None else reference
        verification = verify_slim(temporary, reference=reference, inputs=inputs).require()
        if card is not None:
            write_card(temporary, card, verification)
    rename(model, os.fspath(folder), origin)  # so that adapters trained on it name this folder as their base
    logger.info("%s: verified, outputs differ by at most %.3g", folder, verification.max_difference)
    return dataclasses.replace(verification, folder=Path(folder))


@dataclass(frozen=True)
class Slimmed:
    """
    What became of a slimming: of `model.slim`, `recover`, `slim_checkpoint`.

    Args:
        model (`PreTrainedModel`): the slim model. On the meta device if it was written tensor by tensor.
        plan (`Plan`): what was kept.
        dense (`PreTrainedModel`, *optional*): the dense model, without gates, as it was before there were any.
        search (*optional*): the search that chose the shape; a `SearchResult`, or its `figures()`.
        race (`RaceRecord`, *optional*): the race that chose the plan.
        reconstruction (`Reconstruction`, *optional*): what refitting on calibration batches did.
        calibration (`dict`, *optional*): what these batches were: `calibration_facts`.
        reference (`Reference`, *optional*): what the gated model computes, if that was compared.
        folder (`Path`, *optional*): where the slim model was saved.
        verification (`Verification`, *optional*): what reloading that folder gave.
    """

    model: PreTrainedModel = field(repr=False)
    plan: Plan
    dense: PreTrainedModel | None = field(default=None, repr=False)
    search: SearchResult | Mapping[str, Any] | None = None
    race: RaceRecord | None = None
    reconstruction: Reconstruction | None = None
    calibration: Mapping[str, Any] | None = None
    reference: Reference | None = field(default=None, repr=False)
    folder: Path | None = None
    verification: Verification | None = None

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        processor: Any = None,
        base: str | os.PathLike[str] | None = None,
        quality: Sequence[QualityChange] = (),
        latency: Latency | None = None,
        checked: Sequence[PassportLine] = (),
        license: str | None = None,
        repo_id: str | None = None,
    ) -> Slimmed:
        """
        Save the slim model, verified, with its card and its report: the folder appears complete, or not at all.

        Args:
            folder: must not exist yet, or be empty.
            processor: a tokenizer or image processor to save with it; or the folder or id of a model to take it from.
            base (*optional*): the dense model's id on the Hub or its folder; where it was loaded from if left out.
            quality: what only the user can know, for the card; see `ExportFacts`.
            latency: see `ExportFacts`.
            checked: see `ExportFacts`.
            license: see `ExportFacts`.
            repo_id: see `ExportFacts`.

        Returns:
            `Slimmed`: this one, with the folder and its verification.

        Raises:
            FileExistsError, VerificationError, HawAdaError: as `save_slim`.
        """
        known = None if self.dense is None else known_base(self.dense.name_or_path)
        verification = save_slim(
            self.model,
            folder,
            inputs=None if self.reference is None else self.reference.inputs,
            processor=processor,
            card=ExportFacts(
                base=base or known,
                plan=self.plan,
                latency=latency,
                search=self.search,
                race=self.race,
                quality=quality,
                reconstruction=self.reconstruction,
                calibration=self.calibration,
                checked=checked,
                license=license,
                repo_id=repo_id,
            ),
        )
        return dataclasses.replace(self, folder=Path(folder), verification=verification)

    @property
    def parameters(self) -> int:
        """Of the slim model."""
        return int(self.model.num_parameters())

    @property
    def dense_parameters(self) -> int | None:
        """Of the dense model, if it is known."""
        return None if self.dense is None else int(self.dense.num_parameters())

    @property
    def weight_bytes(self) -> int:
        """In the slim model's files."""
        return sum(tensor.nbytes for tensor in stored_form(self.model).values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "shape": self.plan.sizes if self.plan.beside else self.plan.shape.to_dict(),
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "weight_bytes": self.weight_bytes,
            "verification": None if self.verification is None else self.verification.figures(),
            "reconstruction": None if self.reconstruction is None else dataclasses.asdict(self.reconstruction),
        }

    def __str__(self) -> str:
        before = "" if self.dense_parameters is None else f" of {self.dense_parameters:,}"
        where = "" if self.folder is None else f" in {self.folder}"
        lines = [
            str(self.plan),
            f"{self.parameters:,}{before} parameters stay: {self.weight_bytes / 1e6:.1f} MB{where}",
        ]
        if self.verification is not None and self.verification.max_difference is not None:
            found = self.verification
            lines.append(f"verified: outputs differ by at most {found.max_difference:.2g} of {found.scale:.3g}")
        if self.reconstruction is not None:
            lines.append(f"reconstruction: {self.reconstruction}")
        if self.plan.keeps_all:
            lines.append("the plan cuts nothing")
        return "\n".join(lines)
