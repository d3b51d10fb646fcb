"""What a model's outputs stand for, and that every loss, draw and comparison goes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, build, gate, inputs_of, scattered_plan
from heads import HEADS, Headed
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hawada_peft import HawAdaConfig, HawAdaTrainer, collect_gates, init_gates, recover
from hawada_peft.distil.divergence import kl_divergence
from hawada_peft.errors import BadDataError, UnsupportedModelError
from hawada_peft.evaluation.measures import qualities
from hawada_peft.planning.importance import gate_importance
from hawada_peft.planning.per_example import example_gradients
from hawada_peft.refit.fidelity import divergence
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.search.refitted import RefittedQuality
from hawada_peft.surgery.slimming import slim
from hawada_peft.vanilla.heads import Classes, Labels, Values, head_of, prediction_of
from hawada_peft.vanilla.outputs import output_of


@pytest.fixture(params=HEADS)
def headed(request: pytest.FixtureRequest) -> Headed:
    return HEADS[request.param]


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Sixteen examples."""

    def __init__(self, model: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = {name: value.shape[1:] for name, value in inputs_of(model).items()}
        self.columns = {
            name: torch.randn(16, *shape, generator=generator)
            if name == "pixel_values"
            else torch.randint(3, 128, (16, *shape), generator=generator)
            for name, shape in shapes.items()
        }

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.columns.items()}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    plain: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(folder), **(plain | {"logging_steps": 1, "learning_rate": 2e-3} | options))


def batches(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    data = Rows(model).columns
    return [{name: value[start : start + 4] for name, value in data.items()} for start in (0, 4, 8)]


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """Other outputs, also in what a softmax does not see."""
    generator = torch.Generator().manual_seed(6)
    return logits + 1 + 0.5 * torch.randn(logits.shape, generator=generator)


def test_the_loss_is_the_heads(headed: Headed) -> None:
    model = build(headed.row)
    outputs = output_of(model, inputs_of(model)).clone()
    head = head_of(model, outputs)
    assert head.metric == headed.metric
    found = kl_divergence(shifted(outputs), outputs, head=head)
    torch.testing.assert_close(found, headed.loss(shifted(outputs), outputs), rtol=1e-4, atol=1e-6)
    assert kl_divergence(outputs, outputs, head=head).abs() < 1e-6
    assert head_of(gate(model), outputs).metric == headed.metric


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", [Classes(), Labels(), Values()], ids=["classes", "labels", "values"])
def test_gradients_are_those_of_the_formulas(head: Any, temperature: float) -> None:
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, temperature=temperature, head=head), student)
    loss = head.loss(temperature)
    by_student = torch.autograd.grad(loss.value(student, teacher, torch.float64).sum(), student)[0]
    torch.testing.assert_close(loss.gradient(student.detach(), teacher, torch.float64), by_student)


@pytest.mark.parametrize("head", [Classes(), Labels(), Values()], ids=["classes", "labels", "values"])
def test_draws_have_the_likelihood_that_the_surprise_is_of(head: Any) -> None:
    """The mean difference of surprises is the KL, up to the half of a squared error."""
    dense, other = torch.tensor([0.5, -1.0, 1.5]), torch.tensor([0.0, 0.5, 0.5])
    many = dense.expand(200_000, -1)
    drawn = head.draw(many, torch.Generator().manual_seed(0))
    found = (head.surprise(other.expand(200_000, -1), drawn) - head.surprise(many, drawn)).mean()
    wanted = (other - dense).square().sum() / 2
    if not isinstance(head, Values):
        wanted = head.loss().value(other[None], dense[None], torch.float32)[0]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("head", [Labels(), Values()], ids=["labels", "values"])
def test_broken_outputs_are_refused(head: Any) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        head.draw(torch.tensor([[0.0, torch.nan]]), torch.Generator())


def test_gates_are_trained_and_judged_by_it(headed: Headed, tmp_path: Path) -> None:
    base = build(headed.row)
    model = get_peft_model(base, HawAdaConfig())
    data = Rows(model)
    args = arguments(tmp_path, max_steps=4, per_device_eval_batch_size=16)
    trainer = HawAdaTrainer(model, args, train_dataset=data, eval_dataset=data, keep_ratio=0.5)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        expected = prediction_of(model(**data.columns), model)
    found = output_of(model, data.columns)
    assert loss == pytest.approx(float(headed.loss(found, expected)), rel=1e-3)
    assert loss > 0
    logged = [entry for entry in trainer.state.log_history if headed.metric in entry]
    assert logged
    assert logged[-1][headed.metric] > 0


BY_VALUES = ("llama-classes", "llama-questions", "vit-multi")
"""A model per kind of head whose own loss is a divergence, distilled by squared differences instead."""


