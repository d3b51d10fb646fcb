"""
The PEFT tuner: what its gates become, a plan and a slim model.

Long because these are the calls of every user, documented in full.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .basis.bases import Change, heads_basis
from .basis.basis import moved_stream, stream_basis
from .basis.heads.turn import head_turn
from .basis.rotation import exported_turn
from .errors import HawAdaError, InvalidPlanError
from .gates.adapter import GateAdapter
from .gates.placement import set_masks
from .gates.reading import gate_scores
from .planning.plan import Plan
from .planning.towers import Ratio, Sizes, check_towers, each_of, plan_towers
from .shipping.facts import calibration_facts
from .shipping.save import Slimmed
from .surgery.comparison import check_binary, check_gates
from .surgery.conformity import vanilla_tensors
from .surgery.cutting import Cutting
from .surgery.gated import Gated
from .surgery.slimming import check_exists
from .tuner import GateTuner
from .vanilla.batches import Batch
from .vanilla.family import Layout
from .vanilla.modules import check_unquantized
from .vanilla.shape import Shape


class HawAdaModel(GateTuner):
    """
    Gates on a frozen model: what `get_peft_model` makes of a `HawAdaConfig`.

    Besides PEFT's own methods it has `plan`, `apply_plan`, and a `merge_and_unload` that removes what a plan closes.
    `PeftModel` passes all of them on. It is made from the base model, whose modules are wrapped in place.

    Example:

        >>> model = get_peft_model(base, HawAdaConfig())
        >>> model.apply_plan(model.plan(keep_ratio=0.5))
        >>> slim = model.merge_and_unload()
    """

    def plan(
        self,
        shape: Sizes | None = None,
        *,
        keep_ratio: Ratio | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> Plan:
        """
        Rank the units by their gates into a legal plan. Nothing is changed; see `apply_plan`.

        Args:
            shape (`Shape` or `dict`, *optional*): the sizes of the slim model; what it leaves out stays as it is. By
                the paths of config fields, `{"text_config.intermediate_size": 512}`, or a `Shape` for each tower,
                where several are gated.
            keep_ratio (`float` or `dict[str, float]`, *optional*): kept over total, for heads and FFN, or by axis:
                `{"heads": 0.5, "ffn": 0.5, "layers": 0.75, "hidden": 0.75}`, of every tower or of one:
                `{"vision_config.ffn": 0.5}`. Rounded to the nearest legal sizes.
            adapter_names (`list[str]`, *optional*): whose gates count (their product); the active ones if left out.

        With neither, units whose gate is below 0.5 are closed, and the sizes rounded up to legal ones.

        Returns:
            `Plan`: a legal one; its `roundings` say what became of the sizes that were asked for.

        Raises:
            IllegalShapeError: if no vanilla model of the shape exists; the message says which do.
            InvalidPlanError: if something is to be cut that has no gates, or both arguments are given.
            BrokenGatesError: if gates hold NaN.
        """
        if shape is not None and keep_ratio is not None:
            raise InvalidPlanError("give either `shape` or `keep_ratio`, not both")
        if shape is not None and not isinstance(shape, Shape | Mapping):
            raise InvalidPlanError(f"shape must be a Shape, got {shape!r}; for a ratio use `plan(keep_ratio=...)`")
        names = self._names(adapter_names)
        self._check_gated()
        layouts = self.layouts_of(names)
        plan = plan_towers(layouts, lambda layout: gate_scores(self.model, layout, names), shape, keep_ratio)
        self._check_exists(layouts, plan)
        return plan

    def apply_plan(self, plan: Plan | None, *, in_training: bool = False, adapter_name: str | None = None) -> None:
        """
        Close what the plan removes: from now on evaluation computes exactly what the slim model will.

        Kept units keep their soft values, which the export folds into the weights. The plan is saved with the adapter.

        Args:
            plan (`Plan`, *optional*): `None` opens everything again.
            in_training (`bool`): close the gates in training as well.
            adapter_name (`str`, *optional*): whose gates to close; those of the one active adapter if left out.

        Raises:
            IncompatibleBaseError: if the plan is for a model of other sizes.
            IllegalShapeError: if no vanilla model of its shape exists.
            InvalidPlanError: if it closes something without gates, several adapters are active, or they are merged.
        """
        name = self._one_name(adapter_name)
        self._check_gated()
        config = copy.copy(self.peft_config[name])
        if plan is not None and not isinstance(plan, Plan):
            raise InvalidPlanError(f"plan must be a Plan, got a {type(plan).__name__}; see `Plan.from_dict`")
        if any(isinstance(module, GateAdapter) and module.merged for module in self.model.modules()):
            raise InvalidPlanError("the gates are merged into the weights; call `unmerge_adapter()` first")
        if plan is not None:
            self._check_exists(self.layouts_of([name]), plan)
        self.set_masks(plan, name, in_training=in_training)
        config.plan = None if plan is None else plan.to_dict()
        config.plan_in_training = in_training and plan is not None
        self.peft_config[name] = config

    def applied_plan(self, adapter_names: Sequence[str] | None = None) -> Plan | None:
        """
        The plan that is applied to the active (or given) adapters, if any.

        Raises:
            InvalidPlanError: if they have different ones.
        """
        plans = {name: self.peft_config[name].plan for name in self._names(adapter_names)}
        applied = [Plan.from_dict(plan) for plan in plans.values() if plan is not None]
        if len(set(applied)) > 1:
            raise InvalidPlanError(
                f"the adapters {list(plans)} have different plans; pass `plan`, or merge them one at a time"
            )
        return applied[0] if applied else None

    def set_masks(self, plan: Plan | None, adapter_name: str | None = None, *, in_training: bool = False) -> None:
        """
        Close what a plan removes, whatever its legality, and without a word in the config: for as long as it is tried.

        Args:
            plan (`Plan`, *optional*): `None` opens everything.
            adapter_name (`str`, *optional*): whose gates; those of the one active adapter if left out.
            in_training (`bool`): in training as well.

        Raises:
            InvalidPlanError: if it closes something without gates, or several adapters are active.
        """
        name = self._one_name(adapter_name)
        set_masks(self.model, each_of(self.layouts_of([name]), plan), name, in_training=in_training)

    def slim(
        self,
        *,
        adapter_names: Sequence[str] | None = None,
        plan: Plan | None = None,
        fold: bool = True,
        calibration: Iterable[Batch] | None = None,
        verify: bool = True,
        inputs: Batch | None = None,
        safe_merge: bool = False,
        progressbar: bool = False,
    ) -> Slimmed:
        """
        Fold the gates into the weights and remove what the plan closes, all or nothing.

        The slim model is built beside the gated one and compared with it; then the gates are taken off. Whatever fails
        before that leaves the gated model as it was. Afterwards the base model is the dense one again, bit for bit,
        and shares no memory with the slim model.

        Args:
            adapter_names (`list[str]`, *optional*): adapters to merge; the active ones if left out.
            plan (`Plan`, *optional*): what to keep, instead of the applied plan.
            fold (`bool`): `False` leaves the soft values out and only removes.
            calibration (*optional*): batches, keyword arguments of the forward pass. The slim model's output
                projections are refitted on them to the dense model (`reconstruct`), if held-out ones say it is better.
            verify (`bool`): run the gated and the slim model once, before any refitting, and compare their logits.
                Not done for a `plan` that closes what has no gates.
            inputs (*optional*): what to compare them on, keyword arguments of the forward pass; drawn if left out.
            safe_merge (`bool`): as in PEFT: also check the folded weights that are not kept for NaN.
            progressbar (`bool`): show progress, also of the reconstruction.

        Returns:
            `Slimmed`: the slim model, the dense one, the plan, the reconstruction; `.save(folder)` writes it. If the
            plan keeps everything the model is the base model with the gates in its weights, and there is no dense one.

        Raises:
            InvalidPlanError: if there is no plan, or no gates any more; if the plan keeps directions of the residual
                stream, and the adapter gates its channels, or the reverse.
            IncompatibleBaseError, IllegalShapeError: as `apply_plan`.
            BrokenGatesError: if gates or weights hold NaN or infinity.
            UnsupportedModelError: if weights are quantized, offloaded or not those of the model's class.
            VerificationError: if the slim model computes something else than the gated one.
            HawAdaError: if the model does not run on drawn inputs; as `reconstruct`.
        """
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence | None):
            raise InvalidPlanError(f"adapter_names must be a list of names, got {adapter_names!r}")
        names = self._names(adapter_names)
        if not names:
            raise InvalidPlanError(f"adapter_names names none; there are {list(self.peft_config)}")
        self._check_gated()
        chosen = self.applied_plan(names) if plan is None else plan
        if not isinstance(chosen, Plan):
            raise InvalidPlanError(
                "there is no plan: `model.apply_plan(model.plan(keep_ratio=0.5))` (or `plan(shape=Shape(...))`) "
                "before it, or pass one as `plan`"
                if chosen is None
                else f"plan must be a Plan, got a {type(chosen).__name__}; see `Plan.from_dict`"
            )
        check_towers(self.layouts_of(names), chosen)
        turn_of = self._turn_of(names, chosen, fold)
        if not isinstance(calibration, Iterable | None) or isinstance(calibration, Mapping):
            raise HawAdaError(f"calibration must be a list of batches, got a {type(calibration).__name__}")
        base = cast(PreTrainedModel, self.model)
        check_unquantized(base)
        self._check_merge_allowed()
        check_gates(base)
        gated = self._gated(names, plan, fold, safe_merge, progressbar, turn_of)
        if chosen.keeps_all and turn_of is None:
            return Slimmed(model=gated.merged(verify=verify, inputs=inputs), plan=chosen)
        batches = None if calibration is None else list(calibration)
        small, reference, report = gated.slimmed(
            chosen, calibration=batches, verify=verify, inputs=inputs, progress=tqdm if progressbar else None
        )
        facts = None if batches is None else calibration_facts(batches)
        return Slimmed(small, chosen, dense=base, reconstruction=report, calibration=facts, reference=reference)

    @contextmanager
    def beside(self) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
        """
        The dense model and the slim one of the applied plan, while the gated model stays as it is.

        Nothing of the dense model is copied, so that neither may be changed but the slim one.

        Raises:
            InvalidPlanError: if there is no plan.
            UnsupportedModelError: as `slim`.
        """
        names, plan = self._names(None), self.applied_plan()
        if plan is None:
            raise InvalidPlanError("there is no plan: `model.apply_plan(...)` before it")
        self._check_merge_allowed()
        gated = self._gated(names, None, True, False, False, self._turn_of(names, plan, True))
        with gated.beside(plan) as pair:
            yield pair

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        plan: Plan | None = None,
        fold: bool = True,
        calibration: Iterable[Batch] | None = None,
        verify: bool = True,
        inputs: Batch | None = None,
    ) -> nn.Module:
        """
        Fold the gates into the weights and remove what the plan closes: a vanilla model, without any adapter.

        The `.model` of `slim`: what it computes is what the gated model computes, except by reconstruction, when that
        is asked for. All or nothing, and the base model is the dense one again. Without a plan nothing is removed: as
        in PEFT the base model is used up then, and returned with the gates in its weights.

        Args:
            progressbar: as in PEFT.
            safe_merge: as in PEFT.
            adapter_names: as in PEFT.
            plan: as in `slim`.
            fold: as in `slim`.
            calibration: as in `slim`.
            verify: as in `slim`.
            inputs: as in `slim`.

        Returns:
            `nn.Module`: the vanilla model.

        Raises:
            HawAdaError, VerificationError: as `slim`; nothing has been changed then.
        """
        names = self._names(adapter_names)
        self._check_gated()
        removes, placed = plan is not None or self.applied_plan(names) is not None, self._are_placed(names)
        if not removes and placed:
            layouts = self.layouts_of(names)
            # Nothing in place can take up what scales directions.
            if any(moved_stream(self.model, layout, name) for layout in layouts for name in names):
                plan = Plan.of_towers([Plan.keep_all(layout.dense, layout.tower) for layout in layouts])
        if removes or plan is not None:
            return self.slim(
                adapter_names=names,
                plan=plan,
                fold=fold,
                calibration=calibration,
                verify=verify,
                inputs=inputs,
                safe_merge=safe_merge,
                progressbar=progressbar,
            ).model
        check_binary(self.model, names)
        warnings.warn(
            "merge_and_unload folded the gates and removed nothing, because no plan is applied. To get a smaller "
            "model: `model.apply_plan(model.plan(keep_ratio=0.5))` (or `plan(shape=Shape(...))`) before it.",
            stacklevel=2,
        )
        self._check_merge_allowed()
        gated = self._gated(names, None, True, safe_merge, progressbar)
        return gated.merged(verify=verify and gated.layouts is not None, inputs=inputs)

    def _gated(
        self,
        names: Sequence[str],
        instead: Plan | None,
        fold: bool,
        safe_merge: bool,
        progressbar: bool,
        turn_of: Callable[[PreTrainedModel], Change] | None = None,
    ) -> Gated:
        return Gated(
            base=cast(PreTrainedModel, self.model),
            names=names,
            layouts=self.layouts_of(names) if self._are_placed(names) else None,
            instead=instead,
            fold=fold,
            merge=partial(super().merge_and_unload, progressbar, safe_merge, list(names)),
            unload=super().unload,
            turn_of=turn_of,
        )

    def _check_exists(self, layouts: Sequence[Layout], plan: Plan) -> None:
        """Check that a plan is one for these towers, and that what it leaves is what the class builds."""
        check_exists(Cutting(check_towers(layouts, plan)), vanilla_tensors(self.model))

    def _are_placed(self, names: Sequence[str]) -> bool:
        """Whether all gates were placed by a family row."""
        return bool(names) and all(self.peft_config[name].base_sizes is not None for name in names)

    def _turn_of(self, names: Sequence[str], plan: Plan, fold: bool) -> Callable[[PreTrainedModel], Change] | None:
        """What gives the residual stream, and heads, the coordinates that a plan keeps, if these are of a basis."""
        layout = self.layout_of(names)
        basis, factor = stream_basis(self.model, layout, names, plan, fold=fold)
        heads = heads_basis(self.model, layout, names, plan)
        if basis is None and heads is None:
            return None

        def change(dense: PreTrainedModel) -> Change:
            stream = None if basis is None else exported_turn(dense, plan, basis, factor=factor)
            return Change(stream, head_turn(dense, plan, heads))

        return change

    def _names(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence | None):
            raise InvalidPlanError(f"adapter_names must be a list of names, got {adapter_names!r}")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        if not names:
            raise InvalidPlanError(f"adapter_names names none; there are {list(self.peft_config)}")
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise InvalidPlanError(f"there is no adapter {unknown}; there are {list(self.peft_config)}")
        return names

    def _one_name(self, adapter_name: str | None) -> str:
        names = self._names(None if adapter_name is None else [adapter_name])
        if len(names) != 1:
            raise InvalidPlanError(f"name one of the active adapters {names} as `adapter_name`")
        return names[0]
