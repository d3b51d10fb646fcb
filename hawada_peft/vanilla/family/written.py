"""Which towers of a model a written row is true of."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..towers import Tower, towers_of
from .row import FAMILIES


def written_for(model: PreTrainedModel) -> list[Tower]:
    """The towers that have a row, but those with layers of several kinds, of which a row is about one."""
    return [each for each in towers_of(model) if each.config.model_type in FAMILIES and _is_of_one_kind(model, each)]


def stack_of(tower: Tower) -> str:
    """The list of layers of a tower with a row, by its full dotted name."""
    layers = FAMILIES[tower.config.model_type].layers
    return f"{tower.root}.{layers}" if tower.root else layers


def _is_of_one_kind(model: PreTrainedModel, tower: Tower) -> bool:
    """
    Whether all layers have the ends of the row, or none of them has one, as where the row is wrong. Layers without the
    experts of a row have another FFN: they are of another kind even where no layer has any.
    """
    family, stack = FAMILIES[tower.config.model_type], stack_of(tower)
    try:
        layers = [{name for name, _ in layer.named_modules()} for layer in model.get_submodule(stack).children()]
    except AttributeError:
        return True  # the row is wrong, which is said where its modules are looked for
    attention, ffn, router = (
        sum(end in names for names in layers) for end in (family.attention_out, family.ffn_out, family.router)
    )
    some = range(1, len(layers))
    dense = bool(family.router) and ffn == router == 0
    return not (dense or attention in some or ffn in some or router in some)
