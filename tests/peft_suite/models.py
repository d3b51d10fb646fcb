"""Tiny random models under the ids that PEFT's tests ask for, laid out like the Hugging Face hub cache.

With `HF_HOME` pointing here and `HF_HUB_OFFLINE=1`, every `from_pretrained` works unpatched and `_name_or_path` stays
the id that was asked for.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers.pytorch_utils import Conv1D

VOCAB = 320
UNTIED = {"tie_word_embeddings": False}  # these would repeat one token whatever an adapter does; others stay tied
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER |= {"max_position_embeddings": 130, "pad_token_id": 0}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 16}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 3}
VIT |= {"image_size": 16, "patch_size": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}

# hub id: (what follows AutoModelFor, model type, config fields)
OPT_ID, T5_ID = "peft-internal-testing/tiny-random-OPTForCausalLM", "peft-internal-testing/tiny-random-t5"
BERT_ID = "hf-internal-testing/tiny-random-BertModel"
BLOOM = DECODER | UNTIED | {"num_hidden_layers": 5}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    OPT_ID: ("CausalLM", "opt", OPT | UNTIED),
    "peft-internal-testing/opt-125m": ("CausalLM", "opt", OPT | {"num_hidden_layers": 12}),
    "gpt2": ("CausalLM", "gpt2", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("CausalLM", "gpt2", GPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("CausalLM", "gpt2", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("CausalLM", "gptj", GPT | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("CausalLM", "gpt_neox", DECODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("CausalLM", "bloom", BLOOM),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("CausalLM", "llama", DECODER),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("CausalLM", "mistral", DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("CausalLM", "qwen2", DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("CausalLM", "gemma3_text", DECODER | UNTIED),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("Seq2SeqLM", "t5", T5),
    T5_ID: ("Seq2SeqLM", "t5", T5),
    "google/flan-t5-small": ("Seq2SeqLM", "t5", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("Seq2SeqLM", "bart", BART | UNTIED),
    BERT_ID: ("PreTraining", "bert", ENCODER),
    "peft-internal-testing/tiny-random-BertModel": ("PreTraining", "bert", ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("", "roberta", ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("", "deberta", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("", "deberta-v2", DEBERTA),
    "peft-internal-testing/tiny-clip-text-2": ("", "clip_text_model", ENCODER),
    "bert-base-uncased": ("SequenceClassification", "bert", ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("SequenceClassification", "bert", ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "SequenceClassification", "roberta", ENCODER
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("SequenceClassification", "llama", DECODER),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": ("ImageClassification", "resnet", RESNET),
    "hf-internal-testing/tiny-random-ViTForImageClassification": ("ImageClassification", "vit", VIT),
}  # fmt: skip
REVISIONS = {"peft-internal-testing/tiny-random-BertModel": ["v2.0.0"]}  # besides main, with other weights

# what follows peft-internal-testing/ in an adapter's id: its base, what follows AutoModel, its task, its revision
ADAPTERS: dict[str, tuple[str, str, str, str]] = {
    "gpt2-lora-random": ("gpt2", "ForCausalLM", "CAUSAL_LM", "main"),
    "tiny-OPTForCausalLM-lora": (OPT_ID, "ForCausalLM", "CAUSAL_LM", "main"),
    "tiny-opt-lora-revision": (OPT_ID, "ForCausalLM", "CAUSAL_LM", "test"),
    "tiny-random-BertModel-lora": (BERT_ID, "ForCausalLM", "CAUSAL_LM", "v1.2.3"),
    "tiny_OPTForSequenceClassification-lora": (OPT_ID, "ForSequenceClassification", "SEQ_CLS", "main"),
    "tiny_OPTForQuestionAnswering-lora": (OPT_ID, "ForQuestionAnswering", "QUESTION_ANS", "main"),
    "tiny_OPTForFeatureExtraction-lora": (OPT_ID, "", "FEATURE_EXTRACTION", "main"),
    "tiny_GPT2ForTokenClassification-lora": ("gpt2", "ForTokenClassification", "TOKEN_CLS", "main"),
    "tiny_T5ForSeq2SeqLM-lora": (T5_ID, "ForSeq2SeqLM", "SEQ_2_SEQ_LM", "main"),
}


def build(auto: str, model_type: str, fields: dict[str, Any], seed: int) -> transformers.PreTrainedModel:
    """A seeded model whose linear layers have a gain above 1, so that an adapter visibly changes the output."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **({"vocab_size": VOCAB} | fields))
    model = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel").from_config(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            fan_in = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            torch.nn.init.normal_(module.weight, std=1.5 * fan_in**-0.5)
    return model


def save_tokenizer(folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a test"], vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def snapshot_folder(hub: Path, repository: str, revision: str, commit: str) -> Path:
    """Where the hub cache keeps that revision of a repository."""
    folder = hub / ("models--" + repository.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def ensure_models(hub: Path) -> None:
    """Makes the models that `hub` does not have yet."""
    for model_id, (auto, model_type, fields) in MODELS.items():
        for number, revision in enumerate(["main", *REVISIONS.get(model_id, [])]):
            snapshot = snapshot_folder(hub, model_id, revision, f"{number:040d}")
            if (snapshot / "done").exists():
                continue
            build(auto, model_type, fields, seed=zlib.crc32(model_id.encode()) + number).save_pretrained(snapshot)
            if auto == "ImageClassification":
                transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(snapshot)
            else:
                save_tokenizer(snapshot)
            (snapshot / "done").touch()


def save_adapters(hub: Path, config_cls: type[peft.PeftConfig]) -> None:
    """Adapters of the tuner under test, in place of the LoRA adapters that PEFT's tests load from the hub."""
    for name, (base_id, auto, task, revision) in ADAPTERS.items():
        base = getattr(transformers, f"AutoModel{auto}").from_pretrained(base_id)
        config = config_cls(target_modules=["q_proj", "c_attn", "q", "query"], task_type=task, init_weights=False)
        snapshot = snapshot_folder(hub, f"peft-internal-testing/{name}", revision, "adapter")
        peft.get_peft_model(base, config).save_pretrained(snapshot)
