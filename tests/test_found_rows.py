"""Models without a row: what is found of them is gated, planned, cut, written and loaded as if one were written."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Row, build, difference, first_of, gate, inputs_of, logits_of
from families import MIXTURES
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from zoo import ZOO

from hawada_peft import HawAdaConfig, Plan, Shape, save_slim, slim_checkpoint
from hawada_peft.discovery import Anatomy, find_parts, inspect, parts_of, table_of, ungated
from hawada_peft.discovery.anatomy import INPUT, Axis, Number, PerLayer, Pinned, Place, Rows, Segment, Stack
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.errors import IllegalShapeError, InvalidPlanError, UnsupportedModelError
from hawada_peft.gates.adapter import GateAdapter
from hawada_peft.planning import gate_importance
from hawada_peft.planning.further import Further
from hawada_peft.vanilla.family import FAMILIES, locate, locate_all, lookup
from hawada_peft.vanilla.outputs import outputs_of

BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
ROW = Row("BartForConditionalGeneration", "BartConfig", BART, Shape())
TOWERS = {"encoder": Shape(4, 4, 20, 2), "decoder": Shape(4, 4, 17, 1)}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWADA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def together(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in found.values()])


def test_no_row_is_written() -> None:
    assert "bart" not in FAMILIES


@pytest.mark.parametrize("tower", TOWERS)
def test_a_stack_of_an_encoder_decoder_slims_exactly(tower: str) -> None:
    dense = build(ROW, torch.float64)
    inputs = example_inputs(dense)
    model = gate(build(ROW, torch.float64), towers=(tower,))
    plan = model.plan(TOWERS[tower])
    assert plan.tower == tower
    model.apply_plan(plan)
    masked = together(outputs_of(model, inputs))
    small = model.merge_and_unload()
    assert locate(small).dense == TOWERS[tower]
    assert difference(together(outputs_of(small, inputs)), masked) <= 1e-12
    assert difference(masked, together(outputs_of(dense, inputs))) > 1e-3


def test_files_and_bytes_of_a_stack(tmp_path: Path) -> None:
    build(ROW).save_pretrained(tmp_path / "base")
    model = gate(build(ROW), towers=("decoder",))
    model.apply_plan(model.plan(TOWERS["decoder"]))
    inputs = example_inputs(model.get_base_model())
    masked = together(outputs_of(model, inputs))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(ROW), tmp_path / "adapter").eval()
    assert torch.equal(together(outputs_of(again, inputs)), masked)
    again.merge_and_unload().save_pretrained(tmp_path / "expected")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    mine, expected = (tmp_path / each / "model.safetensors" for each in ("slim", "expected"))
    assert mine.read_bytes() == expected.read_bytes()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "slim").eval()
    assert (loaded.config.decoder_ffn_dim, loaded.config.decoder_layers, loaded.config.encoder_layers) == (17, 1, 2)
    assert difference(together(outputs_of(loaded, inputs)), masked) <= 1e-5


def test_the_second_stack_is_cut_in_the_slim_model(tmp_path: Path) -> None:
    first = gate(build(ROW), towers=("encoder",))
    small = first.merge_and_unload(plan=first.plan(TOWERS["encoder"]))
    second = gate(small, towers=("decoder",))
    both = second.merge_and_unload(plan=second.plan(TOWERS["decoder"]))
    assert (locate(both, "encoder").dense, locate(both, "decoder").dense) == (TOWERS["encoder"], TOWERS["decoder"])
    assert save_slim(both, tmp_path / "slim").max_difference == 0


def test_both_stacks_are_cut_by_one_plan(tmp_path: Path) -> None:
    build(ROW, torch.float64).save_pretrained(tmp_path / "base")
    model = gate(build(ROW, torch.float64), towers=tuple(TOWERS))
    plan = model.plan({"encoder_ffn_dim": 20, "decoder": TOWERS["decoder"]})
    assert {part.tower: part.shape for part in plan.parts} == TOWERS
    model.apply_plan(plan)
    inputs = example_inputs(model.get_base_model())
    masked = together(outputs_of(model, inputs))
    model.save_pretrained(tmp_path / "adapter")
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim")
    small = model.merge_and_unload()
    assert {layout.tower: layout.dense for layout in locate_all(small)} == TOWERS
    assert difference(together(outputs_of(small, inputs)), masked) <= 1e-12
    small.save_pretrained(tmp_path / "expected")
    mine, expected = (tmp_path / each / "model.safetensors" for each in ("slim", "expected"))
    assert mine.read_bytes() == expected.read_bytes()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "slim", dtype=torch.float64).eval()
    assert difference(together(outputs_of(loaded, inputs)), masked) <= 1e-12


def test_gates_of_a_stack_learn() -> None:
    model = gate(build(ROW), towers=("decoder",))
    inputs = example_inputs(model.get_base_model())
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["decoder_input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_largest_stack_of_which_something_can_go_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ROW)
    encoder, decoder = find_parts(model)
    assert locate(model).tower == decoder.tower == "decoder"
    known = replace(decoder.known, pinned=dict.fromkeys(range(2), "it has to"))
    fixed = replace(decoder, family=replace(decoder.family, ffn_out="", attention_out=""), known=known)
    monkeypatch.setattr(lookup, "FINDERS", [lambda _: [encoder, fixed]])
    assert locate(model).tower == "encoder"
    assert locate(model, "decoder").tower == "decoder"


def test_a_model_without_a_list_of_layers_is_refused_with_the_reason() -> None:
    kind = ZOO["albert"]
    with pytest.raises(UnsupportedModelError, match="Nor is there a list of layers in it"):
        get_peft_model(kind.model_class(kind.make_config()), HawAdaConfig())


def test_what_was_not_found_is_refused() -> None:
    model = get_peft_model(build(ROW), HawAdaConfig(towers=("encoder",)))
    with pytest.raises(IllegalShapeError, match="was not found to build 2 of 4 KV groups"):
        model.plan(Shape(num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"has no tower 'speech'"):
        get_peft_model(build(ROW), HawAdaConfig(towers=("speech",)))


# ------------------------------------------------------------------ layers of which a written row is not true

MIXTURE = MIXTURES["qwen3_moe"]
MIXED = {
    "listed": ({"mlp_only_layers": [1, 2]}, (1, 2), 2),
    "every second": ({"decoder_sparse_step": 2}, (0, 2), 3),
    "all": ({"mlp_only_layers": [0, 1, 2, 3]}, (0, 1, 2, 3), 2),
}
"""Fields of a mixture of experts, its dense layers, and a number of layers that exists."""


def mixture(fields: dict[str, object]) -> PreTrainedModel:
    model = build(MIXTURE, torch.float64, **fields)
    model.set_experts_implementation("eager")  # the others do not know float64
    return model


@pytest.mark.parametrize("name", first_of(MIXED, "every second"))
def test_a_mixture_with_dense_layers_slims_exactly(name: str, tmp_path: Path) -> None:
    fields, dense_layers, depth = MIXED[name]
    dense = mixture(fields)
    layout = locate(dense)
    assert [layer for layer in range(4) if layout.ffn_out(layer)] == list(dense_layers)
    model = gate(mixture(fields), gates=("heads", "ffn", "layers"))
    slim = Shape(4, 2, 40, depth)
    plan = model.plan(slim)
    model.apply_plan(plan)
    masked = logits_of(model)
    assert difference(masked, logits_of(dense)) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(mixture(fields), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again), masked)
    small = model.merge_and_unload()
    assert locate(small).dense == slim
    assert difference(logits_of(small), masked) <= 1e-12
    small.float()
    save_slim(small, tmp_path / "slim", reference=masked.float(), inputs=inputs_of(small))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim").eval()
    assert locate(loaded).dense == slim
    assert difference(logits_of(loaded), masked) <= 1e-5


def test_a_layer_that_must_stay_has_no_gate_where_others_have_theirs() -> None:
    model = gate(mixture(MIXED["every second"][0]), gates=("layers",), shuffle=False)
    held = [
        name for name, module in model.named_modules() if isinstance(module, GateAdapter) and module.gates("default")
    ]
    assert {name.split(".layers.")[1][0] for name in held} == {"3"}
    assert torch.equal(logits_of(model), logits_of(mixture(MIXED["every second"][0])))


# ------------------------------------------------------------------ rows out of what was found, as data

LAYERS = (0, 1)
LIST = "model.text.layers"


def axis(name: str, kind: str, units: int, module: str, rows: tuple[Rows, ...], **more: object) -> Axis:
    place = Place(f"{LIST}.*.{module}.weight", 1, INPUT, units, LAYERS)
    numbers = (Number(f"text_config.{name}", units),)
    return Axis(name, kind, units, numbers, (place,), rows, tuple(range(1, units + 1)), **more)  # type: ignore[arg-type]


def fused(*segments: Segment) -> tuple[Rows, ...]:
    """Rows of [Q0 Q1 K | Q0 Q1 K], 2 features each, as Falcon has them, and the columns that read them."""
    return (
        Rows(f"{LIST}.*.attn.qkv.weight", 0, 0, segments, 2, layers=LAYERS),
        Rows(f"{LIST}.*.attn.out.weight", 1, 0, (Segment(2, 1 if len(segments) == 1 else 2),), 2, layers=LAYERS),
    )


QUERY = axis("heads", "heads", 4, "attn.out", fused(Segment(2, 2), Segment(2)), groups=2)
GROUPS = axis("groups", "heads", 2, "attn.out", fused(Segment(6, 1)))
CHANNELS = axis(
    "wide", "ffn", 8, "mlp.down", (Rows(f"{LIST}.*.mlp.up.weight", 0, 0, (Segment(1, 8),), layers=LAYERS),)
)
TABLE = PerLayer("model.text.table.weight", 1, 3)
TEXT = Stack("text_config.depth", LIST, 2, (1,), (Pinned(0, "it is first"),), lists=("text_config.kinds",),
             branches=(("mlp.down", "attn.out"),) * 2, per_layer=(TABLE,))  # fmt: skip
EYES = Stack("eyes_config.depths.1", "model.eyes.stages.1", 3, (0, 1, 2), branches=((),) * 3)


def test_rows_and_columns_of_an_order_that_no_row_could_say() -> None:
    (part,) = parts_of(Anatomy("Some", "some", (QUERY, GROUPS, CHANNELS), (TEXT,)))
    family = part.family
    assert (part.tower, part.scope, part.stack) == ("text_config", "text_config", LIST)
    assert (family.attention_out, family.ffn_out) == ("attn.out", "mlp.down")
    assert (family.heads_field, family.kv_heads_field, family.ffn_field) == ("heads", "groups", "wide")
    assert (family.layers_field, family.layer_lists) == ("depth", ("kinds",))
    assert part.known.pinned == {0: "it is first"}
    assert part.known.branches == (("attn.out", "mlp.down"),) * 2
    (rule,) = part.known.rules["attn.qkv.weight"]
    units = dict(zip(rule.segments, rule.units, strict=True))
    assert units["heads"] == (0, 0, 1, 1, -1, -1, 2, 2, 3, 3, -1, -1)
    assert units["kv_groups"] == (0,) * 6 + (1,) * 6
    (table,) = part.known.rules[".model.text.table.weight"]
    assert (table.dim, table.segments, table.width) == (1, ("layers",), 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"tied": True},
        {"follows": "hidden_size"},
        {"rows": (Rows("model.head.weight", 0, 0, (Segment(1, 8),)),)},
        {"places": (*CHANNELS.places, Place("model.head.weight", 1, INPUT, 4))},
        {"places": (*CHANNELS.places, Place(f"{LIST}.*.gate.weight", 0, "logits", 8, LAYERS))},
        {"places": (Place(f"{LIST}.*.experts.down", 2, "parameter", 8, LAYERS),)},
        {"numbers": (Number("other_config.wide", 8),)},
    ],
)
def test_what_a_row_cannot_say_is_left_out(changed: dict[str, object]) -> None:
    anatomy = Anatomy("Some", "some", (replace(CHANNELS, **changed),), (TEXT,))
    (part,) = parts_of(anatomy)
    assert part.family.ffn_out == ""
    assert "ffn" not in part.known.sizes
    assert ("wide" in ungated(anatomy)) == ("follows" not in changed)
    assert ("wide: " in part.known.ungated.get("ffn", "")) == ("follows" not in changed)


def test_units_beside_the_ends_of_the_layers_are_those_of_their_module() -> None:
    second, head, up = f"{LIST}.*.mlp.second", "model.head", Rows("model.read.weight", 0, 2, (Segment(1, 8),))
    places = (
        *CHANNELS.places, Place(f"{second}.weight", 1, INPUT, 8, LAYERS), Place(f"{head}.weight", 1, INPUT, 8)
    )  # fmt: skip
    first, beside = CHANNELS.rows[0], Rows(f"{LIST}.*.mlp.twin.weight", 0, 1, (Segment(1, 8),), layers=LAYERS)
    channels = replace(CHANNELS, places=places, rows=(first, beside, up))
    (part,) = parts_of(Anatomy("Some", "some", (channels,), (TEXT,)))
    assert part.family.ffn_out == "mlp.down"
    assert part.known.further == {"ffn": (f"{LIST}.0.mlp.second", f"{LIST}.1.mlp.second", head)}
    assert part.known.alike == {}
    rules = {name: rule.place for name, (rule,) in part.known.rules.items() if "ffn" in rule.segments}
    assert rules == {
        "mlp.up.weight": "",
        f".{LIST}.0.mlp.twin.weight": f"{LIST}.0.mlp.second",
        f".{LIST}.1.mlp.twin.weight": f"{LIST}.1.mlp.second",
        ".model.read.weight": head,
    }
    (same,) = parts_of(Anatomy("Some", "some", (replace(channels, alike=True),), (TEXT,)))
    assert same.known.alike["ffn"][0] == (f"{LIST}.0.mlp.down", f"{LIST}.1.mlp.down")


# ------------------------------------------------------------------ units beside the ends of the layers

BESIDE = {
    "t5": ("decoder", {"num_layers": 2, "num_decoder_layers": 3}, {"heads": 0.5, "ffn": 0.5, "layers": 0.6}, 6),
    "siglip_vision_model": ("", {"num_hidden_layers": 2}, {"ffn": 0.5, "layers": 0.5}, 1),
    "wav2vec2-bert": ("", {"num_hidden_layers": 3}, {"ffn": 0.5, "layers": 0.6}, 2),
    "deepseek_v3": ("", {"num_hidden_layers": 3}, {"heads": 0.5, "ffn": 0.5}, 2),
}
"""A tower, fields, what stays of each axis, and at how many modules beside the layers' ends a plan says that."""


