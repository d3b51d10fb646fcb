"""What is known of other runtimes: data that the passport quotes as rules, never as something it has run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyRules:
    """
    What was seen when other versions and runtimes read slim models of a family (docs/hub.md has the runs).

    Args:
        transformers (`str`): the oldest version tried that loads a slim model and computes the same.
        free_heads (`str`): the same where the head size is not `hidden_size / num_attention_heads`.
        also (`tuple[str, ...]`): older versions tried that do so as well, though one between does not.
        gguf (`bool`, *optional*): whether llama.cpp's converter takes the class, and llama.cpp loads what it wrote
            and computes the same; None if it was not tried.
        gguf_free_heads (`bool`, *optional*): the same where the head size is not `hidden_size / num_attention_heads`.
    """

    transformers: str
    free_heads: str
    also: tuple[str, ...] = ()
    gguf: bool | None = None
    gguf_free_heads: bool | None = None


VERSIONS_TRIED = ("4.57.6", "5.0.0", "5.3.0", "5.4.0", "5.8.1", "5.9.0", "5.10.0", "5.17.0", "5.18.0", "5.23.0")
"""The versions of transformers behind `FamilyRules`; those between were not run."""

FIRST_WITH_ROPE_PARAMETERS = "5.0.0"
"""The oldest version tried that reads `rope_parameters`; older ones compute something else, silently."""

RULES: dict[str, FamilyRules] = {
    "llama": FamilyRules("4.57.6", "4.57.6", gguf=True, gguf_free_heads=True),
    "mistral": FamilyRules("4.57.6", "4.57.6", gguf=True, gguf_free_heads=True),
    "qwen2": FamilyRules("4.57.6", "4.57.6", gguf=True, gguf_free_heads=False),
    "qwen3": FamilyRules("4.57.6", "4.57.6", gguf=True, gguf_free_heads=True),
    "granite": FamilyRules("4.57.6", "4.57.6", gguf=True, gguf_free_heads=False),
    "smollm3": FamilyRules("4.57.6", "4.57.6", gguf=True, gguf_free_heads=True),
    "vit": FamilyRules("4.57.6", "5.9.0", gguf=False, gguf_free_heads=False),
    "deit": FamilyRules("4.57.6", "5.9.0", gguf=False, gguf_free_heads=False),
    "dinov2": FamilyRules("4.57.6", "5.18.0", gguf=False, gguf_free_heads=False),
    **dict.fromkeys(
        (
            *("bert", "camembert", "cohere", "deberta-v2", "dinov3_vit", "distilbert", "electra", "exaone4", "gemma"),
            *("gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "hubert", "hunyuan_v1_dense"),
            *("mixtral", "modernbert", "mpnet", "nemotron", "opt", "phi", "phi3", "roberta", "stablelm", "starcoder2"),
            *("wav2vec2", "xlm-roberta"),
        ),
        FamilyRules("4.57.6", "4.57.6"),
    ),
    **dict.fromkeys(("audio-spectrogram-transformer", "beit", "ijepa", "vit_mae"), FamilyRules("4.57.6", "5.9.0")),
    **dict.fromkeys(("clip_text_model", "clip_vision_model"), FamilyRules("5.8.1", "5.8.1")),
    **dict.fromkeys(
        ("cohere2", "ernie4_5", "olmo2"), FamilyRules("5.8.1", "5.8.1", also=("4.57.6", "5.0.0", "5.3.0"))
    ),
    "dinov2_with_registers": FamilyRules("4.57.6", "5.18.0"),
    "eurobert": FamilyRules("5.8.1", "5.8.1", also=("5.3.0",)),
    "ministral3": FamilyRules("5.0.0", "5.0.0"),
    "olmo3": FamilyRules("5.17.0", "5.17.0"),
    "qwen3_moe": FamilyRules("5.3.0", "5.3.0"),
    "videomae": FamilyRules("5.18.0", "5.18.0", also=("4.57.6", "5.0.0", "5.3.0", "5.4.0")),
    "vit_msn": FamilyRules("5.0.0", "5.9.0"),
}
"""By `config.model_type`. A family that is not here has lines that say so."""

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16)
"""The sizes that are asked about."""

VLLM_VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of it before it is divided."""

GGUF_BLOCKS = {"Q4_0, Q8_0": 32, "K-quants (Q4_K, ...)": 256}
"""Quantised GGUF types store rows in blocks of this many weights."""

BNB_ROWS, BNB_COLUMNS = 64, 32
"""bitsandbytes stores 4 bit weights in blocks of 64; on a CPU it needs whole blocks per row, and 32 rows at a time."""

ALIGNMENTS = (8, 64, 128)
"""Multiples that matter to kernels: 8 for tensor cores in 16 bits, 64 and 128 for tiles."""
