"""What `--tiny` slims: two small models, trained for seconds on data that installed packages carry. No network."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hawada_peft import Effort
from hawada_peft.latency import ToyClock

Rows = list[dict[str, Any]]
EFFORT = Effort.quick(clock=ToyClock(), cache=False)
"""A quick look at a few shapes, by a clock on which nothing depends on this machine. Real models get the defaults,
which take minutes."""

TRAINER: dict[str, Any] = {"effort": EFFORT}


def digits() -> tuple[Rows, Rows]:
    """Scikit-learn's 1,797 scans of handwritten digits as pictures of 8x8: to train on, and 397 held out."""
    from PIL import Image
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pictures = (scans.reshape(-1, 8, 8) * (255 / 16)).astype("uint8")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"image": Image.fromarray(pictures[index]), "label": int(labels[index])} for index in order]
    return rows[397:], rows[:397]


def texts() -> tuple[list[str], list[str]]:
    """The topics of the language reference that ships with Python: to train on, and every tenth held out."""
    found = [text for _, text in sorted(topics.items())]
    return [text for index, text in enumerate(found) if index % 10], found[::10]


def make_vit(folder: Path) -> str:
    """A ViT that sees a scan as 16 patches, trained, in a folder with its image processor."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_labels=10,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        initializer_range=0.1,  # the usual 0.02 takes several times the steps at this width
    )
    processor, rows = ViTImageProcessorPil(size={"height": 8, "width": 8}), digits()[0]
    pictures = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    examples = {"pixel_values": pictures, "labels": torch.tensor([row["label"] for row in rows])}
    model = train(ViTForImageClassification(config), examples, steps=150, batch_size=32, learning_rate=3e-3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def make_llama(folder: Path) -> str:
    """A Llama with 8 query heads in 4 KV groups, trained, in a folder with its byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end, size, alphabet = "<|endoftext|>", 512, pre_tokenizers.ByteLevel.alphabet()
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    words = texts()[0]
    pieces.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=end)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.tensor([token for ids in tokenizer(words)["input_ids"] for token in [*ids, 0]])
    windows = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    examples = {"input_ids": windows, "labels": windows}
    model = train(LlamaForCausalLM(config), examples, steps=200, batch_size=4, learning_rate=1e-2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(
    model: PreTrainedModel, examples: dict[str, torch.Tensor], *, steps: int, batch_size: int, learning_rate: float
) -> PreTrainedModel:
    """Train all weights for seconds: enough of a teacher for an example. The tensors are (examples, ...)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        picks = torch.randint(len(examples["labels"]), (batch_size,))
        model(**{name: tensor[picks] for name, tensor in examples.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()
