"""
The lookup of a family's row in a model, and of its sizes.

Long because whatever is not there is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ..modules import feature_sizes
from ..shape import FFN, HEADS, Shape
from ..towers import Tower, config_at, towers_of, value_at
from .layout import FINDERS, Layout, Part
from .row import FAMILIES
from .written import stack_of, written_for

TOWERS = "_hawada_towers"
"""Attribute of a model: which of its towers are slimmed, each with what was found of it if it has no row."""


def locate(model: nn.Module, tower: str | None = None) -> Layout:
    """
    Find the row of a model and its sizes.

    Args:
        model: a transformers model.
        tower: path of the sub-config whose model is meant, as `"text_config"`, or empty for the model's own. Left out,
            it is what the model was gated or cut in before; else the model itself if it has a row; else the tower
            that has one and the most parameters in its layers. A row is about layers of one kind: where only some of
            them have its modules, what is found of the class is taken.

    Raises:
        UnsupportedModelError: if there is no row for the model, or the model does not have the row's modules. The
            message says which names were looked for.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model.config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model, so the places of its gates are not known. "
            "Please specify `target_modules` in `peft_config` to gate the inputs of modules by name."
        )
    marked = _marked(model)
    wanted = next(iter(marked), None) if tower is None else tower
    held = marked.get(wanted)
    if held is not None:
        return _measured(model, held, "")
    known = [each for each in written_for(model) if wanted in (None, each.path)]
    if not known:
        return _discovered(model, towers_of(model), wanted)
    chosen = known[0] if not known[0].path or len(known) == 1 else max(known, key=lambda each: _weight(model, each))
    family = FAMILIES[chosen.config.model_type]
    if chosen.path:
        # Of a row that is about whole models: who else reads the stream, and which class computes the same.
        family = replace(family, hidden_norms=(), final_norm="", stream_scales=(), twin="", twin_fields=())
    return _measured(model, Part(chosen.path, chosen.path, stack_of(chosen), family), chosen.root)


def locate_stream(model: nn.Module, tower: str | None = None) -> Layout:
    """
    As `locate`, for a cut of the residual stream: where the row names no norms that read it, by what is found of the
    class, if that does.
    """
    layout = locate(model, tower)
    if layout.norms or layout.known is not None or not isinstance(model, PreTrainedModel):
        return layout
    parts = [part for find in FINDERS for part in find(model) if part.stack == layout.stack and not layout.tower]
    found = [_measured(model, part, "") for part in parts]
    return next((each for each in found if each.norms), layout)


def _discovered(model: PreTrainedModel, towers: list[Tower], wanted: str | None) -> Layout:
    """The layout of a model without a row, by what is found of it."""
    parts = [part for find in FINDERS for part in find(model)]
    chosen = [part for part in parts if wanted in (None, part.tower)]
    if not chosen:
        raise _no_row(model, towers, wanted, listed=bool(parts))
    # A tower that is asked for is taken as it is; else one of which something can go.
    chosen = [part for part in chosen if wanted is not None or _loses(part)] or chosen

    def weight(part: Part) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(part.stack).parameters())

    return _measured(model, max(chosen, key=weight), "")


def locate_all(model: nn.Module) -> tuple[Layout, ...]:
    """
    The layouts of every tower that a model was gated or cut in before; else the one of `locate`.

    Raises:
        UnsupportedModelError: as `locate`.
    """
    towers = list(_marked(model))
    return together([locate(model, tower) for tower in towers]) if len(towers) > 1 else (locate(model),)


