"""
What PEFT asks of a tuner: gates put into a model, several adapters of them, saved and loaded.

Long because PEFT asks one class for all that a tuner does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._register import PREFIX
from .basis.channels import check_channels
from .basis.heads.projections import queries_of
from .basis.marks import is_centred
from .basis.proof import check_exact
from .config import HawAdaConfig
from .errors import InvalidPlanError, UnsupportedModelError
from .gates.adapter import LAYER, UNITS, GateAdapter
from .gates.lora import inject_lora, lora_layers
from .gates.placement import (
    check_norms,
    connect,
    follow_units,
    gates_at,
    place_head_maps,
    router_of,
    set_masks,
    share_hidden,
    share_units,
    siblings,
    whole_ends,
)
from .gates.rows import adapter_per_row
from .gates.saved import check_adapter_tensors, check_modules_to_save
from .gates.weighted import add_gates
from .planning.plan import Plan
from .planning.towers import each_of
from .surgery.conformity import check_conforms, vanilla_tensors
from .surgery.dense import put_back, unmerge
from .surgery.possible import exportable, why_not
from .surgery.readers import check_readers
from .surgery.stream_masks import mask_readers, unmask
from .vanilla.family import (
    FAMILIES,
    TARGET_MODULES,
    Layout,
    base_sizes,
    locate,
    locate_all,
    locate_every,
    locate_stream,
    mark,
    together,
)
from .vanilla.modules import check_loaded, check_own_weights, check_unquantized, quantized_weight
from .vanilla.shape import EXPERTS, FFN, HEADS, HIDDEN, KV_GROUPS
from .vanilla.skeleton import check_constructor

logger = logging.getLogger(__name__)


class GateTuner(BaseTuner):
    """Gates on a frozen model, as PEFT's methods expect them. It is made from the base model, wrapped in place."""

    prefix = PREFIX
    tuner_layer_cls = GateAdapter
    target_module_mapping = TARGET_MODULES

    peft_config: dict[str, HawAdaConfig]  # type: ignore[assignment]
    _places: dict[str, Layout]  # of the towers into which gates are injected
    _kinds: dict[str, list[str]]  # what is gated in each
    _unit_norms: dict[str, Mapping[str, str]]  # of each tower's layers, over units of them, and the axes of these

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
            peft_config.check_base(self._located(peft_config))
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
        layouts = self._located(peft_config)
        peft_config.target_modules = set().union(*(self._wanted(each, peft_config) for each in layouts))  # type: ignore[assignment]
        peft_config.base_sizes = base_sizes(layouts)
        if len(layouts) > 1:
            peft_config.towers = [layout.tower for layout in layouts]
        return peft_config

    def _wanted(self, layout: Layout, peft_config: HawAdaConfig) -> set[str]:
        """The modules of a tower to wrap."""
        kinds = self._kinds[layout.tower]
        ends = {HEADS: layout.family.attention_out, FFN: layout.family.ffn_out}
        names = {end for axis, end in ends.items() if axis in kinds}
        names |= whole_ends(layout, kinds) | self._unit_norms[layout.tower].keys()
        if peft_config.narrow_heads:
            names |= {layout.family.attention_out, queries_of(layout)}
        if EXPERTS in kinds:
            names.add(router_of(layout))
        if len(self._places) > 1 and peft_config.narrow_heads:
            raise UnsupportedModelError(
                "narrow_heads is about the heads of one tower, and gates are placed in several: name one as `towers`"
            )
        if HIDDEN in kinds:
            check_norms(self.model, layout)
            if peft_config.rotate:
                check_exact(layout)
            elif layout.known is not None:
                check_channels(layout)
            names |= {*layout.family.hidden_norms, *layout.norms_outside}
        further = {name for axis in kinds for name in layout.further.get(axis, ())}
        return self._targets(layout, names, peft_config) | further

    def _targets(self, layout: Layout, names: set[str], peft_config: HawAdaConfig) -> set[str]:
        """The modules to wrap: by short names; in full where other parts of the model have modules of these names."""
        ends = tuple(f".{name}" for name in names)
        found = [name for name, _ in self.model.named_modules() if name in names or name.endswith(ends)]
        inside = {name: layout.within(name) or (-1, name) for name in found}
        placed = {name: layer for name, (layer, short) in inside.items() if short in names}
        if len(placed) == len(found) and len(self._places) == 1:
            return names
        chosen = peft_config.layers_to_transform
        layers = [chosen] if isinstance(chosen, int) else chosen
        return {name for name, layer in placed.items() if layers is None or layer in layers}

    def _located(self, peft_config: HawAdaConfig) -> list[Layout]:
        """The towers to gate. What no slim model of its class could hold is refused before any training."""
        sizes, towers = peft_config.base_sizes, peft_config.towers
        asked: Sequence[str | None] = towers or (None,)
        if sizes is not None and len(asked) == 1:
            asked = (sizes.get("tower", ""),)
        find = locate_stream if HIDDEN in peft_config.gates else locate
        if asked == (None,) and HIDDEN not in peft_config.gates:
            layouts = list(together(self._proved(peft_config.gates)))
        else:
            layouts = list(together([find(self.model, each) for each in asked]))
        layout = layouts[0]
        if sizes is None or len(layouts) > 1:
            self._choose_gates(peft_config, layouts)
        if len(layouts) == 1:
            self._kinds = {layout.tower: list(peft_config.gates)}
        for number, each in enumerate(layouts):
            mark(cast(PreTrainedModel, self.model), each, beside=number > 0)
        self._places = {each.tower: each for each in layouts}
        if sizes is None and layout.known is not None and layout.known.ungated:
            logger.info("of what could go there are no gates on %s", "; ".join(layout.known.ungated.values()))
        if layout.tower and asked == (None,):
            placed = ", ".join(repr(each.tower) for each in layouts)
            logger.info("gates are placed in %s of %s; `towers` says in which", placed, type(self.model).__name__)
        check_loaded(self.model)
        check_constructor(layout.model_class)
        if quantized_weight(self.model) is None:
            check_conforms(layout, vanilla_tensors(self.model))
        grouped = {KV_GROUPS} if HEADS in peft_config.gates else set()
        self._unit_norms = {each.tower: check_readers(each, {*self._kinds[each.tower]} | grouped) for each in layouts}
        return layouts

    def _proved(self, asked: Sequence[str]) -> list[Layout]:
        """Every tower of which something can go, the one that figures of one tower are about first."""
        every = locate_every(self.model)
        grouped = {KV_GROUPS} if HEADS in asked else set()
        found = []
        for layout in every if len(every) > 1 else ():
            try:
                kinds = {kind for kind in asked if not why_not(layout, kind, asked)}
                check_readers(layout, kinds | grouped)
            except UnsupportedModelError as error:
                logger.info("no gates are placed in %r: %s", layout.tower, error)
                continue
            found += [layout] if kinds else []
        return found or every[:1]

    def _place_of(self, name: str) -> Layout:
        """The tower that a module is in, or whose norm it is."""
        inside = [each for each in self._places.values() if each.within(name) or each.position(name)]
        inside += [each for each in self._places.values() if each.further_axis(name)]
        return inside[0] if inside else next(iter(self._places.values()))

    def _choose_gates(self, peft_config: HawAdaConfig, layouts: Sequence[Layout]) -> None:
        """Leave out of the gates that nobody asked for what the model cannot lose, of each tower what it cannot."""
        asked = list(peft_config.gates)
        left = {
            each.tower: {kind: reason for kind in asked if (reason := why_not(each, kind, asked))} for each in layouts
        }
        nowhere = [kind for kind in asked if all(kind in reasons for reasons in left.values())]
        if nowhere or len(layouts) == 1:
            exportable(layouts[0], asked)  # refuses what was asked for
        for tower, reasons in left.items():
            if reasons:
                placed = ", ".join(kind for kind in asked if kind not in reasons)
                where = f" in {tower!r}" if len(layouts) > 1 else ""
                logger.info("gates%s are placed on %s: %s", where, placed, "; ".join(reasons.values()))
        peft_config.gates = [kind for kind in asked if kind not in nowhere]
        self._kinds = {
            tower: [kind for kind in peft_config.gates if kind not in reasons] for tower, reasons in left.items()
        }

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
        layout = None if peft_config.base_sizes is None else self._place_of(current_key)
        cls, gates = gates_at(
            layout,
            current_key,
            target,
            kinds=peft_config.gates if layout is None else self._kinds[layout.tower],
            group_size=peft_config.group_size,
            start=peft_config.start(),
            centred=is_centred(self.model, layout) if layout is not None and peft_config.rotate else None,
            norms=() if layout is None else self._unit_norms[layout.tower],
            queries=queries_of(layout) if layout is not None and peft_config.narrow_heads else "",
        )
        if layout is not None and any(
            adapter_name in getattr(each, LAYER) for each in siblings(self.model, layout, current_key)
        ):
            gates.pop(LAYER, None)  # the layer's one gate lives there
        if layout is not None and layout.alike(current_key)[:1] not in ((), (current_key,)):
            gates.pop(UNITS, None)  # those of the first one count for all
        if isinstance(target, GateAdapter):
            adapter: GateAdapter = target
            adapter.update_layer(adapter_name, gates, peft_config.inference_mode)
        else:
            adapter = cls(target, adapter_name, gates=gates, inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                adapter.requires_grad_(False)
            self._replace_module(parent, target_name, adapter, target)
        if layout is not None:
            connect(self.model, layout, current_key, adapter)
            share_units(self.model, layout, current_key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if not isinstance(child, GateAdapter):
            super()._replace_module(parent, child_name, new_module, child)
            return
        setattr(parent, child_name, new_module)  # what it wrapped, as it is: PEFT looks for a weight in it
        child.release()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target modules, and apply the plan that a saved config carries. Arguments as in PEFT."""
        config = self.peft_config[adapter_name]
        if config._saved is not None:
            check_modules_to_save(self.model, config.modules_to_save or (), config._saved)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if config.base_sizes is not None:
            for layout in self._places.values():
                follow_units(self.model, layout, self._unit_norms[layout.tower])
                if HIDDEN in self._kinds[layout.tower]:
                    share_hidden(self.model, layout)
                    mask_readers(self.model, layout)
                if config.narrow_heads:
                    place_head_maps(self.model, layout, queries_of(layout), adapter_name)
        if config.plan is not None:
            towers = each_of(self.layouts_of([adapter_name]), Plan.from_dict(config.plan))
            set_masks(self.model, towers, adapter_name, in_training=config.plan_in_training)

    def layout_of(self, adapter_names: Sequence[str]) -> Layout:
        """
        The layout of the first tower that adapters' plans speak of.

        Raises:
            InvalidPlanError: as `layouts_of`.
        """
        return self.layouts_of(adapter_names)[0]

    def layouts_of(self, adapter_names: Sequence[str]) -> tuple[Layout, ...]:
        """
        The layouts of the towers that adapters' plans speak of.

        Raises:
            InvalidPlanError: if gates of an adapter were not placed by a family row.
        """
        by_name = [name for name in adapter_names if self.peft_config[name].base_sizes is None]
        if by_name or not adapter_names:
            raise InvalidPlanError(
                f"adapter {by_name or 'none'} gates modules that were named by `target_modules`; only gates placed by "
                "a family row can be planned. Leave `target_modules` out of the config."
            )
        return locate_all(self.model)

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
            unmerge(self.model)
            return super().unload()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: nn.Module = cast(Any, super())._unload_and_optionally_merge(*args, **kwargs)
        unmask(model)
        return model

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
        try:
            add_gates(self.model, adapters, weights, adapter_name)
        except ValueError:
            self.delete_adapter(adapter_name)
            raise
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
