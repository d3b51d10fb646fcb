"""Each example's own gradients: by one pass of the batch what one pass for each example gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import (
    BARE_ROW,
    EVERYTHING,
    LM,
    LM_ROW,
    MIXED_ROW,
    ROWS,
    VISION_ROW,
    Row,
    build,
    gate,
    inputs_of,
    scattered_plan,
    shuffle_gates,
)
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hawada_peft import HawAdaConfig, attach_adapters, collect_gates
from hawada_peft.errors import RowsError
from hawada_peft.gates import BlockAdapter, ChannelAdapter, SigmoidGate
from hawada_peft.gates.rows import theta_per_row
from hawada_peft.planning.per_example import example_gradients
from hawada_peft.vanilla.heads import head_of

HEADED = [name for name, row in ROWS.items() if not row.model.endswith("Model")]
"""The rows that take labels."""

Gradients = dict[str, torch.Tensor]


def trained(model: nn.Module) -> dict[str, SigmoidGate]:
    return {name: found for name, found in collect_gates(model).items() if found.theta.requires_grad}


def found(model: nn.Module, batch: dict[str, Any]) -> tuple[Gradients, int]:
    """By gate (examples, ...), and in how many parts they came."""
    gates = trained(model)
    parts = list(example_gradients(model, list(gates.values()), batch, torch.Generator().manual_seed(0)))
    return {name: torch.cat(of) for name, of in zip(gates, zip(*parts, strict=True), strict=True)}, len(parts)


def expected(model: nn.Module, batch: dict[str, torch.Tensor]) -> Gradients:
    """A pass for each example, with the gates as they always are."""
    gates, generator = trained(model), torch.Generator().manual_seed(0)
    rows = []
    for row in range(len(next(iter(batch.values())))):
        example = {name: value[row : row + 1] for name, value in batch.items()}
        output = model(**example)
        if "labels" in example:
            loss = output["loss"]
        else:
            logits = output["logits"] if "logits" in output else output["last_hidden_state"]
            flat = logits.flatten(0, -2).float()
            counts = example["attention_mask"][0].bool() if "attention_mask" in example else slice(None)
            head = head_of(model, logits)
            targets = head.draw(flat.detach(), generator)
            loss = head.surprise(flat[counts], targets[counts]).mean()
        rows.append(torch.autograd.grad(loss, [each.theta for each in gates.values()]))
    return {name: torch.stack(of) for name, of in zip(gates, zip(*rows, strict=True), strict=True)}


def check(model: nn.Module, batch: dict[str, torch.Tensor], parts: int = 1) -> None:
    wanted = expected(model, batch)
    got, number = found(model, batch)
    assert number == parts
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any(), name
        # The losses are formed in float32.
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def labelled(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return inputs | {"labels": inputs.get("input_ids", torch.tensor([0, 2]))}


def padded(left: bool = False) -> dict[str, torch.Tensor]:
    """Three texts of different lengths."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = mask[2, 2:] = 0
    mask = mask.flip(1) if left else mask
    return {"input_ids": torch.randint(3, 128, (3, 9), generator=generator) * mask, "attention_mask": mask}


@pytest.mark.parametrize("gates", [EVERYTHING, ("hidden",), (*EVERYTHING, "hidden")])
def test_one_pass_gives_what_a_pass_for_each_example_gives(row: Row, gates: Sequence[str]) -> None:
    model = gate(build(row, torch.float64), gates=gates)
    check(model, inputs_of(model))


@pytest.mark.parametrize("name", HEADED)
def test_by_the_models_own_loss_too(name: str) -> None:
    model = gate(build(ROWS[name], torch.float64), gates=(*EVERYTHING, "hidden"))
    check(model, labelled(model, inputs_of(model)))


@pytest.mark.parametrize("row", [LM_ROW, MIXED_ROW, BARE_ROW])
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(row: Row, left: bool) -> None:
    model = gate(build(row, torch.float64), gates=(*EVERYTHING, "hidden"))
    check(model, padded(left))


@pytest.mark.parametrize("row", [LM_ROW, MIXED_ROW])
def test_every_example_counts_its_own_tokens(row: Row) -> None:
    model, batch = gate(build(row, torch.float64), gates=(*EVERYTHING, "hidden")), padded()
    check(model, batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})


@pytest.mark.parametrize("options", [{"group_size": 8}, {"temperature": 0.5}])
def test_whatever_the_gates_are(options: dict[str, Any]) -> None:
    model = gate(build(LM_ROW, torch.float64), gates=(*EVERYTHING, "hidden"), **options)
    check(model, inputs_of(model))


def test_under_a_plan() -> None:
    model = gate(build(LM_ROW, torch.float64))
    plan = scattered_plan(model, LM_ROW.slim)
    model.set_masks(plan)
    wanted, (got, number) = expected(model, inputs_of(model)), found(model, inputs_of(model))
    assert number == 1
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-9)
    assert any((gradient == 0).any() for gradient in wanted.values())