def together(layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """The layouts of several towers of one model that are gated, or cut, at once: each knows of the others."""
    stacks = [layout.stack for layout in layouts]
    return tuple(
        replace(layout, beside=tuple(stack for stack in stacks if stack != layout.stack)) for layout in layouts
    )


def _marked(model: nn.Module) -> dict[str | None, Part | None]:
    return cast(dict[str | None, Part | None], vars(model).get(TOWERS, {}))


def base_sizes(layouts: Sequence[Layout]) -> dict[str, int | str]:
    """What an adapter on some towers depends on, for JSON: of several each size by its tower's path."""
    if len(layouts) == 1:
        return layouts[0].base_sizes()
    each = {layout.tower: layout.base_sizes() for layout in layouts}
    common = {"model_type": layouts[0].model_type}
    return common | {
        f"{tower}.{name}": size for tower, sizes in each.items() for name, size in sizes.items() if name not in common
    }


def mark(model: PreTrainedModel, layout: Layout, layers: Sequence[int] | None = None, *, beside: bool = False) -> None:
    """
    Have `locate` find the tower of a layout in a model, whatever else is in it.

    Args:
        model: of the same class.
        layout: of a model of these sizes, or of the one that it was cut from.
        layers: those that are left of that one.
        beside: the towers that were marked before stay marked, before this one.
    """
    part = None
    if layout.known is not None:
        known = layout.known if layers is None else layout.known.left(layers)
        part = Part(layout.tower, layout.scope, layout.stack, layout.family, known)
    if layout.tower or part is not None:
        vars(model)[TOWERS] = {**(_marked(model) if beside else {}), layout.tower: part}


@contextmanager
def among(model: PreTrainedModel, layouts: Sequence[Layout]) -> Iterator[None]:
    """Within, `locate` and `locate_all` find these towers of a model, in their order, and no other."""
    before = vars(model).pop(TOWERS, None)
    try:
        for number, layout in enumerate(layouts):
            mark(model, layout, beside=number > 0)
        yield
    finally:
        vars(model).pop(TOWERS, None)
        if before is not None:
            vars(model)[TOWERS] = before


def relocate(layout: Layout, model: PreTrainedModel) -> Layout:
    """
    The layout of a model of the same class and family, of other sizes.

    Raises:
        UnsupportedModelError: if it does not have the family's modules.
    """
    return _measured(model, Part(layout.tower, layout.scope, layout.stack, layout.family, layout.known), layout.root)


def tower_names(model: PreTrainedModel) -> list[str]:
    """The towers of a model that a row is known for; the empty name is the model's own."""
    known = [each.path for each in written_for(model)]
    return known or [part.tower for find in FINDERS for part in find(model)]


def locate_every(model: nn.Module) -> list[Layout]:
    """
    The layouts of every tower of which something can go, that with the most parameters in its layers first: with a row
    that is written, or, where some tower has none, with one that is found. Of a model that was gated or cut before
    those that were.

    Raises:
        UnsupportedModelError: as `locate`.
    """
    if not isinstance(model, PreTrainedModel):
        return [locate(model)]  # which says what is wrong
    if marked := _marked(model):
        return [locate(model, tower) for tower in marked]
    known = written_for(model)
    if any(not each.path for each in known):
        return [locate(model)]
    found = [locate(model, each.path) for each in known]
    if not found or len(known) < len(towers_of(model)) - 1:
        try:
            parts = [part for find in FINDERS for part in find(model)]
        except UnsupportedModelError:
            parts = []
        stacks = {layout.stack for layout in found}
        found += [_measured(model, part, "") for part in parts if part.stack not in stacks and _loses(part)]

    def weight(layout: Layout) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(layout.stack).parameters())

    return sorted(found, key=weight, reverse=True) or [locate(model)]


def _weight(model: PreTrainedModel, tower: Tower) -> int:
    """Parameters of a tower's layers."""
    stack = find_module(model, stack_of(tower), tower.config.model_type)
    return sum(parameter.numel() for parameter in stack.parameters())


def _loses(part: Part) -> bool:
    """Whether heads, FFN channels or layers were found that can go."""
    family, known = part.family, part.known
    return bool(family.attention_out or family.ffn_out) or known is None or len(known.pinned) < len(known.branches)


