"""The PEFT tuner: places gates, and turns them into a plan and a slim model."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, ModulesToSaveWrapper
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._register import PREFIX
from .basis.basis import Basis, basis_gate, gate_basis, is_centred
from .basis.proof import check_exact
from .basis.rotation import plan_turn
from .config import HawAdaConfig
from .errors import HawAdaError, IncompatibleBaseError, InvalidPlanError, UnsupportedModelError
from .gates.adapter import HIDDEN_UNITS, LAYER, UNITS, GateAdapter
from .gates.concrete import AttentionHeadAdapter, ChannelAdapter
from .gates.hidden import HiddenAdapter, norm_sizes
from .gates.kinds import ChannelGate, HiddenGate, SigmoidGate
from .gates.lora import inject_lora, lora_layers, merge_lora
from .gates.placement import Masks, family_gates, masks_of, stream_gate
from .gates.reading import gate_scores, hidden_gate
from .gates.rows import adapter_per_row
from .gates.saved import check_adapter_tensors, check_modules_to_save
from .gates.stream_basis import BasisGate
from .planning.plan import Plan
from .planning.ranking import rank
from .planning.reasons import explained
from .planning.sizes import hidden_multiple, open_shape, ratio_shape
from .refit.reconstruction import reconstruct
from .shipping.facts import calibration_facts
from .shipping.save import Slimmed
from .surgery.conformity import check_conforms, vanilla_tensors
from .surgery.dense import dense_view, put_back, take_off, unshare
from .surgery.merge import Reference, check_computes, check_finite, check_gates, reference_of
from .surgery.slimming import slim
from .vanilla.batches import Batch
from .vanilla.family import FAMILIES, FFN, HEADS, HIDDEN, TARGET_MODULES, Layout, find_module, hidden_home, locate
from .vanilla.legality import check_layers, check_legal, fit_hidden, legal_head_shapes
from .vanilla.modules import (
    check_loaded,
    check_own_weights,
    check_unquantized,
    feature_dim,
    feature_sizes,
    quantized_weight,
)
from .vanilla.shape import Shape
from .vanilla.skeleton import check_constructor

_Options = tuple[bool, bool, Sequence[str]]
"""PEFT's `progressbar`, `safe_merge`, `adapter_names`."""


