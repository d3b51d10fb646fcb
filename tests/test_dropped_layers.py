"""What dropped layers did to the stream, made up for in the weights that stay: its magnitude, its direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LM_ROW, ROWS, build, difference, inputs_of, logits_of
from torch.nn import functional
from transformers import PreTrainedModel

from hawada_peft import Plan, slim
from hawada_peft.errors import UnsupportedModelError
from hawada_peft.refit.cosine import refine_cosine
from hawada_peft.refit.magnitude import compensate_magnitude, stream_magnitudes
from hawada_peft.vanilla.family import locate

LAYERS = 8
NAMES = ("llama", "qwen2", "granite", "vit", "dinov2", "llama-bare")


def dense_model(name: str) -> PreTrainedModel:
    row = ROWS[name]
    layers: dict[str, Any] = {"num_hidden_layers": LAYERS}
    return build(row, **(layers | ({"no_rope_layers": None} if "no_rope_layers" in row.fields else {})))


def without(model: PreTrainedModel, *gone: int) -> Plan:
    full = Plan.keep_all(locate(model).dense)
    kept = tuple(layer for layer in range(LAYERS) if layer not in gone)
    return replace(full, layers=kept, heads=full.heads[: len(kept)], channels=full.channels[: len(kept)])


def batches_of(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    return [inputs_of(model), {name: value.flip(0) for name, value in inputs_of(model).items()}]


def layers_of(model: PreTrainedModel) -> Any:
    return model.get_submodule(locate(model).stack)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gone", [(3, 4), (0, 5, 6), (1, 7)])
def test_dividing_what_is_written_later_is_multiplying_the_stream(name: str, gone: tuple[int, ...]) -> None:
    model = dense_model(name)
    plan = without(model, *gone)
    magnitudes = stream_magnitudes(model, batches_of(model))
    assert len(magnitudes) == LAYERS + 1
    plain, divided = slim(model, plan), slim(model, plan)
    factors = compensate_magnitude(divided, plan, magnitudes)
    before = 1.0
    for index, factor in enumerate(factors):

        def multiply(_module: Any, args: Any, kwargs: Any, by: float = factor / before) -> Any:
            kwargs = {key: value * by if key == "hidden_states" else value for key, value in kwargs.items()}
            return ((args[0] * by, *args[1:]) if args else args), kwargs

        layers_of(plain)[index].register_forward_pre_hook(multiply, with_kwargs=True)
        before = factor
    assert factors[0] != 1.0 or 0 not in gone
    assert len({round(factor, 9) for factor in factors}) > 1 or gone == (1, 7)
    assert difference(logits_of(divided), logits_of(plain)) < 2e-3


def test_where_nothing_goes_nothing_is_divided() -> None:
    model = dense_model("llama")
    plan = without(model)
    copy = slim(model, plan)
    assert set(compensate_magnitude(copy, plan, stream_magnitudes(model, batches_of(model)))) == {1.0}
    assert torch.equal(logits_of(copy), logits_of(model))


def test_padding_has_no_magnitude() -> None:
    model = dense_model("llama")
    tokens = inputs_of(model)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, 9:] = 0
    found = [
        stream_magnitudes(model, [{"input_ids": torch.where(mask.bool(), tokens, other), "attention_mask": mask}])
        for other in (5, 90)
    ]
    assert found[0] == pytest.approx(found[1])


def mean_cosine(dense: PreTrainedModel, small: PreTrainedModel, plan: Plan, gap: int) -> float:
    """Between both streams where the dense model has left the layers that go, over all positions."""
    seen = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen.setdefault(name, []).append(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    index = plan.layers.index(gap - 1)
    end = plan.layers[index + 1] if index + 1 < len(plan.layers) else LAYERS
    hooks = [
        layers_of(model)[place].register_forward_hook(keep(name))
        for name, model, place in (("dense", dense, end - 1), ("small", small, index))
    ]
    with torch.no_grad():
        for batch in batches_of(dense):
            dense(**batch)
            small(**batch)
    for hook in hooks:
        hook.remove()
    streams = [torch.cat([each.flatten(0, -2) for each in seen[name]]) for name in ("dense", "small")]
    return float(functional.cosine_similarity(*streams, dim=-1).mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_points_where_it_did(name: str) -> None:
    model = dense_model(name)
    plan = without(model, 3, 4)
    small = slim(model, plan)
    before = mean_cosine(model, small, plan, 3)
    (rise,) = refine_cosine(model, small, plan, batches_of(model), learning_rate=1e-3, epochs=20)
    assert rise > 0.01
    assert mean_cosine(model, small, plan, 3) - before == pytest.approx(rise, abs=2e-3)


def test_layers_before_the_first_are_left_out_and_several_gaps_are_not() -> None:
    model = dense_model("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = without(model, 0, 3, 6)
    small, plain = slim(model, plan), slim(model, plan)
    rises = refine_cosine(model, small, plan, batches_of(model))
    assert len(rises) == 2
    changed = {
        name for name, tensor in small.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])
    }
    assert changed == {f"model.layers.{index}.mlp.down_proj.weight" for index in (1, 3)}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_norm_behind_the_projections_is_refused() -> None:
    model = build(LM_ROW, num_hidden_layers=LAYERS)
    for layer in model.model.layers:  # what its class might do: a norm of what is added
        norm = torch.nn.LayerNorm(64)
        layer.mlp.register_forward_hook(lambda _module, _args, output, norm=norm: norm(output))
    plan = without(model, 3)
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        stream_magnitudes(model, batches_of(model))
    with pytest.raises(UnsupportedModelError, match="layer 2"):
        refine_cosine(model, slim(model, plan), plan, batches_of(model))
