"""How gates are made ready for a shape: ranked once, or trained, alone or with LoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from work import Batch, Bench, whole

from hawada_peft import HawAdaConfig, HawAdaTrainer, Shape, init_basis, init_gates


@dataclass(frozen=True)
class Recipe:
    """
    relaxation: of the gates' training; None for none, which is one-shot.
    aimed: start as `HawAdaTrainer` does (layers by dropping them, the rest by importance without them), and not from
        one gradient for everything.
    steps, gate_rate, soft_fraction: of that training.
    keep_better: of the trained gates and their start, as in `GateTrainingArguments`.
    lora_rank, lora_rate: of adapters that are trained with the gates; rank 0 for none.
    rotate: cut the hidden size too, along directions that the batches name.
    narrow_heads: cut the size of heads too, in bases that the batches name.
    """

    relaxation: str | None = None
    aimed: bool = True
    steps: int = 0
    gate_rate: float = 0.05
    soft_fraction: float = 0.75
    keep_better: str = "both"
    lora_rank: int = 0
    lora_rate: float = 2e-3
    rotate: bool = False
    narrow_heads: bool = False

    def model(self, base: PreTrainedModel, batches: Sequence[Batch]) -> PeftModel:
        """Fresh gates on a teacher of one's own, the bases found if there are to be some."""
        lora = LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear")
        kinds = ("heads", "ffn", "layers", *(["hidden"] if self.rotate else []))
        bases = {"rotate": self.rotate, "narrow_heads": self.narrow_heads}
        model = get_peft_model(base, HawAdaConfig(gates=kinds, **bases, lora=lora if self.lora_rank else None))
        if self.rotate or self.narrow_heads:
            init_basis(model, batches)
        return model


def gated(bench: Bench, recipe: Recipe, shape: Shape, batches: Sequence[Batch], seed: int) -> tuple[PeftModel, int]:
    """A gated teacher under the plan of a recipe at a shape, and the training steps that it took."""
    # As `find_plan` does: a basis only where the stream is cut. Soft gates in one turn the model and untie embeddings.
    recipe = replace(
        recipe, rotate=recipe.rotate and shape.hidden_size is not None, narrow_heads=shape.head_dim is not None
    )
    rank = recipe.lora_rank
    model = recipe.model(bench.load(), batches)
    init_gates(model, batches, shape=shape if recipe.aimed else None)
    if recipe.relaxation is None:
        model.apply_plan(model.plan(shape))
        return model, 0
    rate = recipe.lora_rate if rank else recipe.gate_rate
    with tempfile.TemporaryDirectory() as folder:
        HawAdaTrainer(
            model,
            bench.arguments(
                folder,
                recipe.steps,
                rate,
                seed,
                lr_scheduler_type="constant",
                warmup_steps=0,
                relaxation=recipe.relaxation,
                soft_fraction=recipe.soft_fraction,
                keep_better=recipe.keep_better,
                gate_learning_rate=recipe.gate_rate if rank else None,
            ),
            shape=shape,
            train_dataset=bench.pool(seed),
            data_collator=whole,
        ).train()
    return model, recipe.steps