def beside(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind = ZOO[name]
    torch.manual_seed(0)
    model = kind.model_class(kind.make_config(**BESIDE[name][1])).to(dtype).eval()
    if name == "deepseek_v3":
        model.set_experts_implementation("eager")  # the others do not know float64
    return model


def assert_slims_exactly(name: str, towers: tuple[str, ...], ratio: dict[str, float], folder: Path) -> Plan:
    """Planned, masked, saved, loaded, cut in memory and out of files, and reloaded."""
    dense = beside(name, torch.float64)
    inputs = example_inputs(dense)
    dense.save_pretrained(folder / "base")
    model = gate(beside(name, torch.float64), towers=towers or None)
    plan = model.plan(keep_ratio=ratio)
    assert Plan.from_json(plan.to_json()) == plan
    model.apply_plan(plan)
    masked = together(outputs_of(model, inputs))
    assert difference(masked, together(outputs_of(dense, inputs))) > 1e-3
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(beside(name, torch.float64), folder / "adapter").eval()
    assert torch.equal(together(outputs_of(again, inputs)), masked)
    small = model.merge_and_unload(inputs=inputs)
    assert difference(together(outputs_of(small, inputs)), masked) <= 1e-12
    assert {layout.tower: layout.dense for layout in locate_all(small)} == {
        part.tower: part.shape for part in plan.parts
    }
    small.save_pretrained(folder / "expected")
    slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    mine, expected = (folder / each / "model.safetensors" for each in ("slim", "expected"))
    assert mine.read_bytes() == expected.read_bytes()
    loaded = type(dense).from_pretrained(folder / "slim", dtype=torch.float64, experts_implementation="eager").eval()
    assert difference(together(outputs_of(loaded, inputs)), masked) <= 1e-12
    return plan


@pytest.mark.parametrize("name", first_of(BESIDE, "t5", "siglip_vision_model"))
def test_units_at_several_places_slim_exactly(name: str, tmp_path: Path) -> None:
    tower, _, ratio, places = BESIDE[name]
    plan = assert_slims_exactly(name, (tower,) if tower else (), ratio, tmp_path)
    assert len(plan.further) == places
    kept = [*plan.channels, *(each.kept for each in plan.further if each.axis == "ffn")]
    assert len({*kept}) > 1  # each place has its own


def test_two_stacks_with_one_number_are_cut_together(tmp_path: Path) -> None:
    plan = assert_slims_exactly("t5", ("encoder", "decoder"), {"heads": 0.5, "ffn": 0.5, "layers": 0.5}, tmp_path)
    encoder, decoder = plan.parts
    assert [each.module.split(".")[0] for each in plan.further + decoder.further] == ["decoder"] * 2
    assert len({*encoder.heads}) == 1  # one table of biases for all layers
    model = gate(beside("t5"), towers=("encoder", "decoder"))
    assert {part.shape.intermediate_size for part in model.plan({"d_ff": 40}).parts} == {40}
    assert {part.shape.intermediate_size for part in model.plan(keep_ratio={"encoder.ffn": 0.5}).parts} == {96}
    with pytest.raises(IllegalShapeError, match=r"one number of the config is intermediate_size of \['encoder', 'de"):
        model.apply_plan(model.plan({"d_ff": 40}).parts[1])


def test_a_plan_says_what_stays_at_every_place() -> None:
    model = gate(beside("t5"), towers=("decoder",))
    plan = model.plan(Shape(4, 4, 40))
    with pytest.raises(InvalidPlanError, match=r"intermediate_size is 40 at encoder.block.0.* does not say which"):
        model.apply_plan(replace(plan, further=tuple(each for each in plan.further if each.axis == "heads")))
    with pytest.raises(InvalidPlanError, match=r"heads at .* must be the same, a table holds them"):
        model.apply_plan(replace(plan, heads=((0, 1, 2, 3), *plan.heads[1:-1], (4, 5, 6, 7))))
    with pytest.raises(InvalidPlanError, match=r"must keep as many ffn as the layers, 40: 1"):
        replace(plan, further=(Further("ffn", "some.module", (3,)),))
    with pytest.raises(InvalidPlanError, match="further must be kept units of"):
        replace(plan, further=(Further("layers", "some.module", (3,)),))
    for damage in ({"ffn": {"some.module": "xyz"}}, {"ffn": ["ff"]}, {"width": {"some.module": "ff"}}, [3]):
        with pytest.raises(InvalidPlanError, match="further"):
            Plan.from_dict(plan.to_dict() | {"further": damage})


def test_gates_of_what_the_loss_does_not_see_have_no_importance() -> None:
    model = gate(beside("siglip_vision_model"), shuffle=False)
    rows = example_inputs(model.get_base_model(), rows=2)
    found = gate_importance(model, [rows, {"pixel_values": rows["pixel_values"][:1]}])
    pooled = [value for name, value in found.items() if ".head." in name]
    assert [value.count_nonzero().item() for value in pooled] == [0]
    assert all(value.count_nonzero() for name, value in found.items() if ".head." not in name)


def test_what_has_no_gates_is_said(caplog: pytest.LogCaptureFixture) -> None:
    kind = ZOO["qwen3_5_text"]
    model = kind.model_class(kind.make_config())
    with caplog.at_level(logging.INFO, logger="hawada_peft"):
        gated = get_peft_model(model, HawAdaConfig())
    assert (
        "linear_num_value_heads: num_attention_heads and num_key_value_heads are gated, and a plan has one"
        in caplog.text
    )
    assert "linear_num_key_heads: num_attention_heads" in table_of(inspect(model))
    assert locate(gated.get_base_model()).family.attention_out == "self_attn.o_proj"
    assert gated.plan(keep_ratio={"layers": 0.5}).shape.num_hidden_layers == 2


def test_towers_are_named_by_their_config_or_by_what_tells_them_apart() -> None:
    lists = [
        Stack("text_config.depth", "model.text.layers", 2, (0, 1), branches=((),) * 2),
        EYES,
        Stack("encoder_layers", "model.encoder.layers", 2, (0, 1), branches=((),) * 2),
        Stack("decoder_layers", "model.decoder.layers", 2, (0, 1), branches=((),) * 2),
    ]
    names = [part.tower for part in parts_of(Anatomy("Some", "some", (), tuple(lists[:2])))]
    assert names == ["text_config", "eyes_config"]
    assert [part.tower for part in parts_of(Anatomy("Some", "some", (), tuple(lists[2:])))] == ["encoder", "decoder"]
    (alone,) = parts_of(Anatomy("Some", "some", (), tuple(lists[2:3])))
    assert (alone.tower, alone.family.layers_field) == ("", "encoder_layers")
    assert parts_of(Anatomy("Some", "some", (), (EYES,)))[0].family.layers_field == "depths.1"