def _no_row(model: PreTrainedModel, towers: list[Tower], wanted: str | None, *, listed: bool) -> UnsupportedModelError:
    inside = {each.path: each.config.model_type for each in towers[1:]}
    paths = ", ".join(f"{path} ({kind})" for path, kind in inside.items())
    has = f" It has the towers {paths}." if inside else ""
    if wanted is not None and wanted not in [each.path for each in towers]:
        return UnsupportedModelError(f"{type(model).__name__} has no tower {wanted!r}.{has}")
    kind = inside.get(wanted or "", model.config.model_type)
    return UnsupportedModelError(
        f"There is no family row for model_type={kind!r}; rows exist for {sorted(FAMILIES)}.{has} "
        f"{'' if listed else 'Nor is there a list of layers in it, where gates go by what `hawada inspect` finds. '}"
        "Please specify `target_modules` in `peft_config` to gate the inputs of modules by name (such gates fold "
        "into the weights but remove nothing), or describe the family with `hawada_peft.register_family`."
    )


def _measured(model: PreTrainedModel, part: Part, root: str) -> Layout:
    config, family = config_at(model.config, part.scope), part.family
    stack = find_module(model, part.stack, config.model_type)
    if not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) == 0:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: {part.stack!r} should be a list of layers, is a {type(stack).__name__}"
        )
    hidden = _number(config, family.hidden_field or "hidden_size")
    heads = _number(config, family.heads_field or "num_attention_heads")
    attention = _inputs(model, part, HEADS, family.attention_out)
    ffn = _inputs(model, part, FFN, family.ffn_out)
    if len({*attention}) > 1 or len({*ffn}) > 1 or any(size % heads for size in attention):
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: every layer should have the same sizes, and {heads} heads; the input "
            f"features of {family.attention_out} and {family.ffn_out} are "
            f"{sorted({*zip(attention, ffn, strict=False)})}"
        )
    groups = int(value_at(config, family.kv_heads_field)) if family.kv_heads_field else heads
    return Layout(
        model_type=model.config.model_type,
        family=family,
        stack=part.stack,
        root=root,
        dense=Shape(
            num_attention_heads=heads,
            num_key_value_heads=groups,
            intermediate_size=next(iter(ffn), 1),
            num_hidden_layers=len(stack),
        ),
        head_dim=next(iter(attention), hidden) // heads,
        hidden_size=hidden,
        model_class=type(model),
        config=model.config,
        tower=part.tower,
        scope=part.scope,
        known=part.known,
        num_experts=getattr(config, family.experts_field) if family.router else None,
    )


def _number(config: PreTrainedConfig, field: str) -> int:
    """A size in a config; 1 where it has none of that name, or several."""
    value = value_at(config, field)
    return value if isinstance(value, int) else 1


def _inputs(model: PreTrainedModel, part: Part, axis: str, end: str) -> list[int]:
    """The input features of one end of every layer, in layers of several kinds of those that have it."""
    stack = cast(Sequence[nn.Module], model.get_submodule(part.stack))
    names = {name for layer in stack for name, _ in layer.named_modules()} if part.known is not None else set()
    sizes = []
    for index, layer in enumerate(stack):
        if end and (part.known is None or end in dict(layer.named_modules())):
            module = find_module(model, f"{part.stack}.{index}.{end}", model.config.model_type)
            sizes.append(feature_sizes(module)[0])
    there = {axis for axis, some in (part.known.layers if part.known is not None else {}).items() if some}
    if end and not sizes and (part.known is None or axis in there):
        raise UnsupportedModelError(f"no layer of {part.stack!r} has a module {end!r}, only {sorted(names)}")
    return sizes


def find_module(model: nn.Module, name: str, model_type: str) -> nn.Module:
    """
    A module by its dotted name.

    Raises:
        UnsupportedModelError: if the model does not have it.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type={model_type!r}) has no module {name!r}, where its family row looks "
            "for one. Correct the row with `hawada_peft.register_family`, or specify `target_modules`."
        ) from None
