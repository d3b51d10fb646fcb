"""What is found of a dozen types, and that it is true of models that it was not found on."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, LlamaForCausalLM, PreTrainedConfig
from zoo import ZOO
from zoo_table import PAGE, line

from hawada_peft import inspect
from hawada_peft.discovery import Anatomy, Axis, Place, table_of, twin
from hawada_peft.discovery.anatomy import INPUT, LOGITS, NORM, expand
from hawada_peft.discovery.parts.stream import find_stream
from hawada_peft.discovery.trial.closing import Closed
from hawada_peft.discovery.trial.config_tree import edited, parsed
from hawada_peft.discovery.trial.proof import apart
from hawada_peft.discovery.trial.specimen import Specimen, run
from hawada_peft.errors import HawAdaError, UnsupportedModelError

DOZEN = (
    "llama", "phi3", "gemma2", "qwen3_moe", "opt", "bert", "modernbert", "dinov2", "swin", "wav2vec2", "clip", "t5"
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWADA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", DOZEN)
def test_a_type_has_what_the_page_says(name: str) -> None:
    anatomy = inspect(ZOO[name].make_config())
    assert line(name, anatomy) in PAGE.read_text(encoding="utf-8"), "run `make test-zoo`"
    assert Anatomy.from_json(anatomy.to_json()) == anatomy
    for axis in anatomy.axes:
        assert axis.sizes[-1] == axis.units
        assert len(axis.sizes) > 1
        assert axis.places
        assert {place.how for place in axis.places} <= {"input", "parameter", "logits", "norm"}
    for stack in anatomy.stacks:
        assert sorted([*stack.free, *(pinned.layer for pinned in stack.pinned)]) == list(range(stack.count))
        assert len(stack.branches) == stack.count


LARGER: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 9, "num_attention_heads": 16, "hidden_size": 128, "intermediate_size": 200},
    "phi3": {"num_hidden_layers": 8, "num_attention_heads": 16, "hidden_size": 128, "intermediate_size": 130},
    "gpt2": {"n_layer": 8, "n_head": 12, "n_embd": 96, "n_inner": 200},
    "vit": {"num_hidden_layers": 7, "num_attention_heads": 16, "hidden_size": 128, "intermediate_size": 200},
    "qwen3_moe": {"num_hidden_layers": 9, "num_experts": 12, "moe_intermediate_size": 100, "mlp_only_layers": [1, 4]},
}
"""Of types, configs of which a tiny copy is made: other head counts, widths, more layers."""


@pytest.mark.parametrize("name", LARGER)
def test_what_is_found_on_a_tiny_copy_is_true_of_the_large_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "SMALL", 0)
    kind = ZOO[name]
    config = kind.make_config(**LARGER[name])
    anatomy = inspect(config)
    large = Specimen(kind.model_class, config)
    for axis in anatomy.axes:
        if axis.follows:
            continue
        both = [axis, *(each for each in anatomy.axes if each.follows == axis.name)]
        size = axis.sizes[len(axis.sizes) // 2 - 1]
        closed, small = cut(large, both, size)
        assert apart(large.run(closed), run(small, large.inputs)) < 1e-9, axis.name
        assert apart(large.run(closed), large.dense) > 1e-6, axis.name
    assert [stack.count for stack in anatomy.stacks] == [len(stack.free) for stack in anatomy.stacks]


def cut(large: Specimen, axes: list[Axis], size: int) -> tuple[Closed, torch.nn.Module]:
    """A model cut by nothing but what an anatomy says, and what is closed in the whole one."""
    changes: dict[Any, Any] = {}
    state = dict(large.model.state_dict())
    closed = Closed()
    for axis in axes:
        left = size * axis.units // axes[0].units
        changes |= {parsed(number.field): number.at(left, axis.units) for number in axis.numbers}
        changes |= {parsed(field): value for field, value in axis.written}
        kept = draw(axis, left)
        for rows in axis.rows:
            units = rows.units()
            for parameter, layer in zip(rows.names(), rows.layers or (-1,), strict=True):
                stay = stays_at(kept, rows.place, layer)
                index = [row for row, unit in enumerate(units) if unit < 0 or unit in stay]
                state[parameter] = state[parameter].index_select(rows.dim, torch.tensor(index))
        for number, place in enumerate(axis.places):
            close(closed, axis, number, place, kept)
    small = large.model_class(edited(large.config, changes)).double().eval()
    small.load_state_dict({name: state[name] for name in small.state_dict()}, strict=True)
    return closed, small


def draw(axis: Axis, left: int) -> dict[tuple[int, int], set[int]]:
    """The units that stay, by place and layer."""
    generator = random.Random(0)

    def some(place: Place) -> set[int]:
        count = axis.left_at(place, left)
        groups = axis.groups or 1
        each = place.units // groups
        return {
            group * each + unit for group in range(groups) for unit in generator.sample(range(each), count // groups)
        }

    same = some(axis.places[0])
    return {
        (number, layer): same if axis.tied else some(place)
        for number, place in enumerate(axis.places)
        for layer in place.layers or (-1,)
    }


def stays_at(kept: dict[tuple[int, int], set[int]], place: int, layer: int) -> set[int]:
    """Of a place in the same layer, else of any: the axis is tied then."""
    return kept[place, layer] if (place, layer) in kept else next(kept[key] for key in kept if key[0] == place)


def close(closed: Closed, axis: Axis, number: int, place: Place, kept: dict[tuple[int, int], set[int]]) -> None:
    """Close a place's units in every layer."""
    own = next(rows for rows in axis.rows if (rows.parameter, rows.dim) == (place.parameter, place.dim))
    for parameter, layer in zip(place.names(), place.layers or (-1,), strict=True):
        stay = stays_at(kept, own.place, layer)
        gone = [row for row, unit in enumerate(own.units()) if unit >= 0 and unit not in stay]
        if place.how == LOGITS:
            closed.logits[parameter] = gone
        elif place.how == NORM:
            rest = [row for row in range(len(own.units())) if row not in gone]
            closed.norms[parameter.rpartition(".")[0]] = rest
        else:
            closed.zero.append(((parameter, place.dim), gone))


