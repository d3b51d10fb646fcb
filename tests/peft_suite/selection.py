"""Which of PEFT's tests are run, and what is edited in the copies. Data only."""

from __future__ import annotations

# file: patterns of the tests to run, searched in "Class::test[row]"; none means all of them, minus LEFT_OUT
FILES: dict[str, str] = {
    "test_auto.py": "",
    "test_config.py": "",
    "test_custom_models.py": "",
    "test_decoder_models.py": "",
    "test_encoder_decoder_models.py": "",
    "test_extra.py": "",
    "test_feature_extraction_models.py": "",
    "test_helpers.py": "TestCheckIsPeftModel",
    "test_hub_features.py": "",
    "test_initialization.py": """TestNoInfiniteRecursion TestCustomModelConfigWarning TestLowCpuMemUsage
        TestNamingConflictWarning TestLoadPeftKeyMapping.*_lora""",
    "test_lora_conversion.py": "no_support_raises",
    "test_low_level_api.py": "",
    "test_mapping.py": "",
    "test_other.py": "",
    "test_seq_classifier.py": "",
    "test_token_classification_qa.py": "",
    "test_tuners_utils.py": "",
    "test_vision_models.py": "TestResnet",
}

# reason: patterns of the tests that are left out for it
LEFT_OUT: dict[str, str] = {
    "about another method": """adalora adaption_prompt boft dora fourierft _glora gralora _hra_ lntuning loha_ lokr_
        _miss_ monteclora nested_config _oft_ _osf prefix_tuning prompt randlora shared_state _vblora vera_ _vera""",
    "about an option that only LoRA or IA3 has": """TestDynamicDispatch TestMultiRankAdapter TestRankAndAlphaPattern
        feedforward_(matching|subset) layer_replication rank_pattern runtime_config""",
    "needs the config field trainable_token_indices": "trainable_token trainble_token inside_auxiliary",
    "needs the config field target_parameters": "target_parameter paramwrapper TestTargetedParameterNames",
    "needs the config field bias": """bias_in_module_name bias_raises bias_warns finite_bias learnable_bias no_bias
        shared_tensors""",
    "targets an embedding": """conv1d_emb emb_conv1d embed_scale lora_embedding resized_embedding tie_word
        to_embedding_layer""",
    "targets nn.MultiheadAttention": "_mha_ multihead",
    "checks LoRA's own parameters, values or counts": """add_weighted_adapter_(neg|sub|with) all_linear_works
        module_type nb_params prefix_removal repr_lora_conv1d requires_grad_(model_)?irregular select_correct
        state_dict_model_with_weight status_with_modules transformers_model$ unsharded with_injected_layers$""",
    "about PeftMixedModel, which takes PEFT's own methods only": "mixed_model PeftMixedModel without_mutation.True",
    "needs the hub or diffusers": "cache_dir diffusion extended_vocab greater_vocab to_tokenizer [Ww]hisper",
    "PEFT gives only LoRA models this tag": "custom_models_dont_have",
    "merges gates at values that no weight takes up: a layer that norms its sum is open or closed": r"""
        merge_layers(_fp16|_multi|_nan)?\[.*(Bart|Bert|Deberta|DebertaV2|Roberta|GPTJ|Bloom)\w*-HawAdaConfig-[A-Z_2]+\]""",
    "sees the tokens of all rows in one axis": r"mixed_adapter_batches\[.*OPTForCausalLM-HawAdaConfig-CAUSAL_LM\]",
    "needs an accelerator": "_bnb_ gpu_large opt_timing",
    "needs token embeddings, or is for prompt learning": """Extraction.*input_embeds
        ViT.*(input_embeds|prepare_for_training|low_cpu_mem)""",
    "never touches the tuner": """error_hierarchy filter_state_dict GetModelConfig invalid_hub KbitTraining
        local_model_(invalid|broken) nonexisting_hub NoSplitModules TestFindMinimalTargetModules::(?!test_get|.*ia3)
        tied_returns tied_to_embedding.peft- uninitialized_adapter vanilla without_adapter_raises""",
}

# file: what is replaced in its copy (pattern, replacement). {..} is the tuner's own name for it, see plugin.NAMES
LORA_NAMES = [(r"\blora_[AB](\.\w+)?\.weight\b", r"{slot}\1{rest}"), (r"\blora_[AB]\b", "{slot}")]
EDITS: dict[str, list[tuple[str, str]]] = {
    "testing_common.py": [(r"if config_cls not in \(LoraConfig,.*\):", "if False:")],  # mixed batches are for us too
    "test_custom_models.py": [
        (r"^import pytest$", "import plugin\nimport pytest"),
        (r'startswith\("lora\.\w+"', 'startswith("{name}."'),
        (r'"lora_[AB]" in print_output', '"{prefix}" in print_output'),
        (r'\.lora_A\["default"\]\.weight', '.{slot}["default"]{rest}'),
        (r"set\((\w+)\)\.symmetric_difference\(set\((\w+)\)\)", r"plugin.unnamed(\1) ^ plugin.unnamed(\2)"),
        (r"from peft\.tuners\.lora\.model import (\w+)", r"\1 = plugin.Model.target_module_mapping"),
    ],
    "test_decoder_models.py": [
        (r"if config_cls != LoraConfig:", "if False:"),  # mixed batches
        (r"(def check_beft_config.*)", r"\1\n    return"),  # would skip merging on Llama and Gemma for every method
    ],
    "test_hub_features.py": [('"LORA"', '"{type}"'), ('"lora"', '"transformers"')],
    "test_initialization.py": [('"lora_" in n', '"{prefix}" in n'), *LORA_NAMES],
    "test_low_level_api.py": [
        (r'del sd_before\["(\S+)\.lora_[AB]\.weight"\]', r'plugin.drop(sd_before, "\1.")'),
        (r"^import pytest$", "import plugin\nimport pytest"),
        (r"\{LoraConfig: .*\}\[config_cls\]", '"{prefix}"'),
        ('"lora" in key', '"{prefix}" in key'),
        *LORA_NAMES,
    ],
    "test_tuners_utils.py": [
        (r"from peft\.tuners\.lora\.layer import LoraLayer", "from plugin import Layer as LoraLayer"),
        (r"self\.emb0 = nn\.Embedding", "self.emb0 = nn.Linear"),  # a target of the models whose status is asked
        ('"LoraModel"', '"{model}"'),
        ('"LORA"', '"{type}"'),
        *LORA_NAMES,
    ],
}
