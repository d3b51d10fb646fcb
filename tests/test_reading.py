"""One reading of the gates: whatever is known of a layer agrees."""

from __future__ import annotations

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, Row, build, gate
from peft import PeftModel

from hawada_peft import collect_gates
from hawada_peft.gates.reading import expected_sizes, gate_scores, layers_of, open_probabilities
from hawada_peft.training.history import layer_means
from hawada_peft.vanilla.family import Layout, locate

WHOLE = {"layers": ("layers",), "blocks": ("blocks",), "both": ("blocks", "layers")}


def read(kinds: tuple[str, ...]) -> tuple[PeftModel, Layout]:
    model = gate(build(LM_ROW), gates=("heads", "ffn", *kinds))
    return model, locate(model.get_base_model())


@pytest.mark.parametrize("kinds", WHOLE.values(), ids=WHOLE)
def test_a_layer_is_the_product_of_the_gates_on_the_whole_of_it(kinds: tuple[str, ...]) -> None:
    model, layout = read(kinds)
    names = collect_gates(model)
    expected = []
    for layer in range(4):
        here = [found for name, found in names.items() if f"layers.{layer}." in name and "units" not in name]
        expected.append(float(torch.stack([found.value().detach() for found in here]).prod()))
    base = model.get_base_model()
    assert [float(score) for score in gate_scores(base, layout, ["default"]).layers] == pytest.approx(expected)
    assert layer_means(model, None)["layers"]["gate"] == pytest.approx(expected, abs=1e-4)
    likely = expected_sizes(base, layout, "default").layers.detach()
    assert torch.cat(open_probabilities(model, layout)["num_hidden_layers"]).tolist() == pytest.approx(likely.tolist())
    assert likely.argsort().tolist() == torch.tensor(expected).argsort().tolist()


@pytest.mark.parametrize("slot", ["hawada_block", "hawada_layer"])
def test_layers_whose_blocks_are_shut_go_everywhere(slot: str) -> None:
    model, layout = read(("blocks", "layers"))
    for name, found in collect_gates(model).items():
        found.theta.data.fill_(-30.0 if "layers.1." in name and slot in name else 3.0)
    base = model.get_base_model()
    assert 1 not in model.plan(keep_ratio={"layers": 0.75}).layers
    assert expected_sizes(base, layout, "default").layers[1].item() == pytest.approx(0, abs=1e-6)
    assert layer_means(model, None)["layers"]["gate"][1] == 0
    assert model.plan().layers == (0, 2, 3)


@pytest.mark.parametrize("gates", [EVERYTHING, ("heads", "layers"), ("ffn",)])
def test_fresh_gates_expect_the_dense_sizes(row: Row, gates: tuple[str, ...]) -> None:
    base = gate(build(row), shuffle=False, gates=gates).get_base_model()
    layout = locate(base)
    found = expected_sizes(base, layout, "default")
    heads, groups, ffn, layers = layout.dense.sizes().values()
    for axis, size in ((found.heads, heads), (found.kv_groups, groups), (found.ffn, ffn), (found.layers, 1)):
        torch.testing.assert_close(axis.detach(), torch.full((layers,), float(size)))


def test_a_group_stays_as_likely_as_its_likeliest_head() -> None:
    model = gate(build(LM_ROW), gates=("heads",), shuffle=False)  # 8 heads in 4 groups
    for found in collect_gates(model).values():
        found.theta.data.copy_(torch.tensor([30.0, -30.0, -30.0, -30.0, 30.0, 30.0, 0.0, -30.0]))
    base = model.get_base_model()
    sizes = expected_sizes(base, locate(base), "default")
    start = torch.sigmoid(torch.tensor(found.start.theta))
    torch.testing.assert_close(sizes.heads.detach(), (3 + 0.5 / start).expand(4))
    torch.testing.assert_close(sizes.kv_groups.detach(), (2 + 0.5 / start).expand(4))


def test_every_gate_of_a_layer_is_read_once() -> None:
    model, layout = read(("blocks", "layers"))
    found = [
        id(each)
        for layer in layers_of(model.get_base_model(), layout, ["default"])
        for each in (*layer.heads, *layer.ffn, *layer.whole)
    ]
    assert sorted(found) == sorted(id(each) for each in collect_gates(model).values())


def test_a_gate_on_one_block_alone_says_nothing_of_the_layer() -> None:
    model = gate(build(LM_ROW), gates=("blocks",), exclude_modules=r".*layers\.0\.mlp\.down_proj")
    layout = locate(model.get_base_model())
    assert [len(layer.whole) for layer in layers_of(model.get_base_model(), layout, ["default"])] == [0, 2, 2, 2]
