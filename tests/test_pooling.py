"""Embeddings pooled of hidden states, and distilling them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import state_of
from distil_runs import DATA, LENGTHS, arguments, logged, trainer_of
from torch.nn import functional
from transformers import BertConfig, BertModel

from hawada_peft import DistillTrainer, recover, slim
from hawada_peft.distil.objective import Distillation
from hawada_peft.distil.pooling import POOLINGS, cosine_distance
from hawada_peft.errors import HawAdaError
from hawada_peft.planning.plan import Plan
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.heads import Classes, Values

MASK = torch.stack([row["attention_mask"] for row in DATA])
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "max_steps": 2}


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(0))


def encoder() -> BertModel:
    """Without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # so that layers do something
    return model


def plan_of(model: BertModel) -> Plan:
    full = Plan.keep_all(locate(model).dense)
    return replace(full, layers=(0, 2), heads=full.heads[:2], channels=(tuple(range(16)),) * 2)


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    columns = {name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}
    with torch.no_grad():
        found = model.eval()(**columns).last_hidden_state
    return functional.normalize((found * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True), dim=-1)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_tokens_are_pooled_on_whichever_side_the_padding_is(states: torch.Tensor, pooling: str) -> None:
    pool = POOLINGS[pooling]
    alone = torch.cat([pool(row[None, :length], None) for row, length in zip(states, LENGTHS, strict=True)])
    torch.testing.assert_close(pool(states, MASK), alone)
    rolled = torch.stack([row.roll(12 - length, 0) for row, length in zip(states, LENGTHS, strict=True)])
    torch.testing.assert_close(pool(rolled, MASK.flip(1)), alone)


def test_the_three_are_the_mean_the_first_and_the_last(states: torch.Tensor) -> None:
    wanted = {"mean": states.mean(1), "cls": states[:, 0], "last": states[:, -1]}
    for name, pool in POOLINGS.items():
        torch.testing.assert_close(pool(states, None), wanted[name])


def test_the_distance_is_of_the_directions(states: torch.Tensor) -> None:
    other = states + torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (functional.normalize(POOLINGS["mean"](each, MASK), dim=-1) for each in (states, other))
    found = cosine_distance(states, other, MASK)
    torch.testing.assert_close(found, 1 - (ours * theirs).sum(-1).mean())
    torch.testing.assert_close(found, (ours - theirs).square().sum(-1).mean() / 2)
    torch.testing.assert_close(cosine_distance(3 * states, other, MASK), found)
    assert cosine_distance(states, states, MASK).abs() < 1e-6


def test_it_is_computed_in_float32_and_gradients_flow_to_the_student_alone(states: torch.Tensor) -> None:
    student, teacher = states.bfloat16().requires_grad_(), (states + 1).requires_grad_()
    loss = cosine_distance(student, teacher, MASK)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16
    assert student.grad[MASK == 0].abs().sum() == 0 < student.grad[MASK == 1].abs().sum()
    assert teacher.grad is None


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 1), (2, 3, 4, 5)])
def test_what_is_no_states_of_tokens_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(HawAdaError, match=r"hidden states, \(batch, tokens, hidden\)"):
        cosine_distance(torch.ones(shape), torch.ones(shape))


def test_embeddings_alone_or_beside_the_states(states: torch.Tensor) -> None:
    other = states.flip(0)
    alone = Distillation(kl_weight=0.0, embedding_weight=2.0)
    terms = alone.terms(states, other, MASK, head=Values())
    assert set(terms) == {"embedding"}
    torch.testing.assert_close(alone.loss(terms), 2 * cosine_distance(states, other, MASK))
    both = Distillation(mse_weight=0.5, embedding_weight=2.0, pooling="cls")
    terms = both.terms(states, other, MASK, head=Values())
    assert set(terms) == {"mse", "embedding"}
    torch.testing.assert_close(both.loss(terms), 1.5 * terms["mse"] + 2 * terms["embedding"])
    terms = Distillation(embedding_weight=1.0).terms(states, other, MASK, head=Classes())
    assert set(terms) == {"kl", "embedding"}


@pytest.mark.parametrize("kl_weight", [0.0, 1.0], ids=["alone", "beside the states"])
def test_recovery_brings_embeddings_nearer(tmp_path: Path, kl_weight: float) -> None:
    dense = encoder()
    plan = plan_of(dense)
    before = (embeddings(slim(encoder(), plan)) * embeddings(dense)).sum(-1).mean()
    args = arguments(tmp_path, max_steps=20, per_device_train_batch_size=8, learning_rate=5e-3)
    more: dict[str, Any] = {"kl_weight": kl_weight, "embedding_weight": 1.0}
    slimmed = recover(dense, args, train_dataset=DATA, plan=plan, optimizer="args", **more)
    after = (embeddings(slimmed.model) * embeddings(dense)).sum(-1).mean()
    assert 1 - after < 0.5 * (1 - before)


def trained(folder: Path, *, args: dict[str, Any], **options: Any) -> DistillTrainer:
    student = slim(encoder(), plan_of(encoder()))
    trainer = trainer_of(folder, student, teacher=encoder(), args=args, embedding_weight=1.0, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kl_weight", [0.0, 1.0], ids=["alone", "beside the states"])
def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path: Path, kl_weight: float) -> None:
    """Examples count the same, however many tokens they have."""
    whole, parts = (
        trained(
            tmp_path / str(batch),
            args=SGD | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch},
            kl_weight=kl_weight,
        )
        for batch in (8, 2)
    )
    torch.testing.assert_close(state_of(parts.student), state_of(whole.student), rtol=1e-4, atol=1e-5)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert logged(parts, "embedding") == pytest.approx(logged(whole, "embedding"), rel=1e-4)


def test_the_distance_is_logged_and_evaluated(tmp_path: Path) -> None:
    args = SGD | {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = trained(tmp_path, args=args | {"per_device_eval_batch_size": 8}, kl_weight=0.0)
    wanted = 1 - (embeddings(trainer.student) * embeddings(encoder())).sum(-1).mean().item()
    assert logged(trainer, "embedding") == pytest.approx([wanted], rel=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    assert metrics["eval_embedding"] == pytest.approx(wanted, rel=1e-4)


def test_a_model_with_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HawAdaError, match=r"LlamaForCausalLM gives something else: load .* \(AutoModel\)"):
        trainer_of(tmp_path, embedding_weight=1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"embedding_weight": -1.0}, "embedding_weight=-1.0"),
        ({"kl_weight": 0.0}, "embedding_weight=0.0"),
        ({"embedding_weight": "x"}, "embedding_weight"),
        ({"pooling": "max"}, "pooling must be one of ['mean', 'cls', 'last'], got 'max'"),
        ({"pooling": []}, "pooling must be one of"),
    ],
)
def test_what_is_wrong_is_said(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(HawAdaError) as error:
        Distillation(**arguments)
    assert named in str(error.value)
