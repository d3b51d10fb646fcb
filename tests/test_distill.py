"""Teacher and student logits, and the losses between them."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    BARE_ROW,
    LM_ROW,
    PLAIN,
    VISION_ROW,
    Row,
    build,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
)
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hawada_peft.distil import get_student_logits, get_teacher_logits
from hawada_peft.distil.divergence import kl_divergence, mean_squared_error
from hawada_peft.errors import HawAdaError, UnsupportedModelError
from hawada_peft.vanilla.batches import position_mask


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape), torch.randn(*shape)


def test_teacher_is_the_dense_model_and_student_the_gated_one(row: Row) -> None:
    model = build(row)
    dense = logits_of(model)
    model = gate(model)
    inputs = inputs_of(model)
    assert torch.equal(get_teacher_logits(model, inputs), dense)
    assert torch.equal(get_student_logits(model, inputs), logits_of(model))


def test_teacher_ignores_plans_dropout_and_the_mode() -> None:
    row = Row(VISION_ROW.model, VISION_ROW.config, VISION_ROW.fields | {"hidden_dropout_prob": 0.5}, PLAIN)
    model = build(row)
    dense = logits_of(model)
    model = gate(model)
    model.apply_plan(scattered_plan(model, PLAIN), in_training=True)
    found = get_teacher_logits(model.train(), inputs_of(model))
    assert torch.equal(found, dense)
    assert model.training
    assert not found.requires_grad


def test_student_keeps_gradients() -> None:
    model = gate(build(VISION_ROW)).train()
    assert get_student_logits(model, inputs_of(model)).requires_grad


def test_labels_are_left_out() -> None:
    model = gate(build(LM_ROW))
    inputs = inputs_of(model)
    found = get_student_logits(model, inputs | {"labels": torch.full((1,), 10**6)})
    assert torch.equal(found, get_student_logits(model, inputs))


def test_bare_model_gives_hidden_states() -> None:
    model = gate(build(BARE_ROW))
    assert get_student_logits(model, inputs_of(model)).shape == (2, 16, 64)


def test_model_without_either_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"boxes": x}

    with pytest.raises(UnsupportedModelError, match=r"Odd gives \['boxes'\].*`logits`"):
        get_student_logits(Odd(), {"x": torch.zeros(1)})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_zero_for_equals_and_for_shifted_logits(temperature: float) -> None:
    logits = torch.randn(4, 7)
    assert kl_divergence(logits, logits, temperature=temperature) == 0
    assert float(kl_divergence(logits + 3, logits, temperature=temperature)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_divergence_is_positive_for_others(shape: tuple[int, ...]) -> None:
    assert kl_divergence(*pair(*shape)) > 0


def test_divergence_by_its_definition() -> None:
    student, teacher = pair(2, 3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(student, teacher), expected)


def test_temperature_softens_and_scales() -> None:
    student, teacher = pair(4, 5)
    torch.testing.assert_close(
        kl_divergence(student, teacher, temperature=3.0), 9 * kl_divergence(student / 3, teacher / 3)
    )


@pytest.mark.parametrize("loss", [kl_divergence, mean_squared_error])
def test_mask_chooses_positions(loss) -> None:
    student, teacher = pair(2, 3, 5)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(loss(student, teacher, mask=mask), loss(student[mask > 0], teacher[mask > 0]))
    torch.testing.assert_close(loss(student, teacher, mask=torch.ones(2, 3)), loss(student, teacher))
    assert loss(student, teacher, mask=torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("loss", [kl_divergence, mean_squared_error])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_or_wider(loss, dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in pair(4, 5))
    found = loss(student, teacher)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, loss(student.to(found.dtype), teacher.to(found.dtype)))


def test_squared_error_is_the_mean_over_everything() -> None:
    student, teacher = pair(2, 3, 5)
    torch.testing.assert_close(mean_squared_error(student, teacher), functional.mse_loss(student, teacher))


def test_gradient_draws_the_student_to_the_teacher() -> None:
    student, teacher = pair(6, 5)
    student.requires_grad_(True)
    before = kl_divergence(student, teacher)
    before.backward()
    assert kl_divergence(student - 0.5 * student.grad, teacher) < before


def divergence_by_autograd(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    values = (p * (p.log() - q)).sum(-1)
    return temperature**2 * (values * mask).sum() / mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 0, 1], [0, 1, 1]])], ids=["all", "masked"])
def test_gradients_written_by_hand_are_those_of_the_value(temperature: float, mask: torch.Tensor | None) -> None:
    student, teacher = (logits.double() for logits in pair(2, 3, 5))
    student.requires_grad_(True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda s: 3 * kl_divergence(s, teacher, temperature=temperature, mask=mask), student)
        assert check(lambda s: 3 * mean_squared_error(s, teacher, mask=mask), student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_many_slices_are_one_mean(temperature: float) -> None:
    student, teacher = pair(2, 7, 100_000)  # of 262,144 elements at most
    student, teacher, mask = student.double(), teacher.double(), torch.rand(2, 7).double()
    student.requires_grad_(True)
    found = kl_divergence(student, teacher, temperature=temperature, mask=mask * 10)
    expected = divergence_by_autograd(student, teacher, mask, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))
    squared = mean_squared_error(student, teacher)
    torch.testing.assert_close(squared, functional.mse_loss(student, teacher))
    torch.testing.assert_close(torch.autograd.grad(squared, student)[0], (student - teacher) * 2 / student.numel())


class Largest(TorchDispatchMode):
    """The elements of the largest tensor of a dtype that any operation gives."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == self.dtype:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("loss", [kl_divergence, mean_squared_error])
def test_no_wide_copy_of_all_logits_is_made(loss) -> None:
    student, teacher = (logits.to(torch.bfloat16) for logits in pair(12, 100_000))
    student.requires_grad_(True)
    with Largest(torch.float32) as largest:
        loss(student, teacher).backward()
    assert 0 < largest.elements <= student.numel() / 4
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("loss", [kl_divergence, mean_squared_error])
def test_losses_refuse_other_shapes(loss) -> None:
    student, teacher = pair(2, 3, 5)
    with pytest.raises(HawAdaError, match=r"one shape, got \(2, 3, 5\) and \(2, 3, 4\)"):
        loss(student, teacher[..., :4])
    with pytest.raises(HawAdaError, match=r"the positions, \(2, 3\), got \(3,\)"):
        loss(student, teacher, mask=torch.ones(3))


@pytest.mark.parametrize(("mask", "used"), [(torch.ones(2, 3), True), (torch.ones(2, 1, 3), False), (None, False)])
def test_mask_of_a_batch_counts_where_logits_have_positions(mask: torch.Tensor | None, used: bool) -> None:
    assert (position_mask({"attention_mask": mask}, torch.Size([2, 3])) is not None) == used
    assert position_mask({"attention_mask": mask}, torch.Size([2])) is None