@pytest.mark.parametrize(
    ("name", "kl_weight"), [*((name, 1.0) for name in HEADS), *((name, 0.0) for name in BY_VALUES)]
)
def test_recovery_lowers_it(name: str, kl_weight: float, tmp_path: Path) -> None:
    headed = HEADS[name]
    model = gate(build(headed.row))
    plan = scattered_plan(model, headed.row.slim)
    dense, data = build(headed.row), Rows(model)
    start = output_of(slim(dense, plan), data.columns)
    expected = output_of(dense, data.columns)
    args = arguments(tmp_path, max_steps=15, per_device_train_batch_size=16)
    trained = recover(dense, args, train_dataset=data, plan=plan, kl_weight=kl_weight, mse_weight=1 - kl_weight).model
    found = output_of(trained, data.columns)
    assert headed.loss(found, expected) < 0.6 * headed.loss(start, expected)


def test_importance_is_not_nothing_and_starts_gates_by_it(headed: Headed) -> None:
    model = get_peft_model(build(headed.row), HawAdaConfig())
    importance = gate_importance(model, batches(model))
    assert all(bool((value > 0).all()) for value in importance.values())
    init_gates(model, batches(model))
    for name, value in importance.items():
        if len(value) > 1:
            theta = collect_gates(model)[name].theta.detach()
            assert torch.equal(theta.argsort(), value.argsort()), name


def test_importance_of_one_output_is_its_squared_derivative() -> None:
    """The Fisher information of a Gaussian's mean: drawn, it is that in the mean."""
    model = get_peft_model(build(HEADS["vit-one"].row, torch.float64), HawAdaConfig(gates=["heads"]))
    model.eval()
    gates = list(collect_gates(model).values())
    batch = {name: value[:1] for name, value in inputs_of(model).items()}
    by_theta = torch.autograd.grad(model(**batch).logits.sum(), [each.theta for each in gates])
    generator, total, draws = torch.Generator().manual_seed(0), [torch.zeros(8).double() for _ in gates], 300
    for _ in range(draws):
        (part,) = example_gradients(model, gates, batch, generator)
        total = [sums + each[0].square() for sums, each in zip(total, part, strict=True)]
    for sums, each in zip(total, by_theta, strict=True):
        torch.testing.assert_close(sums / draws, each.square(), rtol=0.3, atol=0)


def test_masked_quality_is_it(headed: Headed) -> None:
    model = get_peft_model(build(headed.row), HawAdaConfig())
    quality = MaskedQuality(model, batches(model))
    plan = quality.plan(headed.row.slim)
    pairs = []
    for batch in batches(model):
        with model.disable_adapter():
            expected = output_of(model, batch)
        with quality._masked(plan):
            pairs.append((output_of(model, batch), expected))
    wanted = float(headed.loss(*(torch.cat(each) for each in zip(*pairs, strict=True))))
    sampled = isinstance(head_of(model, pairs[0][0]), Classes)
    assert quality.loss(plan) == pytest.approx(wanted, rel=0.9 if sampled else 1e-3)
    assert quality.loss(plan) > 0
    assert ("nats" in quality.meaning) == (headed.metric == "kl")


def test_refitted_models_and_fidelity_are_judged_by_it(headed: Headed) -> None:
    base = build(headed.row)
    plan = scattered_plan(gate(build(headed.row)), headed.row.slim)
    small, data = slim(base, plan), batches(base)
    name, found = divergence(base, small, data)
    assert name == headed.metric
    pairs = [(output_of(small, batch), output_of(base, batch)) for batch in data]
    wanted = headed.loss(*(torch.cat(each) for each in zip(*pairs, strict=True)))
    assert found == pytest.approx(float(wanted), rel=1e-3)
    model = get_peft_model(base, HawAdaConfig())
    quality = RefittedQuality(model, data)
    assert quality.evaluate(headed.row.slim) > 0
    assert ("nats" in quality.meaning) == (headed.metric == "kl")


TITLES = {Classes: "predictions that are", Labels: "labels that are", Values: "variance"}


def test_figures_of_quality_say_what_the_head_says(headed: Headed) -> None:
    base = build(headed.row)
    data = batches(base)
    small = slim(base, scattered_plan(gate(build(headed.row)), headed.row.slim))
    same, cut = qualities(base, base, data, "data")[0], qualities(base, small, data, "data")[0]
    assert same.name.startswith(TITLES[type(head_of(base, output_of(base, data[0])))])
    assert (same.dense, same.slim) == (pytest.approx(100), pytest.approx(100))
    assert cut.slim < 100
    with pytest.raises(BadDataError, match="no held-out examples"):
        qualities(base, small, [], "data")


def test_texts_of_one_token_have_no_perplexity() -> None:
    model = build(ROWS["llama"])
    (found,) = qualities(model, model, [{"input_ids": torch.tensor([[5], [7]])}], "data")
    assert found.slim == 100


def test_all_feature_maps_count() -> None:
    class Maps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"feature_maps": (x, 2 * x[..., :1])}

    x = torch.randn(2, 3, 4, 4)
    assert prediction_of(Maps()(x), Maps()).shape == (2, 3 * 16 + 3 * 4, 1)


def test_other_outputs_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gives \['boxes'\].*`start_logits`"):
        prediction_of({"boxes": torch.zeros(1)}, torch.nn.Identity())


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_several_classes_stay_classes(name: str) -> None:
    model = build(ROWS[name])
    assert isinstance(head_of(model, output_of(model, inputs_of(model))), Classes)
