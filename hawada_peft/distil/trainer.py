"""The trainer of slim models: distillation from the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..errors import HawAdaError, IncompatibleBaseError
from ..vanilla.batches import Batch, check_batch, main_input, on_device, position_mask, rows_of, without_labels
from ..vanilla.heads import head_of, is_bare
from ..vanilla.mode import adapters_off, evaluating
from ..vanilla.outputs import get_student_logits
from .arguments import rate_problems
from .muon import optimizer_of, optimizer_problems
from .objective import Distillation
from .sharded import sharded_teacher
from .unlabelled import UnlabelledTrainer

Model = PreTrainedModel | PeftModel


class DistillTrainer(UnlabelledTrainer):
    """
    Trains a slim model, or LoRA on it, to give the logits of a dense one. Labels are not used.

    Whatever of the student requires gradients is trained. The teacher is moved to the device; it is neither wrapped,
    nor saved, nor changed. Under FSDP2 it stays where it is, and what teaches is a sharded copy.

    The loss is `kl_weight * KL + mse_weight * MSE`, averaged over all positions of a step, and
    `embedding_weight * (1 - cos)` of pooled embeddings, averaged over its examples: those of its accumulated batches
    and of all processes count the same. Evaluation reports the same loss, and its terms as `eval_kl`, `eval_mse` and
    `eval_embedding`. What the KL is of depends on the head: classes, independent labels
    (`problem_type="multi_label_classification"`); one output, regression and hidden states have none, and MSE is
    their loss (`head_of`).

    Args:
        model (`PreTrainedModel` or `PeftModel`): the student.
        args (`TrainingArguments`): as in `Trainer`. Checkpoints of a `PreTrainedModel` are vanilla model folders.
        teacher (`PreTrainedModel` or `PeftModel`): the dense model; of a PEFT model the base, its adapters disabled.
            Of any dtype, used in evaluation mode.
        kd_temperature (`float`): T of the KL divergence.
        kl_weight (`float`): weight of the divergence.
        mse_weight (`float`): weight of the squared difference of logits.
        embedding_weight (`float`): weight of the cosine distance of pooled embeddings, as in `recover`.
        pooling (`str`): how embeddings are pooled, as in `recover`.
        optimizer (`str`): `"args"` for the one that `args.optim` names; `"muon"` for Muon with AdamW (`MuonAdamW`);
            or `"auto"`, as in `recover`.
        kwargs: as in `Trainer`.

    Raises:
        HawAdaError: listing everything that is wrong with the arguments.
        IncompatibleBaseError: if student and teacher have different vocabularies or classes.
    """

    def __init__(
        self,
        model: Model,
        args: TrainingArguments | None = None,
        *,
        teacher: Model,
        kd_temperature: float = 1.0,
        kl_weight: float = 1.0,
        mse_weight: float = 0.0,
        embedding_weight: float = 0.0,
        pooling: str = "mean",
        optimizer: str = "args",
        **kwargs: Any,
    ) -> None:
        problems = [
            f"{name} must be a PreTrainedModel or a PeftModel, got a {type(given).__name__}"
            for name, given in (("model", model), ("teacher", teacher))
            if not isinstance(given, Model)
        ]
        if model is teacher:
            problems.append("model and teacher must be two models, got the same one; for gates use HawAdaTrainer")
        elif isinstance(model, nn.Module) and not any(parameter.requires_grad for parameter in model.parameters()):
            problems.append(
                "no parameter of the model requires gradients: there is nothing to train. An adapter that was loaded "
                "for inference is trained with PeftModel.from_pretrained(..., is_trainable=True)"
            )
        problems += rate_problems({} if args is None else vars(args)) + optimizer_problems(optimizer, args)
        if optimizer == "muon" and {"optimizers", "optimizer_cls_and_kwargs"} & set(kwargs):
            problems.append("give an optimizer of your own, or optimizer='muon', not both")
        try:
            self.objective: Distillation = Distillation(
                kd_temperature, kl_weight, mse_weight, embedding_weight, pooling
            )
        except HawAdaError as error:
            problems.append(str(error))
        if embedding_weight and isinstance(teacher, nn.Module) and not is_bare(teacher):
            problems.append(needs_states(teacher))
        if problems:
            raise HawAdaError("\n".join(problems))
        sizes = _outputs(model), _outputs(teacher)
        if sizes[0] != sizes[1]:
            raise IncompatibleBaseError(
                f"the student has {sizes[0]} outputs (tokens, classes, features), the teacher {sizes[1]}: "
                "distillation needs the same ones. Resize neither, or both."
            )
        self.teacher = teacher
        self.student: Any = model  # `self.model`, typed for what PEFT passes on to the base model
        self._sums: dict[str, torch.Tensor] = {}  # of terms, weighted, since the last log
        self._steps = 0  # since then
        self._eval_sums: dict[str, torch.Tensor] = {}
        self._per_position: bool | None = None
        self._rows: torch.Tensor | None = None  # of a step, in all processes
        super().__init__(model, args, **kwargs)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.optimizer_cls_and_kwargs = optimizer_of(optimizer, model, self.args)
        self.model_accepts_loss_kwargs = True  # the loss is scaled here, by `num_items_in_batch`
        if self.is_fsdp_enabled:
            self.teacher = sharded_teacher(self.accelerator, teacher)
        if self.place_model_on_device and getattr(teacher, "quantization_method", None) is None:
            self._move_model_to_device(teacher, self.args.device)

    def teacher_logits(self, inputs: Batch) -> torch.Tensor:
        """The dense model's logits: in evaluation mode, without gradients, under the autocast of the student."""
        teacher: Any = self.teacher
        use_cache = getattr(teacher.config, "use_cache", None)
        if use_cache is not None:
            teacher.config.use_cache = False  # nobody reads it
        try:
            with evaluating(teacher), torch.no_grad(), self.accelerator.autocast(), adapters_off(teacher):
                return get_student_logits(teacher, inputs)
        finally:
            if use_cache is not None:
                teacher.config.use_cache = use_cache

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The distillation loss; in training this batch's share of the step's. Arguments as in `Trainer`."""
        teacher = self.teacher_logits(inputs)
        student = get_student_logits(model, inputs)
        if student.shape != teacher.shape:
            raise IncompatibleBaseError(
                f"the student gives logits of {tuple(student.shape)}, the teacher of {tuple(teacher.shape)}"
            )
        mask = position_mask(inputs, student.shape[:-1])
        terms = self.objective.terms(student, teacher, mask, head=head_of(self.teacher, teacher))
        if model.training and num_items_in_batch is not None:
            # Gradients are averaged over processes, so that each counts its share times their number.
            terms = {name: term * self._share(name, inputs, num_items_in_batch) for name, term in terms.items()}
            _add(self._sums, terms, 1.0)
        loss = self.objective.loss(terms)
        if not model.training:
            _add(self._eval_sums, terms | {"rows": torch.ones_like(loss)}, len(student))
        return (loss, {"logits": student}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As in `Trainer`; the count is that of positions that the loss is averaged over, in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._steps += 1
        if self._per_position is None:
            check_batch(self.teacher, batches[0])
            total = len(main_input(self.teacher, batches[0]))
            row = on_device(rows_of(without_labels(batches[0]), slice(1), total), self.args.device)
            given, outputs = main_input(self.teacher, row), self.teacher_logits(row)
            self._per_position = outputs.ndim > 2 and (given.ndim > 3 or outputs.shape[1] == given.shape[1])
            if self.objective.embedding_weight and not self._per_position:
                raise HawAdaError(needs_states(self.teacher))
        rows = float(sum(len(main_input(self.teacher, batch)) for batch in batches))
        own = torch.stack([self._items(batch).to(device) for batch in batches]).sum()
        counts = self.accelerator.reduce(torch.stack([own, own.new_tensor(rows)]), reduction="sum").clamp(min=1)
        self._rows = counts[1]
        return batches, counts[0]

    def _share(self, term: str, batch: Batch, items: torch.Tensor | int) -> torch.Tensor | float:
        """The part of a step's mean that a batch is, times the processes: of examples, or of positions."""
        own = float(len(main_input(self.teacher, batch))) if term == "embedding" else self._items(batch)
        whole = self._rows if term == "embedding" and self._rows is not None else items
        return own / whole * self.accelerator.num_processes

    def _items(self, batch: Batch) -> torch.Tensor:
        """What the mean over a batch is a mean over, up to a factor that is the same for all batches."""
        main = main_input(self.teacher, batch)
        if self._per_position:
            mask = position_mask(batch, main.shape[:2])
            positions = main.numel() if main.ndim > 3 else main.shape[:2].numel()
            return torch.tensor(float(positions)) if mask is None else mask.sum().float()
        return torch.tensor(float(len(main)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss, averaged since the last time, with it."""
        if "loss" in logs and self._sums:
            means = self._reduced(self._sums, "mean")
            logs |= {name: value.item() / self._steps for name, value in means.items()}
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in `Trainer`, with the terms of the loss."""
        self._eval_sums = {}
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self._reduced(self._eval_sums, "sum")
        if sums:
            rows = sums.pop("rows")
            metrics: dict[str, float] = output.metrics
            metrics.update({f"{metric_key_prefix}_{name}": (sums[name] / rows).item() for name in sums})
        return output

    def _reduced(self, sums: dict[str, torch.Tensor], reduction: str) -> dict[str, torch.Tensor]:
        return {name: self.accelerator.reduce(value, reduction=reduction) for name, value in sums.items()}


def _add(sums: dict[str, torch.Tensor], terms: dict[str, torch.Tensor], weight: torch.Tensor | float) -> None:
    for name, term in terms.items():
        added = term.detach() * weight
        sums[name] = sums[name] + added if name in sums else added


def needs_states(model: nn.Module) -> str:
    """What is wrong with pooling embeddings of a model that gives something else."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        f"embedding_weight pools the last hidden states of tokens, and {type(base).__name__} gives something else: "
        "load the model without a head (AutoModel), or leave embedding_weight at 0"
    )


def _outputs(model: Model) -> int | None:
    """Size of the vocabulary, number of classes, or of hidden states; None of dual encoders, as no config says it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_bare(base):
        return getattr(base.config, "hidden_size", None)
    head = base.get_output_embeddings()
    return base.config.num_labels if head is None else len(head.weight)
