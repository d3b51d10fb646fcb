"""
Tiny random models of the types that discovery is tried on: class, config and numbers, nothing else.

Long because it is a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """A class of transformers, and the fields of a tiny config for it."""

    model: str
    config: str
    fields: dict[str, Any]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(transformers, self.model)
        return found

    def make_config(self, **fields: Any) -> PreTrainedConfig:
        config: PreTrainedConfig = getattr(transformers, self.config)(**(self.fields | fields))
        config.architectures = [self.model]
        return config


ZOO: dict[str, Kind] = {}


def add(name: str, model: str, config: str, **fields: Any) -> None:
    ZOO[name] = Kind(model, config, fields)


IMG = 120
TOK = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
S = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "intermediate_size": 96}
LM = TOK | S | {"num_key_value_heads": 4, "head_dim": 8}
LMNH = TOK | S | {"num_key_value_heads": 4}
BERT = TOK | S | {"type_vocab_size": 2}
VIS = S | {"image_size": 16, "patch_size": 4, "num_labels": 3}
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

# ---- decoders
add("llama", "LlamaForCausalLM", "LlamaConfig", **LM)
add("mistral", "MistralForCausalLM", "MistralConfig", **LM, sliding_window=6)
add("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **LM, use_sliding_window=True, sliding_window=6, max_window_layers=2)
add("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **LM)
add("gemma", "GemmaForCausalLM", "GemmaConfig", **LM)
add("gemma2", "Gemma2ForCausalLM", "Gemma2Config", **LM, sliding_window=6, query_pre_attn_scalar=8)
add("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", **LM, sliding_window=6, query_pre_attn_scalar=8)
add(
    "gemma4_text",
    "Gemma4ForCausalLM",
    "Gemma4TextConfig",
    **LM,
    sliding_window=6,
    global_head_dim=8,
    num_global_key_value_heads=4,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=128,
    num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
add("phi3", "Phi3ForCausalLM", "Phi3Config", **LMNH)
add("phi", "PhiForCausalLM", "PhiConfig", **LMNH)
add("olmo2", "Olmo2ForCausalLM", "Olmo2Config", **LMNH)
add("olmo3", "Olmo3ForCausalLM", "Olmo3Config", **LMNH, sliding_window=6)
add("glm4", "Glm4ForCausalLM", "Glm4Config", **LM)
add("glm", "GlmForCausalLM", "GlmConfig", **LM)
add("cohere", "CohereForCausalLM", "CohereConfig", **LMNH)
add("cohere2", "Cohere2ForCausalLM", "Cohere2Config", **LMNH, sliding_window=6)
add("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", **LM, no_rope_layers=[1, 0, 1, 1])
add("granite", "GraniteForCausalLM", "GraniteConfig", **LM)
add("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", **LMNH)
add("stablelm", "StableLmForCausalLM", "StableLmConfig", **LMNH)
add("exaone4", "Exaone4ForCausalLM", "Exaone4Config", **LMNH, sliding_window=6)
add("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5Config", **LMNH)
add("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", **LM)
add("ministral3", "Ministral3ForCausalLM", "Ministral3Config", **LM)
add("nemotron", "NemotronForCausalLM", "NemotronConfig", **LMNH)
add(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=128,
    n_embd=64,
    n_head=8,
    n_layer=4,
    n_positions=64,
    n_inner=96,
    bos_token_id=1,
    eos_token_id=2,
)
add(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    **TOK,
    hidden_size=64,
    num_attention_heads=8,
    num_hidden_layers=4,
    ffn_dim=96,
    word_embed_proj_dim=64,
)
add("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **TOK, **S)
add("bloom", "BloomForCausalLM", "BloomConfig", vocab_size=128, hidden_size=64, n_head=8, n_layer=4)
add(
    "falcon",
    "FalconForCausalLM",
    "FalconConfig",
    vocab_size=128,
    hidden_size=64,
    num_attention_heads=8,
    num_kv_heads=4,
    num_hidden_layers=4,
    new_decoder_architecture=True,
    ffn_hidden_size=96,
    bos_token_id=1,
    eos_token_id=2,
)
add("mixtral", "MixtralForCausalLM", "MixtralConfig", **LM, num_local_experts=8, num_experts_per_tok=2)
add(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    **LM,
    **MOE,
    num_experts=8,
    mlp_only_layers=[1],
    norm_topk_prob=True,
)
add("gpt_oss", "GptOssForCausalLM", "GptOssConfig", **LM, num_local_experts=8, num_experts_per_tok=2, sliding_window=6)
add(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    **LMNH | {"num_key_value_heads": 8},
    **MOE,
    n_routed_experts=8,
    n_group=1,
    topk_group=1,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=4,
    v_head_dim=8,
    qk_nope_head_dim=8,
    first_k_dense_replace=1,
)
add(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    "Glm4MoeConfig",
    **LM,
    **MOE,
    n_routed_experts=8,
    n_shared_experts=1,
    first_k_dense_replace=1,
)
add(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    "Qwen3NextConfig",
    **LM,
    **MOE,
    num_experts=8,
    shared_expert_intermediate_size=32,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    layer_types=["linear_attention", "full_attention"] * 2,
)
add(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    "Qwen3_5TextConfig",
    **LM,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    layer_types=["linear_attention", "full_attention"] * 2,
)
add(
    "lfm2",
    "Lfm2ForCausalLM",
    "Lfm2Config",
    **LMNH,
    block_auto_adjust_ff_dim=False,
    layer_types=["conv", "full_attention"] * 2,
)
add(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeHybridConfig",
    **LMNH,
    num_local_experts=8,
    num_experts_per_tok=2,
    shared_intermediate_size=32,
    layer_types=["attention"] * 4,
)
add(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=4,
    num_heads=16,
    head_dim=8,
    expand=2,
    state_size=8,
    n_groups=2,
    chunk_size=8,
)
# ---- encoders
add("bert", "BertForSequenceClassification", "BertConfig", **BERT, num_labels=3)
add("roberta", "RobertaForSequenceClassification", "RobertaConfig", **BERT, num_labels=3)
add("xlm-roberta", "XLMRobertaForSequenceClassification", "XLMRobertaConfig", **BERT, num_labels=3)
add(
    "distilbert",
    "DistilBertForSequenceClassification",
    "DistilBertConfig",
    vocab_size=128,
    dim=64,
    n_heads=8,
    n_layers=4,
    hidden_dim=96,
    max_position_embeddings=64,
    num_labels=3,
)
add(
    "modernbert",
    "ModernBertForSequenceClassification",
    "ModernBertConfig",
    **TOK | {"cls_token_id": 1, "sep_token_id": 2},
    **S,
    local_attention=8,
    num_labels=3,
)
add("electra", "ElectraForSequenceClassification", "ElectraConfig", **BERT, embedding_size=32, num_labels=3)
add(
    "deberta-v2",
    "DebertaV2ForSequenceClassification",
    "DebertaV2Config",
    **BERT,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    num_labels=3,
)
add("mpnet", "MPNetForSequenceClassification", "MPNetConfig", **TOK, **S, num_labels=3)
add("albert", "AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=32, num_labels=3)
add("nomic_bert", "NomicBertModel", "NomicBertConfig", **BERT)
add("eurobert", "EuroBertForSequenceClassification", "EuroBertConfig", **LM, num_labels=3)
add(
    "layoutlmv3",
    "LayoutLMv3ForSequenceClassification",
    "LayoutLMv3Config",
    **BERT,
    coordinate_size=10,
    shape_size=12,
    max_2d_position_embeddings=128,
    visual_embed=False,
    num_labels=3,
)
# ---- vision
add("vit", "ViTForImageClassification", "ViTConfig", **VIS)
add("deit", "DeiTForImageClassification", "DeiTConfig", **VIS)
add("dinov2", "Dinov2ForImageClassification", "Dinov2Config", **VIS, mlp_ratio=2)
add(
    "dinov2_with_registers",
    "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersConfig",
    **VIS,
    mlp_ratio=2,
)
add("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **VIS)
add("siglip_vision_model", "SiglipVisionModel", "SiglipVisionConfig", **VIS)
add("clip_vision_model", "CLIPVisionModel", "CLIPVisionConfig", **VIS)
add("clip_text_model", "CLIPTextModel", "CLIPTextConfig", **TOK | {"eos_token_id": 127}, **S)
add(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    projection_dim=32,
    text_config=TOK | S | {"eos_token_id": 127},
    vision_config=VIS,
)
add("siglip", "SiglipModel", "SiglipConfig", text_config=TOK | S | {"max_position_embeddings": 16}, vision_config=VIS)
add(
    "beit",
    "BeitForImageClassification",
    "BeitConfig",
    **VIS,
    use_relative_position_bias=True,
    use_absolute_position_embeddings=False,
)
add(
    "vit_mae",
    "ViTMAEModel",
    "ViTMAEConfig",
    **VIS,
    mask_ratio=0.0,
    decoder_hidden_size=32,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=48,
    decoder_num_hidden_layers=1,
)
add("vit_msn", "ViTMSNForImageClassification", "ViTMSNConfig", **VIS)
add("ijepa", "IJepaForImageClassification", "IJepaConfig", **VIS)
add("yolos", "YolosForObjectDetection", "YolosConfig", **VIS | {"image_size": [16, 16]}, num_detection_tokens=5)
add(
    "dpt",
    "DPTForDepthEstimation",
    "DPTConfig",
    **VIS | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 6},
    backbone_out_indices=[1, 3, 4, 5],
    neck_hidden_sizes=[8, 8, 16, 16],
    fusion_hidden_size=8,
    head_hidden_size=8,
    is_hybrid=False,
)
add(
    "depth_anything",
    "DepthAnythingForDepthEstimation",
    "DepthAnythingConfig",
    backbone_config=dict(
        model_type="dinov2",
        **S | {"image_size": 28, "patch_size": 7, "num_hidden_layers": 6},
        mlp_ratio=2,
        out_indices=[1, 3, 5, 6],
        reshape_hidden_states=False,
    ),
    patch_size=7,
    reassemble_hidden_size=64,
    neck_hidden_sizes=[8, 8, 16, 16],
    fusion_hidden_size=8,
    head_hidden_size=8,
)
add(
    "swin",
    "SwinForImageClassification",
    "SwinConfig",
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[4, 8],
    window_size=4,
    num_labels=3,
)
add(
    "swinv2",
    "Swinv2ForImageClassification",
    "Swinv2Config",
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[4, 8],
    window_size=4,
    num_labels=3,
)
add(
    "hiera",
    "HieraForImageClassification",
    "HieraConfig",
    image_size=[32, 32],
    patch_size=[7, 7],
    patch_stride=[4, 4],
    patch_padding=[3, 3],
    embed_dim=16,
    depths=[1, 2],
    num_heads=[2, 4],
    num_query_pool=1,
    query_stride=[2, 2],
    masked_unit_size=[4, 4],
    masked_unit_attention=[True, False],
    num_labels=3,
)
add(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    num_encoder_blocks=2,
    depths=[2, 2],
    hidden_sizes=[16, 32],
    num_attention_heads=[2, 4],
    sr_ratios=[2, 1],
    patch_sizes=[3, 3],
    strides=[2, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=16,
    num_labels=3,
    image_size=32,
)
add(
    "mask2former",
    "Mask2FormerForUniversalSegmentation",
    "Mask2FormerConfig",
    backbone_config={
        "model_type": "swin",
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    hidden_dim=32,
    feature_size=32,
    mask_feature_size=32,
    encoder_feedforward_dim=48,
    dim_feedforward=48,
    num_attention_heads=4,
    decoder_layers=3,
    encoder_layers=2,
    num_queries=5,
    num_labels=3,
)
add(
    "convnext",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    hidden_sizes=[8, 16],
    depths=[2, 2],
    num_stages=2,
    num_labels=3,
    image_size=32,
)
add(
    "sam_vision_model",
    "SamVisionModel",
    "SamVisionConfig",
    **S | {"num_attention_heads": 8},
    image_size=32,
    patch_size=4,
    output_channels=16,
    window_size=4,
    global_attn_indexes=[1, 3],
    mlp_dim=96,
)
add("videomae", "VideoMAEForVideoClassification", "VideoMAEConfig", **VIS, num_frames=4, tubelet_size=2)
# ---- speech
add(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    vocab_size=128,
    num_mel_bins=8,
    d_model=64,
    encoder_layers=4,
    decoder_layers=4,
    encoder_attention_heads=8,
    decoder_attention_heads=8,
    encoder_ffn_dim=96,
    decoder_ffn_dim=80,
    max_source_positions=20,
    max_target_positions=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
W2V = dict(
    vocab_size=32,
    **S,
    conv_dim=[16, 16],
    conv_stride=[5, 4],
    conv_kernel=[10, 4],
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    pad_token_id=0,
)
add("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", **W2V)
add("hubert", "HubertForCTC", "HubertConfig", **W2V)
add(
    "wav2vec2-bert",
    "Wav2Vec2BertForCTC",
    "Wav2Vec2BertConfig",
    vocab_size=32,
    **S,
    feature_projection_input_dim=16,
    position_embeddings_type="relative_key",
    pad_token_id=0,
)
add(
    "audio-spectrogram-transformer",
    "ASTForAudioClassification",
    "ASTConfig",
    **S,
    patch_size=4,
    max_length=24,
    num_mel_bins=16,
    frequency_stride=4,
    time_stride=4,
    num_labels=3,
)
# ---- encoder-decoder
add(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    vocab_size=128,
    d_model=64,
    d_kv=8,
    d_ff=96,
    num_layers=4,
    num_decoder_layers=4,
    num_heads=8,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
BART = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
add("bart", "BartForConditionalGeneration", "BartConfig", **BART)
add("marian", "MarianMTModel", "MarianConfig", **BART)
add("mbart", "MBartForConditionalGeneration", "MBartConfig", **BART)
add("m2m_100", "M2M100ForConditionalGeneration", "M2M100Config", **BART)
# ---- images and text
add(
    "llava",
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    text_config=dict(model_type="llama", **LM),
    vision_config=dict(model_type="clip_vision_model", **VIS),
    image_token_index=IMG,
    image_seq_length=16,
    vision_feature_layer=-2,
    pad_token_id=0,
)
add(
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    "PaliGemmaConfig",
    text_config=dict(model_type="gemma", **LM),
    vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VIS),
    image_token_index=IMG,
    projection_dim=64,
    hidden_size=64,
    pad_token_id=0,
)
add(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    text_config=dict(model_type="gemma3_text", **LM, sliding_window=6, query_pre_attn_scalar=8),
    vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **VIS),
    image_token_index=IMG,
    image_token_id=IMG,
    mm_tokens_per_image=4,
    pad_token_id=0,
)
SMOL = {"text_config": dict(model_type="llama", **LM), "image_token_id": IMG, "scale_factor": 2, "pad_token_id": 0}
SMOLV = S | {"image_size": 16, "patch_size": 4}
add(
    "smolvlm",
    "SmolVLMForConditionalGeneration",
    "SmolVLMConfig",
    **SMOL,
    vision_config=dict(model_type="smolvlm_vision", **SMOLV),
)
add(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    "Idefics3Config",
    **SMOL,
    vision_config=dict(model_type="idefics3_vision", **SMOLV),
)
add(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLConfig",
    text_config=dict(
        model_type="qwen2_5_vl_text",
        **LMNH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    ),
    vision_config={
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 8,
        "out_hidden_size": 64,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
    },
    image_token_id=IMG,
    video_token_id=121,
    vision_start_token_id=122,
    vision_end_token_id=123,
    pad_token_id=0,
)
add(
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLConfig",
    text_config=dict(
        model_type="qwen3_vl_text",
        **LM,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    ),
    vision_config={
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 8,
        "out_hidden_size": 64,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [1, 2],
    },
    image_token_id=IMG,
    video_token_id=121,
    vision_start_token_id=122,
    vision_end_token_id=123,
    pad_token_id=0,
)
add(
    "internvl",
    "InternVLForConditionalGeneration",
    "InternVLConfig",
    text_config=dict(model_type="qwen2", **LM),
    vision_config=dict(model_type="internvl_vision", **S, image_size=[16, 16], patch_size=[4, 4], num_channels=3),
    image_token_id=IMG,
    downsample_ratio=0.5,
    pad_token_id=0,
)
