"""What a question to a model leaves behind: nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, build, difference, gate, inputs_of, logits_of, scattered_plan
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, TrainingArguments
from zoo import ZOO

from hawada_peft import DistillTrainer, HawAdaConfig, Plan, recover, slim
from hawada_peft.distil import get_teacher_logits
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.mode import adapters_off, dropout_off, evaluating
from hawada_peft.vanilla.outputs import output_of


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def trainable(model: torch.nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def mixed() -> PeftModel:
    """In training, but for a part that someone keeps in evaluation mode."""
    model = gate(build(LM_ROW)).train()
    model.get_submodule("base_model.model.model.layers.1").eval()
    return model


def test_every_submodule_gets_its_own_mode_back() -> None:
    model = mixed()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before
    with pytest.raises(ValueError, match="input_ids"), evaluating(model):
        model(other=1)
    assert modes(model) == before
    output_of(model, inputs_of(model))
    get_teacher_logits(model, inputs_of(model))
    MaskedQuality(model, [inputs_of(model)])
    assert modes(model) == before


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["gates", "joint"])
@pytest.mark.parametrize("inference", [True, False])
def test_the_teachers_pass_leaves_what_is_frozen_frozen(inference: bool, lora: LoraConfig | None) -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig(inference_mode=inference, lora=lora))
    next(parameter for name, parameter in model.named_parameters() if "hawada" in name).requires_grad_(inference)
    before = trainable(model)
    get_teacher_logits(model, inputs_of(model))
    MaskedQuality(model, [inputs_of(model)])
    with adapters_off(model):
        pass
    assert trainable(model) == before


def test_a_teacher_with_adapters_stays_as_it_is(tmp_path: Path) -> None:
    dense = build(LM_ROW)
    student = slim(dense, scattered_plan(dense, LM_ROW.slim))
    expected = logits_of(dense)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    teacher = get_peft_model(dense, config)
    before = trainable(teacher)
    data = [{"input_ids": row} for row in inputs_of(dense)["input_ids"]]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=data)
    trainer.train()
    assert trainable(teacher) == before
    torch.testing.assert_close(trainer.teacher_logits(inputs_of(dense)), expected)


DROPPING = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},  # read from the config in each pass
    "bart": {"dropout": 0.3, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3},
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_off_inside_the_block_and_back_afterwards(name: str) -> None:
    torch.manual_seed(0)
    kind = ZOO[name]
    model = kind.model_class(kind.make_config(**DROPPING[name])).train()
    inputs = {"input_ids": torch.randint(3, 128, (4, 12))}

    def apart() -> float:
        return difference(*(model(**inputs).logits.detach() for _ in range(2)))

    before, rates = model.config.to_dict(), [vars(module).get("p") for module in model.modules()]
    assert apart() > 1e-3
    with dropout_off(model):
        assert apart() == 0
        assert all(modes(model))
    assert model.config.to_dict() == before
    assert [vars(module).get("p") for module in model.modules()] == rates
    assert apart() > 1e-3


@pytest.mark.parametrize("dropout", [False, True])
def test_a_recovery_has_dropout_only_where_it_is_asked_for(tmp_path: Path, dropout: bool) -> None:
    kind = ZOO["bert"]
    dense = kind.model_class(kind.make_config(**DROPPING["bert"])).eval()
    rates = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
            rates.append(model.bert.embeddings.dropout.p)

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    data = [{"input_ids": row} for row in torch.randint(3, 128, (8, 12))]
    plan = Plan.keep_all(locate(dense).dense)
    plan = replace(plan, layers=plan.layers[1:], heads=plan.heads[1:], channels=plan.channels[1:])
    small = recover(dense, args, plan=plan, train_dataset=data, dropout=dropout, callbacks=[Look()]).model
    assert rates == [0.3 if dropout else 0.0]
    assert small.bert.embeddings.dropout.p == small.config.hidden_dropout_prob == 0.3
