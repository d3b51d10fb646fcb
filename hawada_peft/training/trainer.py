"""The trainer of gates: `transformers.Trainer` with a distillation loss, a target shape and a moment of decision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.attach import collect_gates
from ..adapters.base import BLOCK, LAYER, UNITS, GateAdapter
from ..adapters.gates import HeadGate, SigmoidGate
from ..adapters.huggingface.shape import Shape
from ..errors import HawAdaError
from ..export.plan import Plan
from .distill import get_student_logits, get_teacher_logits, kl_divergence, mean_squared_error, position_mask
from .penalties import size_penalty

logger = logging.getLogger(__name__)


class HawAdaTrainer(Trainer):
    """
    Trains the gates of a PEFT model towards a shape, by distillation from the same model with the adapter disabled.

    For the first `soft_fraction` of the steps the gates are soft and their expected keep ratios are drawn down to the
    shape's. Then the plan is made from the gates and applied, in training as well, and the rest of the training runs
    under exactly the mask that is exported. The loss is `kl_weight * KL + mse_weight * MSE + size_weight * size`.

    Gates move by about the learning rate per step (Adam) and have some 4 to go: use 0.02 to 0.1 where a few hundred
    steps are trained.

    Args:
        model (`PeftModel`): made by `get_peft_model(base, HawAdaConfig(...))`.
        args (`TrainingArguments`): as in `Trainer`.
        shape (`Shape`, *optional*): the sizes of the slim model.
        keep_ratio (`float` or `dict`, *optional*): instead of a shape, as in `HawAdaModel.plan`.
        kd_temperature (`float`): T of the KL divergence.
        kl_weight, mse_weight (`float`): weights of the divergence and of the squared difference of logits.
        size_weight (`float`): weight of `size_penalty`, summed over heads, FFN and layers.
        soft_fraction (`float`): the part of the steps before the plan is made, in [0, 1].
        kwargs: as in `Trainer`.

    Raises:
        HawAdaError: listing everything that is wrong with the arguments.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments | None = None,
        *,
        shape: Shape | None = None,
        keep_ratio: float | Mapping[str, float] | None = None,
        kd_temperature: float = 1.0,
        kl_weight: float = 1.0,
        mse_weight: float = 0.0,
        size_weight: float = 10.0,
        soft_fraction: float = 0.25,
        **kwargs: Any,
    ) -> None:
        problems = []
        tuner = model.base_model if isinstance(model, PeftModel) else None
        if not isinstance(tuner, BaseTuner) or tuner.tuner_layer_cls is not GateAdapter:
            problems.append(
                f"model must be made by get_peft_model(base, HawAdaConfig(...)), got {type(model).__name__}"
            )
        elif len(model.active_adapters) != 1:
            problems.append(f"one adapter must be active, got {model.active_adapters}; see `model.set_adapter`")
        if (shape is None) == (keep_ratio is None):
            problems.append("give either `shape` or `keep_ratio`: what the gates are trained towards")
        if not kd_temperature > 0:
            problems.append(f"kd_temperature must be above 0, got {kd_temperature}")
        if min(kl_weight, mse_weight, size_weight) < 0 or kl_weight + mse_weight == 0:
            problems.append(
                "weights must not be negative, and one of kl_weight and mse_weight above 0, got "
                f"kl_weight={kl_weight}, mse_weight={mse_weight}, size_weight={size_weight}"
            )
        if not 0 <= soft_fraction <= 1:
            problems.append(f"soft_fraction must be in [0, 1], got {soft_fraction}")
        if problems:
            raise HawAdaError("\n".join(problems))
        # A shape that is illegal or has no gates fails here, before any training.
        plan = model.plan(shape, keep_ratio=keep_ratio)
        self.target = plan.shape
        wanted, dense = plan.shape.sizes(), plan.dense.sizes()
        self._ratios = {name: wanted[name] / dense[name] for name in dense}
        self.kd_temperature, self.kl_weight, self.mse_weight = kd_temperature, kl_weight, mse_weight
        self.size_weight, self.soft_fraction = size_weight, soft_fraction
        self._terms: dict[str, list[torch.Tensor]] = {}
        self.gated: Any = model  # `self.model`, typed for what PEFT passes on to the tuner
        # Trainer switches the cache off for good; the slim model's config is the base model's.
        self._use_cache: bool | None = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        applied = self.gated.applied_plan()
        if applied is not None and applied.shape != self.target:
            logger.warning("the applied plan has another shape than the target; it is opened: %s", applied)
            self.gated.apply_plan(None)
        self.can_return_loss = True  # the teacher takes the place of labels
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch: divide by their number
        self.add_callback(_Decide(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The distillation loss, and while the gates are soft the size penalty; arguments as in `Trainer`."""
        teacher = get_teacher_logits(self.accelerator.unwrap_model(model), inputs)
        student = get_student_logits(model, inputs)
        mask = position_mask(student, inputs)
        terms = {"kl": kl_divergence(student, teacher, temperature=self.kd_temperature, mask=mask)}
        loss = self.kl_weight * terms["kl"]
        if self.mse_weight:
            terms["mse"] = mean_squared_error(student, teacher, mask=mask)
            loss = loss + self.mse_weight * terms["mse"]
        if model.training and not self.decided:
            terms["size"] = self._size_penalty()
            loss = loss + self.size_weight * terms["size"]
        if model.training:
            for name, term in terms.items():
                self._terms.setdefault(name, []).append(term.detach())
        return (loss, {"logits": student}) if return_outputs else loss

    @property
    def decided(self) -> bool:
        """Whether the plan has been made and applied."""
        return any(self.gated.peft_config[name].plan is not None for name in self.gated.active_adapters)

    def decide(self) -> None:
        """Make the plan from the gates as they are, and apply it in training as well."""
        plan = self.gated.plan(self.target)
        self.gated.apply_plan(plan, in_training=True)
        logger.info("step %d: %s", self.state.global_step, plan)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the base model's `use_cache` is put back afterwards."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._use_cache is not None:
                self.gated.config.use_cache = self._use_cache

    def _size_penalty(self) -> torch.Tensor:
        """The sum over axes, against keep ratios that fall from 1 to the target's over the soft part of training."""
        steps = max(1, round(self.soft_fraction * self.state.max_steps))
        progress = min(1.0, (self.state.global_step + 1) / steps)
        penalties = [
            size_penalty([gate.value() for gate in gates], 1 - progress * (1 - ratio))
            for gates, ratio in self._axes()
            if ratio < 1
        ]
        return torch.stack(penalties).sum() if penalties else torch.zeros((), device=self.args.device)

    def _axes(self) -> list[tuple[list[SigmoidGate], float]]:
        """Per axis its gates and the keep ratio wanted."""
        heads: list[SigmoidGate] = []
        ffn: list[SigmoidGate] = []
        depth: list[SigmoidGate] = []
        for name, gate in collect_gates(self.gated).items():
            slot, adapter = name.split(".")[-2:]
            if adapter not in self.gated.active_adapters:
                continue
            if slot == UNITS:
                (heads if isinstance(gate, HeadGate) else ffn).append(gate)
            elif slot in (BLOCK, LAYER):
                depth.append(gate)
        return [
            (gates, self._ratios[name])
            for gates, name in (
                (heads, "num_attention_heads"),
                (ffn, "intermediate_size"),
                (depth, "num_hidden_layers"),
            )
            if gates
        ]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss, averaged since the last time, with it."""
        if "loss" in logs and self._terms:
            logs |= {name: torch.stack(terms).mean().item() for name, terms in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`, with a loss also for data without labels."""
        names = self.label_names
        self.label_names = names if all(inputs.get(name) is not None for name in names) else []
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.label_names = names

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A model with soft gates is none that can be exported: it does not compete."""
        return self.decided and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_plan(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_plan(resume_from_checkpoint)

    def _load_plan(self, checkpoint: str) -> None:
        """PEFT loads the weights of an adapter that exists already, but not its config, where the plan is."""
        config = PeftConfig.from_pretrained(checkpoint)
        plan = None if config.plan is None else Plan.from_dict(config.plan)
        self.gated.apply_plan(plan, in_training=config.plan_in_training)


class _Decide(TrainerCallback):
    """Lets the gates decide when the soft part of training is over, at the latest when training ends."""

    def __init__(self, trainer: HawAdaTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide at the step that opens the hard part."""
        if state.global_step >= self.trainer.soft_fraction * state.max_steps and not self.trainer.decided:
            self.trainer.decide()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide if the whole training was soft."""
        if not self.trainer.decided:
            self.trainer.decide()
