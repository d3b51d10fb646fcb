"""A gated model made slim, all or nothing: beside it, or in its place where nothing is removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError
from ..gates.kinds import SigmoidGate
from ..gates.lora import merge_lora
from ..gates.placement import set_masks
from ..planning.plan import Plan
from ..planning.towers import each_of
from ..progress import Progress
from ..refit.reconstruction import Reconstruction, reconstruct
from ..vanilla.batches import Batch
from ..vanilla.family import Layout
from .comparison import Reference, check_computes, check_finite, reference_of
from .dense import dense_view, put_back, take_off, unmerge, unshare
from .slimming import slim
from .source import StreamChange


@dataclass(frozen=True)
class Gated:
    """
    A model with gates in it, and what of them becomes part of its weights.

    Args:
        base: with adapters in it.
        names: the adapters that count.
        layouts: of the towers that are gated; None if gates were placed by the names of modules.
        instead: the plan to go by in place of the applied one.
        fold: whether the soft values are folded into the weights; if not, the gates are only taken off.
        merge: PEFT's merging of these adapters: gives the base model without them.
        unload: PEFT's way of taking adapters off: gives the base model without them.
        turn_of: gives new coordinates of the residual stream, of the base model with the gates in its weights.
    """

    base: PreTrainedModel
    names: Sequence[str]
    layouts: Sequence[Layout] | None
    instead: Plan | None
    fold: bool
    merge: Callable[[], nn.Module]
    unload: Callable[[], nn.Module]
    turn_of: Callable[[PreTrainedModel], StreamChange] | None = None

    def slimmed(
        self,
        plan: Plan,
        *,
        calibration: Sequence[Batch] | None = None,
        verify: bool = True,
        inputs: Batch | None = None,
        progress: Progress | None = None,
    ) -> tuple[PreTrainedModel, Reference | None, Reconstruction | None]:
        """
        Build the slim model beside the gated one, compare the two, refit it; then take the adapters off.

        Args:
            plan: the one to go by, checked; it removes something.
            calibration: batches to refit the slim model on.
            verify: compare the slim model with the gated one, before any refitting.
            inputs: what to compare on; drawn if left out.
            progress: wraps what takes long.

        Returns:
            The slim model; what the gated one computes, if compared; what the refitting did. The base model is the
            dense one again. If anything fails, it is as it was.

        Raises:
            BrokenGatesError: if weights hold NaN or infinity.
            VerificationError: if the slim model computes something else than the gated one.
            HawAdaError: if the model does not run on drawn inputs; as `reconstruct`.
        """
        report = None
        with put_back(self.base, always=True):
            unmerge(self.base)
            dense = dense_view(self.base)
            reference = self._reference(inputs, dense) if verify else None
            small, turn = self._cut(plan)
            check_finite(small)
            if reference is not None:
                check_computes(small, reference, self.base, dense, turn, hidden=plan.hidden)
            if calibration is not None:
                coordinates = None if turn is None else turn.write
                report = reconstruct(dense, small, plan, calibration, coordinates=coordinates, progress=progress)
        with put_back(self.base, always=False):
            unmerge(self.base)
            take_off(self.base)
        return small, reference, report

    @contextmanager
    def beside(self, plan: Plan) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
        """
        The dense model and the slim one of a plan, while the gated model stays as it is.

        Nothing of the dense model is copied, so that neither may be changed but the slim one.
        """
        with put_back(self.base, always=True):
            unmerge(self.base)
            yield dense_view(self.base), self._cut(plan)[0]

    def _cut(self, plan: Plan) -> tuple[PreTrainedModel, StreamChange | None]:
        with put_back(self.base, always=True):
            self._fold()
            turn = None if self.turn_of is None else self.turn_of(self.base)
            return slim(self.base, plan, turn=turn), turn

    def merged(self, *, verify: bool = True, inputs: Batch | None = None) -> PreTrainedModel:
        """
        Merge the gates into the base model's weights, and take them off; or leave it as it was.

        Args:
            verify: compare what it computes before and after.
            inputs: what to compare on; drawn if left out.

        Raises:
            VerificationError, HawAdaError: as `slimmed`.
        """
        reference, dense = None, None
        with put_back(self.base, always=False):
            if verify:
                with put_back(self.base, always=True):
                    unmerge(self.base)
                    dense = dense_view(self.base)
                    reference = self._reference(inputs, dense)
            merged = cast(PreTrainedModel, self._fold())
            if reference is not None:
                check_computes(merged, reference, self.base, dense)
        return merged

    def _fold(self) -> nn.Module:
        """Merge LoRA and gates into the weights, and take them off; with `fold=False` the gates are only taken off."""
        if self.instead is not None:
            unmerge(self.base)
            self._mask(None)  # another plan's closed units must not be folded away
        unshare(self.base)
        merge_lora(self.base, self.names)
        if self.fold:
            return self.merge()
        unmerge(self.base)
        return self.unload()

    def _reference(self, inputs: Batch | None, dense: PreTrainedModel) -> Reference | None:
        """What the gated model computes under a plan; None if it closes what has no gates. Within `put_back`."""
        if self.instead is not None:
            try:
                self._mask(self.instead)
            except InvalidPlanError:
                return None
        if not self.fold:
            for module in self.base.modules():
                if isinstance(module, SigmoidGate):
                    module.theta.data = torch.full_like(module.theta, module.start.theta)
        return reference_of(self.base, self.names, inputs, fresh=dense)

    def _mask(self, plan: Plan | None) -> None:
        if self.layouts is not None:
            for name in self.names:
                set_masks(self.base, each_of(self.layouts, plan), name)
