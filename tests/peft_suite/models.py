"""Tiny random models under the ids that PEFT's tests ask for, laid out like the Hugging Face hub cache.

With `HF_HOME` pointing here and `HF_HUB_OFFLINE=1`, every `from_pretrained` works unpatched and `_name_or_path` stays the id.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

VOCAB = 320
DECODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0,
    "max_position_embeddings": 130,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 16,
    "max_position_embeddings": 128,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
          "patch_size": 8, "num_labels": 3}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
DEBERTA = ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}

# hub id: (auto class, model type, config fields)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("CausalLM", "opt", OPT),
    "peft-internal-testing/opt-125m": ("CausalLM", "opt", OPT | {"num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("CausalLM", "gpt2", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("CausalLM", "gpt2", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("CausalLM", "gptj", GPT | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("CausalLM", "gpt_neox", DECODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("CausalLM", "bloom", {"n_head": 4, "n_layer": 2} | DECODER),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", DECODER),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", DECODER),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("CausalLM", "mistral", DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("CausalLM", "qwen2", DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("CausalLM", "gemma3_text", DECODER),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("Seq2SeqLM", "t5", T5),
    "peft-internal-testing/tiny-random-t5": ("Seq2SeqLM", "t5", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("Seq2SeqLM", "bart", BART),
    "peft-internal-testing/tiny-random-BertModel": ("PreTraining", "bert", ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("Model", "roberta", ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("Model", "deberta", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("Model", "deberta-v2", DEBERTA),
    "bert-base-uncased": ("SequenceClassification", "bert", ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("SequenceClassification", "bert", ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("SequenceClassification", "roberta", ENCODER),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("SequenceClassification", "llama", DECODER),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": ("ImageClassification", "resnet", RESNET),
    "hf-internal-testing/tiny-random-ViTForImageClassification": ("ImageClassification", "vit", VISION),
}  # fmt: skip
REVISIONS = {"peft-internal-testing/tiny-random-BertModel": ("v2.0.0",)}  # revisions besides main, with other weights


def build(auto: str, model_type: str, fields: dict[str, Any], seed: int) -> transformers.PreTrainedModel:
    """A seeded model whose linear layers have gain above 1, so that an adapter visibly changes the output."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **({"vocab_size": VOCAB} | fields))
    classes = {"Model": "AutoModel"}
    model = getattr(transformers, classes.get(auto, f"AutoModelFor{auto}")).from_config(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            torch.nn.init.normal_(module.weight, std=1.5 * fan_in**-0.5)
    return model


def ensure_models(hub: Path) -> None:
    """Writes what is missing under `hub`; a finished snapshot is never touched again."""
    for index, (model_id, (auto, model_type, fields)) in enumerate(MODELS.items()):
        for offset, revision in enumerate(("main", *REVISIONS.get(model_id, ()))):
            folder = hub / ("models--" + model_id.replace("/", "--"))
            reference = folder / "refs" / revision
            if reference.exists():
                continue
            commit = f"{offset:040d}"
            snapshot = folder / "snapshots" / commit
            logger.info("building %s@%s", model_id, revision)
            build(auto, model_type, fields, seed=index + 1000 * offset).save_pretrained(snapshot)
            if auto == "ImageClassification":
                transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(snapshot)
            else:
                save_tokenizer(snapshot)
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)


def save_tokenizer(folder: Path) -> None:
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["This is a test prompt."], vocab_size=VOCAB - 20, special_tokens=special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
