"""What a shape costs once its model is refitted: the loss that recovery starts from, and the one that foretells it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..basis.bases import gated_bases, plan_turn
from ..errors import HawAdaError, IllegalShapeError
from ..files.kept import Kept
from ..planning.plan import Plan
from ..processes import of_this_rank
from ..progress import Progress, progress_bar
from ..refit.fidelity import KEPT_BYTES
from ..refit.projections import is_projection
from ..refit.reconstruction import Teacher
from ..surgery.dense import dense_view
from ..surgery.slimming import slim
from ..vanilla.batches import Batch, main_input
from ..vanilla.family import locate, locate_all
from ..vanilla.legality import check_legal
from .masked import MaskedQuality, name_of
from .reference import Reference, judged_predictions

logger = logging.getLogger(__name__)

LORA_OUT = {"lora_B", "lora_embedding_B"}
"""PEFT's second factors, zero until they are trained."""

REFITS = "refitting depths"
"""What it is shown as."""

DEPTHS = 6
"""
Numbers of layers at most at which a refitted model is measured: the two ends and one in four. Between them the ratio
to the masked loss is followed.
"""


class RefittedQuality(MaskedQuality):
    """
    The quality of a gated model's shapes, by building each one and refitting it to the dense model (`reconstruct`).

    Which layers and units stay is decided as in `MaskedQuality`. A shape's loss is the divergence of the refitted slim
    model from the dense one on calibration batches that it was not fitted to; of many batches the first ones that hold
    `judged_predictions` are used. Closing gates alone makes narrow shapes look worse than shallow ones; least squares,
    and training after it, win back much more of width than of depth.
    What the dense model's layers give is computed once, and up to `KEPT_BYTES` of it are kept.
    Head counts that exist at another hidden size alone are judged by closed gates when they are judged by themselves.

    Args:
        model (`PeftModel`): with gates placed by a family row, without LoRA, its weights not quantized.
        batches (`Sequence`): calibration batches, keyword arguments of the forward pass: two rows at least.
        importance (`Mapping[str, Tensor]`, *optional*): as for `MaskedQuality`.
        progress (*optional*): makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        kept (`Kept`, *optional*): where losses are kept as they come.
        tower (`str`, *optional*): as for `MaskedQuality`.
        references (`Sequence[Reference]`, *optional*): as for `MaskedQuality`.

    Raises:
        HawAdaError: if there are no batches, or nothing can be refitted in the model (`obstacle`).
        InvalidPlanError: if the model's gates were not placed by a family row.
    """

    before_recovery = "refitted, before any training"

    def __init__(
        self,
        model: PeftModel,
        batches: Sequence[Batch],
        importance: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
        kept: Kept | None = None,
        *,
        tower: str | None = None,
        references: Sequence[Reference] | None = None,
    ) -> None:
        reason = obstacle(model, batches, None if tower is None else [tower])
        if reason:
            raise HawAdaError(f"shapes cannot be judged by refitted models: {reason}. Pass refit=False")
        self._given, self._most = len(batches), judged_predictions(model)
        super().__init__(model, batches, importance, progress, kept=kept, tower=tower, references=references)
        self.dense = dense_view(cast(PreTrainedModel, model.get_base_model()))
        self._dense_layout = locate(self.dense, tower)
        batches = [reference.batch for reference in self.references]
        self._teacher = Teacher(self.dense, batches, room=KEPT_BYTES, reduce=of_this_rank)
        self._refitted: dict[Plan, float] = {}
        self._bases = gated_bases(model.get_base_model(), self.layout, self.names)

    def _is_enough(self) -> bool:
        return len(self.references) > 1 and sum(float(each.mask.sum()) for each in self.references) >= self._most

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""
        used, given = len(self.references), self._given
        part = "" if used == given else f", on the first {used} of {given} batches"
        return f"{super().meaning}{part}"

    def _judged(self, plan: Plan) -> float:
        return self._refitted_loss(plan)

    def depth_losses(self, least: int) -> dict[int, float]:
        """The measured loss of dropping layers and nothing else, by how many remain: a few, and others in between."""
        self._drop_layers(least)
        masked = self._by_depth(self._order_loss)
        counts = sorted(count for count, loss in masked.items() if loss > 0)
        if not counts:
            return masked
        places = np.unique(np.linspace(0, len(counts) - 1, min(DEPTHS, 2 + len(counts) // 4)).round().astype(int))
        known = [counts[place] for place in places]
        steps = progress_bar(self._progress, iterable=known, desc=REFITS, leave=False)
        ratios = [
            np.log(max(self._refitted_loss(self.without_layers(count)), 1e-9) / masked[count]) for count in steps
        ]
        found = {count: masked[count] * float(np.exp(np.interp(count, known, ratios))) for count in counts}
        highest = np.maximum.accumulate([found[count] for count in reversed(counts)])  # fewer layers lose no less
        return masked | dict(zip(reversed(counts), highest.tolist(), strict=True))

    def _refitted_loss(self, plan: Plan) -> float:
        if plan.keeps_all:
            return 0.0
        if plan not in self._refitted:
            try:
                check_legal(self.layout, plan.shape)
            except IllegalShapeError:  # head counts that exist at another hidden size alone
                return self.loss(plan)
            self._refitted[plan] = self._kept.value(name_of("refitted", plan), lambda: self._refit(plan))
        return self._refitted[plan]

    def _refit(self, plan: Plan) -> float:
        turn = plan_turn(self.dense, plan, self._bases)
        small = slim(self.dense, plan, turn=turn, layout=self._dense_layout)
        coordinates = None if turn is None else turn.write
        report = self._teacher.refit(small, plan, coordinates=coordinates)
        logger.debug("%s: %s", plan, report)
        return min(report.before, report.after)


def obstacle(model: PeftModel, batches: Sequence[Batch], towers: Sequence[str] | None = None) -> str:
    """
    Why a gated model's shapes cannot be judged by refitted models; empty if they can.

    Args:
        model: with gates placed by a family row.
        batches: calibration batches.
        towers: the gated ones that are cut; all if left out.
    """
    if any(LORA_OUT & set(name.split(".")) and parameter.any() for name, parameter in model.named_parameters()):
        return "what LoRA has learned is not in the dense weights"
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        return "quantized weights cannot be sliced"
    base = cast(PreTrainedModel, model.get_base_model())
    layers = [
        (layout, layer)
        for layout in locate_all(base)
        if towers is None or layout.tower in towers
        for layer in range(layout.dense.sizes()["num_hidden_layers"])
    ]
    ends = [name for layout, layer in layers for name in (layout.attention_out(layer), layout.ffn_out(layer))]
    if not all(ends):
        return "the outputs of attention and FFN are not known, which are what is refitted"
    if not all(is_projection(base.get_submodule(name)) for name in ends):
        return "outputs of attention or FFN are no linear maps (experts are none), which are what is refitted"
    if len(batches) == 1 and len(main_input(base, batches[0])) < 2:
        return "one row of calibration data is too little: none can be held out"
    return ""