@pytest.mark.parametrize("gates", [EVERYTHING, ("hidden",)])
def test_several_active_adapters_multiply(gates: Sequence[str]) -> None:
    model = gate(build(LM_ROW, torch.float64), gates=gates)
    model.add_adapter("other", HawAdaConfig(gates=gates))
    shuffle_gates(model, "other", seed=8).base_model.set_adapter(["default", "other"])
    model.eval()
    check(model, inputs_of(model))
    for name, each in collect_gates(model).items():
        each.theta.requires_grad_(name.endswith(".other"))
    check(model, inputs_of(model))


def test_lora_below_the_gates() -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = gate(build(LM_ROW, torch.float64), gates=EVERYTHING, lora=lora)
    check(model, inputs_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_regression_on_several_numbers() -> None:
    model = gate(build(VISION_ROW, torch.float64, problem_type="regression"))
    check(model, inputs_of(model) | {"labels": torch.randn(2, 3).double()})


def test_only_while_they_are_taken(row: Row) -> None:
    model = gate(build(row))
    found(model, inputs_of(model))
    assert all(each.row_thetas is None and each.theta.grad is None for each in collect_gates(model).values())


class Pixels(nn.Module):
    """Convolutions, and linear maps of all pixels as one batch, if `flat`."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False)
        self.linear = nn.Linear(4, 4)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.second(self.first(x).relu()).movedim(1, -1)
        return {"logits": self.linear(x.flatten(0, -2) if self.flat else x).reshape(x.shape)}


@pytest.mark.parametrize("adapter", [ChannelAdapter, BlockAdapter])
@pytest.mark.parametrize("flat", [True, False])
def test_any_module_also_where_its_batch_cannot_be_taken_apart(adapter: type, flat: bool) -> None:
    module = attach_adapters(Pixels(flat), adapter, "second|linear").double().eval()
    generator = torch.Generator().manual_seed(2)
    for each in collect_gates(module).values():
        each.theta.data.copy_(torch.randn(each.theta.shape, generator=generator))
    check(module, {"x": torch.randn(3, 3, 6, 6).double()}, parts=3 if flat else 1)
    assert all(each.row_thetas is None for each in collect_gates(module).values())


class Narrow(nn.Linear):
    """Memory for a backward pass of so many rows and no more."""

    room = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if len(x) > self.room:
            y.register_hook(self._refuse)
        return y

    def _refuse(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(f"{len(gradient)} rows")


@pytest.mark.parametrize(("room", "parts"), [(0, None), (1, 7), (3, 3), (4, 2), (7, 1)])
def test_a_batch_that_memory_does_not_suffice_for_is_halved(room: int, parts: int | None) -> None:
    model = gate(build(VISION_ROW, torch.float64))
    narrow = Narrow(64, 3).double()
    narrow.room = room
    model.get_base_model().classifier = narrow
    batch = {"pixel_values": torch.randn(7, 3, 16, 16).double()}
    if parts is None:
        with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
            found(model, batch)
    else:
        check(model, batch, parts)


class Penalized(LlamaForCausalLM):
    """A loss beside that of the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["loss"] = output["loss"] + 0.1 * output["logits"].square().mean()
        return output


def penalized() -> PeftModel:
    torch.manual_seed(1)
    model = Penalized(LlamaConfig(**LM)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return gate(model)


def test_a_loss_of_the_models_own_is_taken_example_by_example() -> None:
    model = penalized()
    check(model, labelled(model, inputs_of(model)), parts=2)


def test_tensors_without_rows_are_passed_on() -> None:
    model, temperature = gate(build(LM_ROW)), torch.tensor(1.0)
    inputs = inputs_of(model)
    plain, number = found(model, inputs)
    scaled, _ = found(model, inputs | {"use_cache": False, "unused": temperature})
    assert number == 1
    torch.testing.assert_close(scaled, plain)


def test_a_gate_with_values_for_each_row() -> None:
    single = SigmoidGate((2, 4))
    x = torch.randn(3, 5, 2, 4)
    with theta_per_row([single], 3) as (thetas,):
        thetas.data[1] -= 1
        y = single(x)
        with pytest.raises(RowsError, match=r"for 3 rows.*\(5, 2, 4\)"):
            single(x[0])
    torch.testing.assert_close(y[::2], single(x)[::2])
    single.theta.data -= 1
    torch.testing.assert_close(y[1], single(x)[1])


def test_tensors_of_another_length_belong_to_every_example() -> None:
    model = gate(build(LM_ROW, torch.float64))
    inputs = inputs_of(model)
    wanted, (got, number) = expected(model, inputs), found(model, inputs | {"position_ids": torch.arange(16)[None]})
    assert number == 2
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-9)
