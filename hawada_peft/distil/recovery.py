"""Recovery: prune, then train the slim model to compute what the dense model computes. One call."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from ..basis.bases import Bases, gated_bases
from ..errors import HawAdaError
from ..gates.adapter import GateAdapter
from ..planning.plan import Plan
from ..planning.towers import with_all
from ..race.race import Race
from ..race.record import Entrant
from ..refit.reconstruction import reconstruct
from ..shipping.facts import calibration_facts
from ..shipping.save import Slimmed
from ..surgery.dense import put_back
from ..surgery.slimming import slim
from ..vanilla.batches import Batch
from ..vanilla.family import among, locate
from ..vanilla.heads import is_bare
from ..vanilla.mode import dropout_off
from .arguments import rate_problems
from .muon import optimizer_problems
from .objective import Distillation
from .raced import RacedRecovery, racing_towers
from .sharded import gather_into, shards, twin_of
from .trainer import DistillTrainer, needs_states


def recover(
    model: PeftModel | PreTrainedModel,
    args: TrainingArguments | None = None,
    *,
    train_dataset: Any,
    plan: Plan | None = None,
    lora: LoraConfig | None = None,
    calibration: Iterable[Batch] | None = None,
    race: Race | bool = False,
    verify: bool = True,
    inputs: Batch | None = None,
    kd_temperature: float = 1.0,
    kl_weight: float = 1.0,
    mse_weight: float = 0.0,
    embedding_weight: float = 0.0,
    pooling: str = "mean",
    optimizer: str = "auto",
    dropout: bool = False,
    resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
    **kwargs: Any,
) -> Slimmed:
    """
    Remove what the plan closes, then distil the dense model into what is left.

    The slim model starts as what `merge_and_unload` gives: gates folded, equal to the gated model under its plan. The
    dense model is the teacher; memory holds both. Afterwards it is as it was before there were gates: `model` is used
    up, as by `merge_and_unload`, and its base model is the dense model again, bit for bit. Whatever fails, or Ctrl-C,
    leaves the gated model as it was.

    Args:
        model (`PeftModel` or `PreTrainedModel`): a gated model under a plan; or a dense one, with `plan`.
        args (`TrainingArguments`): as in `Trainer`, for the training of the slim model.
        train_dataset: what the dense model's behaviour is to be kept on. No labels needed.
        plan (`Plan`, *optional*): what to keep; the applied plan if left out.
        lora (`LoraConfig`, *optional*): train LoRA on the slim model, merged at the end; all weights if left out.
        calibration (*optional*): batches to refit the slim model on by least squares first, as `reconstruct` does. It
            costs no training and gives a better start.
        race (`Race`, *optional*): let plans and ways to prepare them race for what recovers best, within the race's
            budget; the plan at hand, if there is one, is one of them. Its steps are taken off `args.max_steps`. The
            calibration batches are what it judges, prepares and decides by, and are needed; whether the model is
            refitted on them is decided by the race. `True` for `Race()`. The record is in the output folder, under
            `race`; a race that was interrupted goes on from there.
        verify: as in `HawAdaModel.slim`, for the comparison of the gated and the slim model.
        inputs: as in `HawAdaModel.slim`, for the comparison of the gated and the slim model.
        kd_temperature (`float`): T of the KL divergence.
        kl_weight (`float`): weight of the divergence.
        mse_weight (`float`): weight of the squared difference of logits.
        embedding_weight (`float`): weight of the cosine distance of pooled embeddings, of models that give hidden
            states: what sentence encoders are used by. With `kl_weight=0` it is all there is; otherwise the squared
            difference of every token's states is added. A race is decided by the states all the same.
        pooling (`str`): how an example's embedding is made of its tokens' states: `"mean"`, `"cls"` for the first, or
            `"last"`.
        optimizer (`str`): `"muon"` for Muon on the matrices of the layers and AdamW on the rest (`MuonAdamW`);
            `"args"` for the one that `args.optim` names, AdamW unless set otherwise; or `"auto"`: Muon where all
            weights are trained, torch has it (from 2.9), nothing is sharded and `args.optim` is left at AdamW.
        dropout (`bool`): train with the dropout that the model's config asks for. It is off otherwise, as it is in
            the dense model that is imitated; the config keeps its rates. LoRA's dropout is that of `lora`.
        resume_from_checkpoint (*optional*): as in `Trainer.train`, of a run that started from the same model.
        kwargs: as in `Trainer`: `eval_dataset`, `data_collator`, `callbacks`, ...

    Returns:
        `Slimmed`: its `model` is the slim vanilla model, trained, in the mode and with the config that it would have
        without the training; `dense` is the dense one, `race` the record of the race.

    Raises:
        HawAdaError: listing everything that is wrong with the arguments; nothing has been changed then. Also as
            `reconstruct`, if there is too little to calibrate on.
        IncompatibleBaseError, IllegalShapeError, BrokenGatesError, UnsupportedModelError: as `merge_and_unload`.
    """
    problems = []
    racing = Race() if race is True else race if isinstance(race, Race) else None
    gated = isinstance(model, PeftModel) and any(isinstance(module, GateAdapter) for module in model.modules())
    chosen = cast(Any, model).applied_plan() if gated and plan is None else plan
    if not gated and not isinstance(model, PreTrainedModel):
        problems.append(
            "model must be made by get_peft_model(base, HawAdaConfig(...)), or a PreTrainedModel, got a "
            f"{type(model).__name__}"
        )
    elif chosen is None and (racing is None or racing.budget is None):
        problems.append("no plan: call `model.apply_plan(model.plan(...))` before, or pass `plan`")
    elif chosen is not None and not isinstance(chosen, Plan):
        problems.append(f"plan must be a Plan, got a {type(chosen).__name__}")
    elif chosen is not None and chosen.keeps_all:
        problems.append("the plan keeps everything: there is nothing to recover from")
    if not isinstance(race, Race | bool):
        problems.append(f"race must be a Race, True or False, got a {type(race).__name__}")
    elif racing is not None and calibration is None:
        problems.append("a race needs `calibration`: batches that plans are judged and compared on")
    if lora is not None and not isinstance(lora, LoraConfig):
        problems.append(f"lora must be a LoraConfig, got a {type(lora).__name__}")
    if not isinstance(args, TrainingArguments | None):
        problems.append(f"args must be TrainingArguments, got a {type(args).__name__}")
    else:
        problems += rate_problems({} if args is None else vars(args)) + optimizer_problems(optimizer, args)
    try:
        Distillation(kd_temperature, kl_weight, mse_weight, embedding_weight, pooling)
    except HawAdaError as error:
        problems.append(str(error))
    if embedding_weight and isinstance(model, nn.Module) and not is_bare(model):
        problems.append(needs_states(model))
    if problems:
        raise HawAdaError("\n".join(problems))
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    args = args or (TrainingArguments("tmp_trainer") if racing else None)  # as `Trainer` has it

    def train(
        student: PreTrainedModel,
        args: TrainingArguments | None,
        resume: str | os.PathLike[str] | bool | None = None,
        quiet: bool = False,
        **more: Any,
    ) -> PreTrainedModel:
        with nullcontext() if dropout else dropout_off(student):
            target = student if lora is None else get_peft_model(student, lora)
            sharded = shards(args)
            trainer = DistillTrainer(
                twin_of(target) if sharded else target,
                args,
                teacher=base,
                train_dataset=train_dataset,
                kd_temperature=kd_temperature,
                kl_weight=kl_weight,
                mse_weight=mse_weight,
                embedding_weight=embedding_weight,
                pooling=pooling,
                optimizer=optimizer,
                **more,
            )
            if quiet:
                trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=resume)
        if sharded:
            gather_into(target, trainer.student)
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # its output is not autocast any more
        trained: Any = target
        return trained if lora is None else trained.merge_and_unload()

    bases = _bases_of(model) if racing is not None and isinstance(model, PeftModel) else None
    with put_back(base, always=False):  # until the end the gates may still be needed
        slimmed: Slimmed | None = None
        if isinstance(model, PeftModel) and chosen is None:
            cast(Any, model).unload()
        elif isinstance(model, PeftModel):
            refit = None if racing else calibration
            slimmed = cast(Any, model).slim(
                plan=plan, safe_merge=True, calibration=refit, verify=verify, inputs=inputs
            )
        elif racing is None:
            slimmed = _cut(model, cast(Plan, chosen), calibration)
        training = base.training
        if racing is not None:
            batches = list(cast(Iterable[Batch], calibration))
            short = {name: kwargs[name] for name in ("data_collator", "processing_class") if name in kwargs}
            raced = RacedRecovery(
                racing,
                base,
                cast(TrainingArguments, args),
                lambda student, args: train(student, args, quiet=True, **short),
                batches,
                chosen,
                None if slimmed is None else slimmed.model,
                optimizer,
                bases,
            )
            layouts = racing_towers(base, racing, chosen)
            with among(base, layouts):
                record, small = raced.run()
            args = copy.copy(cast(TrainingArguments, args))
            args.max_steps = raced.steps_left(record)
            best = with_all(layouts, cast(Entrant, record.best).plan)
            slimmed = Slimmed(small, best, dense=base, race=record, calibration=calibration_facts(batches))
        slimmed = cast(Slimmed, slimmed)
        trained = train(slimmed.model, args, resume_from_checkpoint, **kwargs)
        trained.requires_grad_(True)  # as of a model that was just loaded
    if racing is not None:
        raced.clean()
    return replace(slimmed, model=trained.train(training))


def _bases_of(model: PeftModel) -> Bases | None:
    """What a gated model's plan may keep directions of; None if the adapter has no basis."""
    base = model.get_base_model()
    found = gated_bases(base, locate(base), model.active_adapters)
    return None if found == Bases() else copy.deepcopy(found)


def _cut(dense: PreTrainedModel, plan: Plan, calibration: Iterable[Batch] | None) -> Slimmed:
    """A dense model's slim one by a plan that did not come from gates."""
    small = slim(dense, plan)
    if calibration is None:
        return Slimmed(small, plan, dense=dense)
    batches = list(calibration)
    report = reconstruct(dense, small, plan, batches)
    return Slimmed(small, plan, dense=dense, reconstruction=report, calibration=calibration_facts(batches))
