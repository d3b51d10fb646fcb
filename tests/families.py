"""Tiny models of the families that the table of `conftest` does not hold: their classes, sizes and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import LM, PLAIN_LM, SIZES, TOKENS, VISION, Row

from hawada_peft import Shape

Inputs = dict[str, torch.Tensor]

HEADS, BOUND, WITHOUT_GROUPS = Shape(4, 2, 40, 2), Shape(8, 8, 40, 2), Shape(4, 4, 40, 2)
BOUND_GROUPED = Shape(8, 4, 40, 2)
GPT = {"vocab_size": 128, "n_embd": 64, "n_head": 8, "n_layer": 4, "n_positions": 64, "n_inner": 96}
CLIP_TOKENS = TOKENS | {"eos_token_id": 127}
SOUND = SIZES | {"patch_size": 4, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}
DECODER = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48}
MASKED = VISION | DECODER | {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1}

DISTIL = {"vocab_size": 128, "max_position_embeddings": 64, "dim": 64, "n_heads": 8, "hidden_dim": 96, "n_layers": 4}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
CONV = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
WAVES = CONV | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32}


def _lm(family: str, slim: Shape = HEADS, fields: dict[str, Any] = LM, **more: Any) -> Row:
    return Row(f"{family}ForCausalLM", f"{family}Config", fields | more, slim)


def _image(family: str, slim: Shape = WITHOUT_GROUPS, head: str = "ForImageClassification", **more: Any) -> Row:
    return Row(f"{family}{head}", f"{family}Config", VISION | more, slim)


FURTHER: dict[str, Row] = {
    "cohere": _lm("Cohere", fields=PLAIN_LM),
    "cohere2": _lm("Cohere2", sliding_window=6),
    "ernie4_5": _lm("Ernie4_5"),
    "eurobert": Row("EuroBertForSequenceClassification", "EuroBertConfig", LM | {"num_labels": 3}, HEADS),
    "exaone4": _lm("Exaone4", fields=PLAIN_LM, sliding_window=6),
    "gemma": _lm("Gemma"),
    "gemma3_text": Row(
        "Gemma3ForCausalLM", "Gemma3TextConfig", LM | {"sliding_window": 6, "query_pre_attn_scalar": 8}, HEADS
    ),
    "glm": _lm("Glm"),
    "glm4": _lm("Glm4"),
    "hunyuan_v1_dense": _lm("HunYuanDenseV1"),
    "ministral3": _lm("Ministral3"),
    "nemotron": _lm("Nemotron", fields=PLAIN_LM),
    "phi": _lm("Phi", fields=PLAIN_LM),
    "phi3": _lm("Phi3", fields=PLAIN_LM),
    "stablelm": _lm("StableLm", BOUND_GROUPED, PLAIN_LM),
    "starcoder2": _lm("Starcoder2", fields=PLAIN_LM),
    "gpt2": Row("GPT2LMHeadModel", "GPT2Config", GPT, BOUND),
    "gpt_neox": _lm("GPTNeoX", BOUND, TOKENS | SIZES),
    "opt": _lm("OPT", BOUND, TOKENS | SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "modernbert": Row(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TOKENS | SIZES | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
        Shape(8, 8, 40, 4),
    ),
    "clip_text_model": Row("CLIPTextModel", "CLIPTextConfig", CLIP_TOKENS | SIZES, BOUND),
    "clip_vision_model": Row("CLIPVisionModel", "CLIPVisionConfig", VISION, BOUND),
    "beit": _image("Beit", use_relative_position_bias=True, use_absolute_position_embeddings=False),
    "dinov2_with_registers": _image("Dinov2WithRegisters", Shape(4, 4, 64, 2), mlp_ratio=2),
    "dinov3_vit": _image("DINOv3ViT", BOUND, "Model"),
    "ijepa": _image("IJepa"),
    "vit_mae": Row("ViTMAEModel", "ViTMAEConfig", MASKED, WITHOUT_GROUPS),
    "vit_msn": _image("ViTMSN"),
    "videomae": Row(
        "VideoMAEForVideoClassification", "VideoMAEConfig", VISION | {"num_frames": 4, "tubelet_size": 2}, BOUND
    ),
    "olmo3": _lm("Olmo3", fields=PLAIN_LM, sliding_window=6),
    "roberta": Row("RobertaForSequenceClassification", "RobertaConfig", TOKENS | SIZES | {"num_labels": 3}, BOUND),
    "distilbert": Row("DistilBertModel", "DistilBertConfig", DISTIL, BOUND),
    "deberta-v2": Row("DebertaV2ForTokenClassification", "DebertaV2Config", TOKENS | SIZES | DISENTANGLED, BOUND),
    "mpnet": Row("MPNetForMaskedLM", "MPNetConfig", TOKENS | SIZES, BOUND),
    "wav2vec2": Row("Wav2Vec2ForCTC", "Wav2Vec2Config", SIZES | WAVES, BOUND),
    "audio-spectrogram-transformer": Row("ASTForAudioClassification", "ASTConfig", SOUND, WITHOUT_GROUPS),
}
"""By `model_type`, each with sizes that are legal for it."""


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


INPUTS: dict[str, Callable[[], Inputs]] = {
    "vit_mae": lambda: {"pixel_values": _noise(3, 16, 16), "noise": torch.arange(4.0).expand(2, 4)},
    "wav2vec2": lambda: {"input_values": _noise(800)},
    "videomae": lambda: {"pixel_values": _noise(4, 3, 16, 16)},
    "audio-spectrogram-transformer": lambda: {"input_values": _noise(24, 16)},
}
"""Of the models that take more than pixels or tokens alone."""

SMALL = Shape(4, 2, 12, 2, num_experts=5)
CHOSEN = {"num_experts_per_tok": 2}
NARROW = {"moe_intermediate_size": 24, "num_experts": 8, "norm_topk_prob": True}
LOCAL = {"intermediate_size": 24, "num_local_experts": 8}
MIXTURES = {
    "qwen3_moe": Row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", LM | CHOSEN | NARROW, SMALL),
    "mixtral": Row("MixtralForCausalLM", "MixtralConfig", LM | CHOSEN | LOCAL, SMALL),
    "gpt_oss": Row("GptOssForCausalLM", "GptOssConfig", LM | CHOSEN | LOCAL | {"sliding_window": 6}, SMALL),
}
"""Of experts."""