def test_names_are_those_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "SMALL", 0)
    config = ZOO["qwen3_moe"].make_config(**LARGER["qwen3_moe"])
    anatomy = inspect(config)
    there = set(Specimen(ZOO["qwen3_moe"].model_class, config).base)
    for axis in anatomy.axes:
        for each in (*axis.places, *axis.rows):
            assert set(expand(each.parameter, each.layers)) <= there
    (dense,) = anatomy.axis("intermediate_size").places
    assert (dense.layers, dense.how) == ((1, 4), INPUT)
    assert anatomy.axis("experts").sizes == range(2, 13)


PARALLEL = {
    "vocab_size": 128, "n_embd": 64, "n_head": 8, "n_layer": 2, "n_positions": 64, "n_inner": 96, "rotary_dim": 4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_branches_of_layers_with_a_cache_of_another_name_are_found() -> None:
    config = GPTJConfig(**PARALLEL, architectures=["GPTJForCausalLM"])
    (stack,) = inspect(config).stacks
    assert stack.branches == (("mlp.fc_out", "attn.out_proj"),) * 2


# --------------------------------------------------------------------------------------------------- what goes in


def test_a_stream_that_something_else_reads_is_refused_after_a_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ZOO["whisper"]
    specimen = Specimen(kind.model_class, kind.make_config())
    passes: list[Closed] = []
    gradients = Specimen.gradients

    def counted(self: Specimen, closed: Closed, of: Any = None) -> dict[str, torch.Tensor]:
        passes.append(closed)
        return gradients(self, closed, of)

    monkeypatch.setattr(Specimen, "gradients", counted)
    found = find_stream(specimen, ("d_model",))  # convolutions of the sound have it as well
    assert isinstance(found, str)
    assert "dimensions are not made of its channels" in found
    assert len(passes) < 12


def test_a_folder_a_file_a_config_and_a_model_are_the_same(tmp_path: Path) -> None:
    config = ZOO["opt"].make_config()
    config.save_pretrained(tmp_path)
    wanted = inspect(ZOO["opt"].model_class(config))
    assert inspect(tmp_path) is inspect(tmp_path / "config.json") is inspect(config) is wanted


def test_what_is_kept_is_read_and_what_is_broken_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWADA_CACHE", str(tmp_path))
    config = ZOO["opt"].make_config()
    found = inspect(config, fresh=True)
    (path,) = tmp_path.glob("anatomy-*.json")
    known = sys.modules["hawada_peft.discovery.inspected"]._known
    path.write_text(json.dumps(found.to_dict() | {"model_class": "Kept"}))
    known.clear()
    assert inspect(config).model_class == "Kept"
    path.write_text("{")
    known.clear()
    assert inspect(config) == found


def test_the_table_names_every_axis_stack_and_reason() -> None:
    anatomy = inspect(ZOO["t5"].make_config())
    text = table_of(anatomy)
    assert all(axis.name in text for axis in anatomy.axes)
    assert all(f"  {each.field}: " in text for each in anatomy.refusals)
    assert "all but 0" in text


@pytest.mark.parametrize("given", [3, None, {"hidden_size": 4}])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="looked for a transformers model, config or folder, got"):
        inspect(given)


def test_of_other_modules_it_is_said_what_can_be_done() -> None:
    with pytest.raises(UnsupportedModelError, match="`attach_adapters` gates"):
        inspect(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_code_of_a_models_own_is_not_run(tmp_path: Path) -> None:
    config = ZOO["llama"].make_config().to_dict()
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"OwnForCausalLM.*auto_map.*attach_adapters"):
        inspect(tmp_path)


def test_a_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody", "architectures": ["Nobody"]}))
    with pytest.raises(UnsupportedModelError, match="no config of a model type that transformers"):
        inspect(tmp_path)


def test_quantized_weights_are_refused() -> None:
    model = ZOO["opt"].model_class(ZOO["opt"].make_config())
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantized"):
        inspect(model)


class Restless(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(input_ids, **kwargs)
        return {"logits": torch.nn.functional.dropout(output.logits, 0.5, training=True)}


class Particular(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, colour: torch.Tensor) -> Any:  # type: ignore[override]
        return {"logits": super().forward(input_ids).logits * colour}


def tiny(model_class: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    config: PreTrainedConfig = ZOO["llama"].make_config(num_hidden_layers=2)
    return model_class(config)  # type: ignore[arg-type]


def test_random_outputs_are_told() -> None:
    with pytest.raises(UnsupportedModelError, match="something else each time"):
        inspect(tiny(Restless))


def test_what_cannot_be_guessed_is_asked_for_by_name() -> None:
    with pytest.raises(HawAdaError, match=r"\['colour'\] cannot be guessed"):
        inspect(tiny(Particular))
    assert inspect(tiny(Particular), inputs={"colour": torch.ones(())}).axes