class HawAdaModel(BaseTuner):
    """
    Gates on a frozen model: what `get_peft_model` makes of a `HawAdaConfig`.

    Besides PEFT's own methods it has `plan`, `apply_plan`, and a `merge_and_unload` that removes what a plan closes.
    `PeftModel` passes all of them on. It is made from the base model, whose modules are wrapped in place.

    Example:

        >>> model = get_peft_model(base, HawAdaConfig())
        >>> model.apply_plan(model.plan(keep_ratio=0.5))
        >>> slim = model.merge_and_unload()
    """

    prefix = PREFIX
    tuner_layer_cls = GateAdapter
    target_module_mapping = TARGET_MODULES

    peft_config: dict[str, HawAdaConfig]  # type: ignore[assignment]
    _place: Layout  # of the model into which gates are injected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT; what is no tensor of this adapter is refused before any of it is loaded."""
        found: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_adapter_tensors(model, adapter_name, found)
        return found

    def _prepare_adapter_config(  # type: ignore[override]  # only this tuner's config arrives here
        self, peft_config: HawAdaConfig, model_config: dict[str, Any]
    ) -> HawAdaConfig:
        if peft_config.base_sizes is not None:
            self._place = self._located()
            _check_base(peft_config, self._place)
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            # PEFT tells tuner layers on linear modules by the name of their class; ours wrap convolutions too.
            wrapped = {
                name
                for name, module in self.model.named_modules()
                if isinstance(module, GateAdapter) and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
            }
            _maybe_include_all_linear_layers(peft_config, self.model)  # writes the names into the config
            peft_config.target_modules = set(peft_config.target_modules) | wrapped  # type: ignore[assignment]  # PEFT's own convention
        model_type = model_config.get("model_type")
        if peft_config.target_modules is not None or (
            model_type in self.target_module_mapping and model_type not in FAMILIES
        ):
            return cast(HawAdaConfig, super()._prepare_adapter_config(peft_config, model_config))
        layout = self._place = self._located()
        ends = {HEADS: layout.family.attention_out, FFN: layout.family.ffn_out}
        whole = {"blocks", "layers"} & set(peft_config.gates)
        names = {end for axis, end in ends.items() if whole or axis in peft_config.gates}
        if HIDDEN in peft_config.gates:
            _check_norms(self.model, layout)
            if peft_config.rotate:
                check_exact(layout)
            names |= {*layout.family.hidden_norms, layout.norms[-1]}
        peft_config.target_modules = names  # type: ignore[assignment]
        peft_config.base_sizes = layout.fingerprint()
        return peft_config

    def _located(self) -> Layout:
        """The base model's layout. What no slim model of its class could hold is refused before any training."""
        layout = locate(self.model)
        check_loaded(self.model)
        check_constructor(layout.model_class)
        if quantized_weight(self.model) is None:
            check_conforms(layout, vanilla_tensors(self.model))
        return layout

    def _prepare_model(self, peft_config: HawAdaConfig, model: nn.Module) -> None:  # type: ignore[override]
        if peft_config.lora is not None:
            name = next(name for name, config in self.peft_config.items() if config is peft_config)
            fields = cast(dict[str, Any], peft_config.lora)
            inject_lora(model, fields, name, inference_mode=peft_config.inference_mode)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: HawAdaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layout = None if peft_config.base_sizes is None else self._place
        position = None if layout is None else layout.position(current_key)
        twin = self._twin(layout, position)
        gates: dict[str, SigmoidGate]
        cls: type[GateAdapter] = ChannelAdapter
        if layout is not None and position is not None and position[1] == HIDDEN:
            cls, gates = HiddenAdapter, {}
            if current_key == hidden_home(layout):
                gates[HIDDEN_UNITS] = stream_gate(
                    layout,
                    centred=is_centred(self.model, layout) if peft_config.rotate else None,
                    group_size=peft_config.group_size,
                    start=peft_config.start(),
                )
        elif layout is not None and position is not None:
            cls = AttentionHeadAdapter if position[1] == HEADS else ChannelAdapter
            gates = family_gates(
                layout,
                position[1],
                feature_sizes(target)[0],
                kinds=peft_config.gates,
                group_size=peft_config.group_size,
                start=peft_config.start(),
            )
            if twin is not None and adapter_name in getattr(twin, LAYER):
                gates.pop(LAYER, None)
        else:
            base = target.get_base_layer() if isinstance(target, GateAdapter) else target
            size, dim, start = feature_sizes(target)[0], feature_dim(base), peft_config.start()
            gates = {UNITS: ChannelGate(size, peft_config.group_size, dim=dim, start=start, relative=True)}
        if isinstance(target, GateAdapter):
            adapter: GateAdapter = target
            adapter.update_layer(adapter_name, gates, peft_config.inference_mode)
        else:
            adapter = cls(target, adapter_name, gates=gates, inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                adapter.requires_grad_(False)
            self._replace_module(parent, target_name, adapter, target)
        if twin is not None:
            adapter.share_layer_gate(twin)
            twin.share_layer_gate(adapter)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(child, GateAdapter):
            child.release()

    def _twin(self, layout: Layout | None, position: tuple[int, str] | None) -> GateAdapter | None:
        """The adapter at the other end of the layer, where a layer's shared gate may live."""
        if layout is None or position is None or position[1] == HIDDEN:
            return None
        layer, axis = position
        other = self.model.get_submodule(layout.ffn_out(layer) if axis == HEADS else layout.attention_out(layer))
        return other if isinstance(other, GateAdapter) else None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target modules, and apply the plan that a saved config carries. Arguments as in PEFT."""
        config = self.peft_config[adapter_name]
        if config._saved is not None:
            check_modules_to_save(self.model, config.modules_to_save or (), config._saved)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if config.base_sizes is not None and HIDDEN in config.gates:
            norms = [self.model.get_submodule(name) for name in self._place.norms]
            wrapped = [norm for norm in norms if isinstance(norm, HiddenAdapter)]
            for adapter in wrapped[1:]:
                adapter.share_hidden_gate(wrapped[0])
            for site, norm in enumerate(norms):
                if isinstance(norm, HiddenAdapter):
                    norm.site = site
        if config.plan is not None:
            self.set_masks(Plan.from_dict(config.plan), adapter_name, in_training=config.plan_in_training)

    # ------------------------------------------------------------------ plan

    def plan(
        self,
        shape: Shape | None = None,
        *,
        keep_ratio: float | Mapping[str, float] | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> Plan:
        """
        Rank the units by their gates into a legal plan. Nothing is changed; see `apply_plan`.

        Args:
            shape (`Shape`, *optional*): the sizes of the slim model; what it leaves out stays as it is.
            keep_ratio (`float` or `dict[str, float]`, *optional*): kept over total, for heads and FFN, or by axis:
                `{"heads": 0.5, "ffn": 0.5, "layers": 0.75, "hidden": 0.75}`. Rounded to the nearest legal sizes.
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
        if shape is not None and not isinstance(shape, Shape):
            raise InvalidPlanError(f"shape must be a Shape, got {shape!r}; for a ratio use `plan(keep_ratio=...)`")
        names = self._names(adapter_names)
        self._check_gated()
        layout = self.layout_of(names)
        scores, given = gate_scores(self.model, layout, names), shape is not None
        if shape is None:
            legal = legal_head_shapes(layout)
            if keep_ratio is None:
                shape = open_shape(layout, scores, legal)
            else:
                shape = ratio_shape(layout, keep_ratio, legal, scores.group_size)
            if shape.hidden_size is not None:
                step = hidden_multiple(layout, scores.hidden_group)
                shape = fit_hidden(layout, shape, step=step, at_least=keep_ratio is None)
        shape = layout.complete(shape)
        check_legal(layout, shape)
        plan = rank(layout, scores, shape)
        if given:
            return plan
        return dataclasses.replace(plan, roundings=explained(layout, scores, shape, keep_ratio))

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
            layout = self.layout_of([name])
            plan.check_base(layout.full)
            check_legal(layout, plan.shape)
            check_layers(layout, plan.layers)
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
        adapter_name = self._one_name(adapter_name)
        layout = self.layout_of([adapter_name])
        sizes = layout.dense.sizes()
        masks: Masks = []
        for layer in range(sizes["num_hidden_layers"]):
            for axis, end, total in (
                (HEADS, layout.attention_out(layer), sizes["num_attention_heads"]),
                (FFN, layout.ffn_out(layer), sizes["intermediate_size"]),
            ):
                adapter = self.model.get_submodule(end)
                gates = adapter.gates(adapter_name) if isinstance(adapter, GateAdapter) else {}
                if plan is None:
                    masks += [(gate, None) for gate in gates.values()]
                else:
                    masks += masks_of(gates, plan.kept(axis, layer), total, f"{axis} in layer {layer}")
        stream = hidden_gate(self.model, layout, adapter_name)
        if stream is not None or (plan is not None and plan.hidden is not None):
            gates = {} if stream is None else {UNITS: stream}
            everything = tuple(range(layout.hidden_size))
            kept = everything if plan is None or plan.hidden is None else plan.hidden
            if plan is not None and plan.hidden is not None and stream is not None:
                _check_coordinates(plan, stream)
            masks += masks_of(gates, kept, len(everything), "channels of the residual stream (gates on 'hidden')")
        for gate, mask in masks:
            gate.set_plan(mask, in_training=in_training and plan is not None)

    def layout_of(self, adapter_names: Sequence[str]) -> Layout:
        """
        The layout of the model that adapters' plans speak of.

        Raises:
            InvalidPlanError: if gates of an adapter were not placed by a family row.
        """
        by_name = [name for name in adapter_names if self.peft_config[name].base_sizes is None]
        if by_name or not adapter_names:
            raise InvalidPlanError(
                f"adapter {by_name or 'none'} gates modules that were named by `target_modules`; only gates placed by "
                "a family row can be planned. Leave `target_modules` out of the config."
            )
        return locate(self.model)

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

    # ---------------------------------------------------------------- export

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
        names = self._names(adapter_names)
        self._check_gated()
        chosen = self.applied_plan(names) if plan is None else plan
        if not isinstance(chosen, Plan):
            raise InvalidPlanError(
                "there is no plan: `model.apply_plan(model.plan(keep_ratio=0.5))` (or `plan(shape=Shape(...))`) "
                "before it, or pass one as `plan`"
                if chosen is None
                else f"plan must be a Plan, got a {type(chosen).__name__}; see `Plan.from_dict`"
            )
        layout = self.layout_of(names)
        chosen.check_base(layout.full)
        check_legal(layout, chosen.shape)
        check_layers(layout, chosen.layers)
        stream, factor = self.stream_basis(names, chosen, fold=fold)
        base = cast(PreTrainedModel, self.model)
        check_unquantized(base)
        self._check_merge_allowed()
        check_gates(base)
        masks = None if plan is None else (plan,)
        options = (progressbar, safe_merge, names)
        if chosen.keeps_all and stream is None:
            model = self._merged_in_place(options, fold=fold, masks=masks, verify=verify, inputs=inputs)
            return Slimmed(model=cast(PreTrainedModel, model), plan=chosen)
        if not isinstance(calibration, Iterable | None) or isinstance(calibration, Mapping):
            raise HawAdaError(f"calibration must be a list of batches, got a {type(calibration).__name__}")
        batches = None if calibration is None else list(calibration)
        with put_back(base, always=True):
            self._restore()
            dense = dense_view(base)
            reference = self._reference(names, masks, fold, inputs, dense) if verify else None
            with put_back(base, always=True):
                self._fold(options, fold, masks)
                turn = None if stream is None else plan_turn(base, chosen, stream, factor=factor)
                small = slim(base, chosen, turn=turn)
            check_finite(small)
            if reference is not None:
                check_computes(small, reference, base, dense, turn, chosen.hidden)
            progress = tqdm if progressbar else None
            coordinates = None if turn is None else turn.write
            report = None
            if batches is not None:
                report = reconstruct(dense, small, chosen, batches, coordinates=coordinates, progress=progress)
        with put_back(base, always=False):
            self._restore()
            take_off(base)
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
        base = cast(PreTrainedModel, self.model)
        self._check_merge_allowed()
        with put_back(base, always=True):
            self._restore()
            dense = dense_view(base)
            with put_back(base, always=True):
                self._fold((False, False, names), True, None)
                small = slim(base, plan)
            yield dense, small

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
            progressbar, safe_merge, adapter_names: as in PEFT.
            plan, fold, calibration, verify, inputs: as in `slim`.

        Returns:
            `nn.Module`: the vanilla model.

        Raises:
            HawAdaError, VerificationError: as `slim`; nothing has been changed then.
        """
        names = self._names(adapter_names)
        self._check_gated()
        by_row = all(self.peft_config[name].base_sizes is not None for name in names)
        removes = plan is not None or self.applied_plan(names) is not None
        if not removes and by_row and any(self._moved_stream(name) for name in names):
            plan = Plan.keep_all(self.layout_of(names).dense)  # nothing in place can take up what scales directions
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
        warnings.warn(
            "merge_and_unload folded the gates and removed nothing, because no plan is applied. To get a smaller "
            "model: `model.apply_plan(model.plan(keep_ratio=0.5))` (or `plan(shape=Shape(...))`) before it.",
            stacklevel=2,
        )
        self._check_merge_allowed()
        options = (progressbar, safe_merge, names if adapter_names is None else adapter_names)
        placed = all(self.peft_config[name].base_sizes is not None for name in names)
        return self._merged_in_place(options, fold=True, masks=None, verify=verify and placed, inputs=inputs)

    def _merged_in_place(
        self, options: _Options, *, fold: bool, masks: tuple[Plan | None] | None, verify: bool, inputs: Batch | None
    ) -> nn.Module:
        """The base model with the gates in its weights and without adapters, or as it was."""
        base, reference, dense = cast(PreTrainedModel, self.model), None, None
        with put_back(base, always=False):
            if verify:
                with put_back(base, always=True):
                    self._restore()
                    dense = dense_view(base)
                    reference = self._reference(options[2], masks, fold, inputs, dense)
            merged = self._fold(options, fold, masks)
            if reference is not None:
                check_computes(cast(PreTrainedModel, merged), reference, base, dense)
        return merged

    def _fold(self, options: _Options, fold: bool, masks: tuple[Plan | None] | None) -> nn.Module:
        """Merge LoRA and gates into the weights, and take them off; with `fold=False` the gates are only taken off."""
        if masks is not None:
            self._restore()
            for name in options[2]:
                self.set_masks(None, name)  # another plan's closed units must not be folded away
        unshare(self.model)
        merge_lora(self.model, options[2])
        if fold:
            return super().merge_and_unload(options[0], options[1], list(options[2]))
        self._restore()
        return super().unload()

    def _reference(
        self,
        names: Sequence[str],
        masks: tuple[Plan | None] | None,
        fold: bool,
        inputs: Batch | None,
        dense: PreTrainedModel,
    ) -> Reference | None:
        """What the gated model computes under a plan; None if it closes what has no gates. Within `put_back`."""
        try:
            for name in names if masks is not None else ():
                self.set_masks(masks[0], name)  # type: ignore[index]
        except InvalidPlanError:
            return None
        if not fold:
            for module in self.model.modules():
                if isinstance(module, SigmoidGate):
                    module.theta.data = torch.full_like(module.theta, module.start.theta)
        return reference_of(cast(PreTrainedModel, self.model), names, inputs, fresh=dense)

    def _check_gated(self) -> None:
        if not any(isinstance(module, GateAdapter) for module in self.model.modules()):
            raise InvalidPlanError(
                "there are no gates in this model any more: they were taken off by `slim`, `merge_and_unload` or "
                "`unload`. Use the model that these returned, or load the adapter on the base model again"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; refused once the gates are taken off, so that no adapter without gates is saved."""
        self._check_gated()
        return super().state_dict(*args, **kwargs)

    def _moved_stream(self, adapter_name: str) -> bool:
        """Whether an adapter scales directions of the residual stream, which no norm's weight can take up."""
        gate = basis_gate(self.model, self.layout_of([adapter_name]), adapter_name)
        return gate is not None and bool((gate.soft() != 1).any())

    def stream_basis(
        self, names: Sequence[str], plan: Plan, *, fold: bool
    ) -> tuple[Basis, torch.Tensor | None] | tuple[None, None]:
        """The basis in which the adapters gate the residual stream, if they do and it matters, and their factors."""
        layout = self.layout_of(names)
        gates = [gate for name in names if (gate := basis_gate(self.model, layout, name)) is not None]
        if plan.hidden is not None and plan.rotated != bool(gates):
            raise InvalidPlanError(NO_BASIS if plan.rotated else NO_CHANNELS)
        if not gates:
            return None, None
        if len(names) > 1:
            raise InvalidPlanError(
                f"the adapters {list(names)} gate the residual stream in different bases: merge one of them at a time"
            )
        factor = gates[0].soft() if fold else None
        kept = slice(None) if plan.hidden is None else list(plan.hidden)
        if factor is not None and bool((factor[kept] == 1).all()):
            factor = None
        if plan.hidden is None and factor is None:
            return None, None
        return gate_basis(gates[0]), factor

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        check_loaded(self.model)
        for module in self.model.modules():
            if isinstance(module, GateAdapter):  # before the first module is folded
                check_unquantized(module.get_base_layer())
                check_own_weights(module.get_base_layer())

    def unload(self) -> nn.Module:
        """The dense model's own weights, bit for bit, also after `merge_adapter`."""
        with put_back(self.model, always=False):
            self._restore()
            return super().unload()

    def _restore(self) -> None:
        for module in self.model.modules():
            if isinstance(module, GateAdapter) and module.merged:
                module.unmerge()

    # ------------------------------------------------------- several adapters

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT, with the LoRA of the same names."""
        super().set_adapter(adapter_name, inference_mode)
        for _, layer in lora_layers(self.model):
            layer.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT, with the LoRA of the same name."""
        super().delete_adapter(adapter_name)
        for _, layer in lora_layers(self.model):
            layer.delete_adapter(adapter_name)
            layer.set_adapter(self.active_adapters)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        As in PEFT.

        Raises:
            UnsupportedModelError: with LoRA below the gates: PEFT would not give the weights back bit for bit.
        """
        if lora_layers(self.model):
            raise UnsupportedModelError(
                "gates with LoRA below them cannot be merged and unmerged: use `merge_and_unload()`"
            )
        super().merge_adapter(adapter_names, safe_merge)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Add an adapter whose raw gates are the weighted sum of other adapters' raw gates (log-odds).

        Args:
            adapters (`list[str]`): names, all with the same gates.
            weights (`list[float]`): one per adapter.
            adapter_name (`str`): the new name; nothing happens if it exists.

        Raises:
            ValueError: on unknown names, other counts, or adapters with different gates.
        """
        if adapter_name in self.peft_config:
            return
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"add_weighted_adapter needs one weight per existing adapter, got adapters {adapters} and weights "
                f"{weights}; existing are {list(self.peft_config)}"
            )
        shared = sum(
            sum(name in module.modules_to_save for name in adapters) > 1
            for module in self.model.modules()
            if isinstance(module, ModulesToSaveWrapper)
        )
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{shared} such instance(s)."
            )
        config = dataclasses.replace(self.peft_config[adapters[0]], plan=None, plan_in_training=False)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for module in self.model.modules():
            if not isinstance(module, GateAdapter):
                continue
            sources = [module.gates(name) for name in adapters]
            for slot, gate in module.gates(adapter_name).items():
                bases = [each for source in sources if isinstance(each := source.get(slot), BasisGate)]
                if isinstance(gate, BasisGate) and bases:
                    gate.set_basis(bases[0].vectors, bases[0].scales, bases[0].marks)
                if any(slot not in source or source[slot].units != gate.units for source in sources) or any(
                    not torch.equal(each.vectors, bases[0].vectors) for each in bases
                ):
                    self.delete_adapter(adapter_name)
                    raise ValueError(f"the adapters {adapters} gate different things; their gates cannot be added")
                with torch.no_grad():
                    gate.theta.zero_()
                    for weight, source in zip(weights, sources, strict=True):
                        gate.theta.add_(source[slot].theta, alpha=weight)
        self.set_requires_grad(adapter_name, False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if lora_layers(self.model):
            raise ValueError("Cannot pass `adapter_names` to gates with LoRA below them: it is not told row by row.")
        unknown = sorted(set(adapter_names) - {"__base__"} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        num_beams = kwargs.get("num_beams")
        with adapter_per_row(self.model, adapter_names, beams=num_beams if isinstance(num_beams, int) else 1):
            yield


NO_BASIS = (
    "the plan keeps directions of a basis of the residual stream, and the adapter gates its channels: apply it to the "
    "adapter that it was made with (HawAdaConfig(rotate=True))"
)


NO_CHANNELS = (
    "the plan keeps channels of the residual stream, and the adapter gates directions of a basis: make one with "
    "`model.plan`"
)


def _check_coordinates(plan: Plan, stream: HiddenGate) -> None:
    if plan.rotated and not stream.in_basis:
        raise InvalidPlanError(NO_BASIS)
    if stream.in_basis and not plan.rotated:
        raise InvalidPlanError(NO_CHANNELS)


def _check_norms(model: nn.Module, layout: Layout) -> None:
    """That the family's row names norms of this model that can carry the gate on the residual stream."""
    hidden_home(layout)
    for name in layout.norms:
        module = find_module(model, name, layout.model_type)
        if not isinstance(module, GateAdapter):
            norm_sizes(module)


def _check_base(config: HawAdaConfig, layout: Layout) -> None:
    found = layout.fingerprint()
    differing = [
        f"{name}: adapter {size}, model {found.get(name)}"
        for name, size in (config.base_sizes or {}).items()
        if found.get(name) != size
    ]
    if differing:
        raise IncompatibleBaseError(
            f"the adapter was made for another base model ({'; '.join(differing)}); load that one, or make a new "
            "adapter with a new HawAdaConfig"
        )
