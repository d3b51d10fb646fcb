"""Doing what a recipe says: load, gates, train, save, merge, refit, recover, time, save."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from ..basis.attach import give_bases
from ..basis.bases import Bases
from ..basis.stored import load_beside
from ..distil.recovery import recover
from ..errors import HawAdaError
from ..planning.plan import Plan
from ..progress import Progress
from ..shipping.facts import calibration_facts
from ..training.trainer import HawAdaTrainer
from ..vanilla.loading import load_model
from .ending import finish
from .examples import Example, batches_from, load_data
from .facts import Facts
from .here import check_device, missing_here
from .recipe import Recipe
from .record import Record
from .result import RecipeResult
from .settings import ReconstructionStep

logger = logging.getLogger(__name__)


def train_recipe(
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """
    Slim a model as a recipe says: `hawada train` as a call.

    Works under `torchrun` and `accelerate launch` as `Trainer` does: every process calls it, the first one writes.

    Args:
        recipe (`Recipe` or path): the recipe, or its YAML file.
        overrides: as in `Recipe.read`, for a file.
        resume (`bool`): go on where an interrupted run of the same recipe stopped.
        progress (*optional*): `tqdm.tqdm` for progress bars. Without it the trainers print lines, as with
            `TrainingArguments(disable_tqdm=True)`.

    Returns:
        `RecipeResult`: sizes, latency and losses before and after. The output folder holds `adapter` and `slim`, the
        trainings' checkpoints in `gates` and `recovery`, `recipe.json`, `result.json` and `gate_history.json`.

    Raises:
        HawAdaError: before any work on whatever is wrong with the recipe, and on what only the model can tell, before
            any training.
        FileNotFoundError: if data files are missing.
        FileExistsError: if the output folder holds something else.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(recipe, overrides)
    if missing := missing_here(recipe):
        raise FileNotFoundError("\n".join(f"missing here, and named in the recipe: {each}" for each in missing))
    args = recipe.arguments("training", Path(recipe.output) / "gates")
    recovery_args = recipe.arguments("recovery", Path(recipe.output) / "recovery")
    args.disable_tqdm = recovery_args.disable_tqdm = progress is None
    check_device(recipe, args.device)  # it joins the other processes, if there are any
    state = PartialState()
    record = Record(recipe, resume=resume, main=state.is_main_process)
    state.wait_for_everyone()  # all have looked before anything is written
    record.begin()
    try:
        return _run(recipe, record, (args, recovery_args))
    finally:
        record.end()


def _run(recipe: Recipe, record: Record, arguments: tuple[TrainingArguments, TrainingArguments]) -> RecipeResult:
    """All that is not done yet."""
    (args, recovery_args), state = arguments, PartialState()
    state.wait_for_everyone()
    if (done := record.result()) is not None:
        return RecipeResult.from_dict(done)
    set_seed(recipe.seed)
    with state.main_process_first():  # a dataset is prepared once, the others find it in the cache
        train, held_out = load_data(recipe.source(), recipe.model, recipe.seed)
    if record.stage("gates") is None:
        if recipe.plan is None:
            losses = _train_gates(recipe, record, args, train, held_out)
        else:
            losses = _close_gates(recipe, record, recipe.plan)
        record.end_stage("gates", losses)
        state.wait_for_everyone()
        clear_device_cache(garbage_collection=True)
    model = PeftModel.from_pretrained(load_model(recipe.model, dtype=recipe.dtype), str(record.adapter))
    model.to(args.device)
    plan: Plan = cast(Any, model).applied_plan()
    facts = Facts(record.stage("gates") or {})
    slim, dense = _cut(recipe, record, model, recovery_args, (train, held_out), facts)
    if facts.race is not None and facts.race.best is not None:
        plan = facts.race.best.plan
    return finish(recipe, record, (dense, slim), plan, held_out, facts)


def _train_gates(
    recipe: Recipe, record: Record, args: TrainingArguments, train: Dataset[Example], held_out: Dataset[Example]
) -> dict[str, float]:
    """Train the gates and save the adapter. Returns the held-out loss under the plan."""
    model = get_peft_model(load_model(recipe.model, dtype=recipe.dtype), recipe.config())
    trainer = HawAdaTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        **recipe.searching(),
        **recipe.goal(),
    )
    trainer.train(resume_from_checkpoint=record.checkpoint("gates"))
    record.keep_history()
    loss = trainer.evaluate()["eval_loss"]
    _save_gates(model, record)
    return {"gates": loss}


def _close_gates(recipe: Recipe, record: Record, file: str) -> dict[str, float]:
    """Fresh gates under a plan that is given, saved as an adapter."""
    model: Any = get_peft_model(load_model(recipe.model, dtype=recipe.dtype), recipe.config())
    plan = Plan.from_json(Path(file).read_text(encoding="utf-8"))
    give_bases(model, plan, load_beside(Path(file), plan) or Bases())
    model.apply_plan(plan)
    _save_gates(model, record)
    return {}


def _save_gates(model: PeftModel, record: Record) -> None:
    if cast(Any, model).applied_plan().keeps_all:
        raise HawAdaError("the plan keeps everything: the dense model is what was asked for. Ask for a smaller one")
    if record.main:
        temporary = record.folder / ".adapter"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(str(temporary))
        if record.adapter.exists():
            shutil.rmtree(record.adapter)
        temporary.rename(record.adapter)


def _cut(
    recipe: Recipe,
    record: Record,
    model: PeftModel,
    args: TrainingArguments,
    data: tuple[Dataset[Example], Dataset[Example]],
    facts: Facts,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Merge, refit, recover. Returns the slim model and the dense one."""
    train, held_out = data
    base = cast(PreTrainedModel, model.get_base_model())
    calibration = _calibration(recipe, train, facts)
    if recipe.recovery is None:
        slimmed = cast(Any, model).slim(safe_merge=True, calibration=calibration)
        facts.reconstruction = slimmed.reconstruction
        return slimmed.model, base
    args.eval_on_start = True
    slimmed = recover(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        lora=recipe.lora(),
        calibration=calibration,
        race=recipe.racing() or False,
        callbacks=[facts.evaluations()],
        resume_from_checkpoint=record.checkpoint("recovery"),
        **recipe.options(),
    )
    facts.reconstruction, facts.race = slimmed.reconstruction, slimmed.race
    return slimmed.model, base


def _calibration(recipe: Recipe, train: Dataset[Example], facts: Facts) -> list[Example] | None:
    """This process's share of the calibration batches, if a reconstruction or a race needs them."""
    if recipe.reconstruction is None and recipe.racing() is None:
        return None
    step, state = ReconstructionStep(**(recipe.reconstruction or {})), PartialState()
    batches = batches_from(train, step.examples, step.batch_size)
    facts.calibration = calibration_facts(batches)
    return batches[state.process_index :: state.num_processes]
