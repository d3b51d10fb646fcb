"""
Slim a causal language model until it is so many times as fast on this machine.

    python examples/slim_llama.py --model meta-llama/Llama-3.2-1B --dataset Salesforce/wikitext \
        --dataset-config wikitext-103-raw-v1 --output out --speedup 1.5 --batch-size 8 --seq-len 1024 --dtype bfloat16
    python examples/slim_llama.py --tiny --output out

Any model of a known family will do (Llama, Mistral, Qwen2, Qwen3, ...), and any text: it needs no labels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import tiny
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

from hawada_peft import DistillTrainer, HawAdaConfig, HawAdaTrainer, QualityChange
from hawada_peft.latency import measure_many
from hawada_peft.shipping import push_to_hub


@dataclass
class Arguments(common.Arguments):
    text_column: str = field(default="text", metadata={"help": "the column of texts"})
    seq_len: int = field(default=512, metadata={"help": "tokens of an example, and of a call that is to be fast"})


TINY = {
    "seq_len": 64,
    "batch_size": 8,
    "train_batch_size": 8,
    "steps": 20,
    "learning_rate": 0.1,
    "recover_steps": 30,
    "recover_learning_rate": 2e-3,
}


@torch.inference_mode()
def perplexity(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """The exponential of the mean cross entropy; all windows have the same length."""
    model.eval()
    rows = [batch["input_ids"].to(model.device) for batch in batches]
    losses = [model(input_ids=tokens, labels=tokens).loss.expand(len(tokens)) for tokens in rows]
    return torch.cat(losses).double().mean().exp().item()


def main() -> None:
    args = common.parse(Arguments, __doc__, TINY)
    folder = Path(args.output)
    set_seed(0)
    if args.tiny:
        torch.set_num_threads(1)  # at these sizes more threads mostly wait for each other
        args.model = args.model or tiny.make_llama(folder / "teacher")

    # Data: all texts in a row, cut into windows of the same length.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)

    def windows(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [token for ids in tokenizer(rows[args.text_column])["input_ids"] for token in [*ids, *end]]
        starts = range(0, len(tokens) - args.seq_len + 1, args.seq_len)
        return {"input_ids": [tokens[start : start + args.seq_len] for start in starts]}

    if args.dataset is None:
        train, held_out = (
            [{"input_ids": ids} for ids in windows({"text": some})["input_ids"]] for some in tiny.texts()
        )
    else:
        column = args.text_column
        train, held_out = common.load_rows(
            args, lambda data: data.select_columns([column]).map(windows, batched=True, remove_columns=[column])
        )
    data = {"train_dataset": train, "data_collator": default_data_collator}
    held_out = common.batches_of(held_out, args.held_out, args.train_batch_size, default_data_collator)
    calibration = common.batches_of(train, args.calibration, args.train_batch_size, default_data_collator)

    # Gates: a search finds the shape for the budget, then the gates learn which heads and channels stay.
    budget = common.budget_of(args, args.seq_len)
    model = get_peft_model(base, HawAdaConfig())
    trainer = HawAdaTrainer(
        model,
        common.training_arguments(args, "gates", args.steps, args.learning_rate),
        budget=budget,
        **(tiny.TRAINER if args.tiny else {}),
        **data,
    )
    trainer.train()
    model.save_pretrained(folder / "adapter")
    plan = model.applied_plan()
    print(plan)

    # Merge: what the plan closes is removed, what stays is refitted by least squares.
    slimmed = dataclasses.replace(model.slim(calibration=calibration), search=trainer.search)
    dense, slim = slimmed.dense, slimmed.model
    print(slimmed.reconstruction)

    # Recovery: the dense model teaches the slim one.
    if args.recover_steps:
        arguments = common.training_arguments(args, "recovery", args.recover_steps, args.recover_learning_rate)
        DistillTrainer(slim, arguments, teacher=dense, **data).train()

    # What came of it, in the dtype and the regime that were asked for.
    dtype = getattr(torch, args.dtype)
    dense, slim = dense.to(dtype).eval(), slim.to(dtype).eval()
    what = f"{sum(len(batch['input_ids']) for batch in held_out)} held-out windows of {args.seq_len} tokens"
    quality = QualityChange("perplexity", perplexity(dense, held_out), perplexity(slim, held_out), what)
    regime = budget.regime(generates=dense.can_generate(), dtype=dtype, device=args.device)
    timings = measure_many({"dense": dense, "slim": slim}, regime, effort=tiny.EFFORT if args.tiny else None)
    slimmed.save(
        folder / "slim",
        processor=tokenizer,
        base=args.model,
        latency=timings,
        quality=[quality],
        repo_id=args.push_to_hub,
    )
    ms = {name: timing.median_ms for name, timing in timings.items()}
    print(f"dense: {dense.num_parameters():,} parameters, {ms['dense']:.2f} ms, perplexity {quality.dense:.1f}")
    print(f"slim:  {slim.num_parameters():,} parameters, {ms['slim']:.2f} ms, perplexity {quality.slim:.1f}")
    print(f"speedup: {ms['dense'] / ms['slim']:.2f}x, asked for {args.speedup}x ({regime})")
    if args.push_to_hub:
        print(push_to_hub(folder / "slim", args.push_to_hub))


if __name__ == "__main__":
    main()
