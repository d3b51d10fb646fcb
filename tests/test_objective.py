"""The objective both trainers share: `hawada_peft/distil/objective.py`."""

import pytest
import torch

from hawada_peft.distil.objective import Distillation
from hawada_peft.errors import HawAdaError
from hawada_peft.vanilla.heads import Classes, Values

CLASSES = Classes()


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)


def test_of_equal_logits_it_is_nothing(logits):
    student, _ = logits
    objective = Distillation(mse_weight=1.0)

    assert objective.loss(objective.terms(student, student, head=CLASSES)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms(logits):
    objective = Distillation(kd_temperature=2.0, kl_weight=0.3, mse_weight=0.7)

    terms = objective.terms(*logits, head=CLASSES)

    torch.testing.assert_close(objective.loss(terms), 0.3 * terms["kl"] + 0.7 * terms["mse"])
    assert set(terms) == {"kl", "mse"}
    assert all(term.shape == () and term > 0 for term in terms.values())


def test_it_is_the_kl_divergence_by_default(logits):
    student, teacher = (torch.log_softmax(values.double(), -1) for values in logits)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()

    terms = Distillation().terms(*logits, head=CLASSES)

    assert set(terms) == {"kl"}
    torch.testing.assert_close(Distillation().loss(terms), expected.float())


def test_without_the_divergence_it_is_the_squared_difference(logits):
    student, teacher = logits
    objective = Distillation(kl_weight=0.0, mse_weight=2.0)

    loss = objective.loss(objective.terms(student, teacher, head=CLASSES))

    torch.testing.assert_close(loss, 2 * (student - teacher).square().mean())


@pytest.mark.parametrize(("kl_weight", "mse_weight"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_outputs_that_are_no_distribution_have_their_squared_difference(logits, kl_weight, mse_weight):
    student, teacher = logits
    objective = Distillation(kl_weight=kl_weight, mse_weight=mse_weight)

    terms = objective.terms(student, teacher, head=Values())

    assert set(terms) == {"mse"}
    wanted = (kl_weight + mse_weight) * (student - teacher).square().mean()
    torch.testing.assert_close(objective.loss(terms), wanted)


def test_positions_outside_the_mask_do_not_count(logits):
    student, teacher = logits
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    objective = Distillation(mse_weight=0.5)
    expected = objective.loss(objective.terms(student[mask.bool()], teacher[mask.bool()], head=CLASSES))

    loss = objective.loss(objective.terms(student, teacher, mask, head=CLASSES))

    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.half)]
)
def test_student_and_teacher_may_differ_in_dtype(logits, student_dtype, teacher_dtype):
    student, teacher = logits[0].to(student_dtype).requires_grad_(), logits[1].to(teacher_dtype)
    objective = Distillation(mse_weight=0.5)

    loss = objective.loss(objective.terms(student, teacher, head=CLASSES))
    loss.backward()

    assert loss.dtype == torch.float32
    assert student.grad.dtype == student_dtype
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kd_temperature": 0.0}, ["kd_temperature"]),
        ({"kl_weight": -1.0}, ["kl_weight=-1.0"]),
        ({"kl_weight": 0.0}, ["kl_weight=0.0", "mse_weight=0.0"]),
        ({"mse_weight": float("nan")}, ["mse_weight=nan"]),
        ({"kd_temperature": float("inf"), "mse_weight": -1.0}, ["kd_temperature", "mse_weight=-1.0"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(arguments, named):
    with pytest.raises(HawAdaError) as error:
        Distillation(**arguments)

    assert all(name in str(error.value) for name in named)
