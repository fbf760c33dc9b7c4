"""What a random model of each type needs to be tiny: sizes by the names that configs give them, and what some types
need besides. A config's own layer kinds are kept, one of each."""

from typing import Any

VOCABULARY, CONTEXT = 128, 512
# by attribute; where a config has no such attribute nothing is set
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 64
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "intermediate_size_mlp",
            "dense_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "dense_ffn_hidden_size",
        ),
        96,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
            "shared_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "kv_lora_rank", "q_lora_rank",
            "qk_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim", "sliding_window", "block_size",
        ),
        32,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
            "num_heads", "swa_num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
            "moe_num_experts", "mamba_n_heads", "mamba_num_heads", "mamba_d_conv", "mamba_d_conv_kernel",
            "linear_num_value_heads", "linear_conv_kernel_dim",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_experts_per_tok", "moe_k",
            "moe_topk", "top_k_experts", "num_experts_per_token", "index_n_heads", "n_mamba_heads", "mamba_expand",
            "linear_num_key_heads", "altup_num_inputs",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim", "attention_head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
            "kv_channels", "index_head_dim", "query_pre_attn_scalar", "mamba_d_state", "ssm_state_size", "state_size",
            "mamba_chunk_size", "chunk_size", "linear_key_head_dim", "linear_value_head_dim",
            "hidden_size_per_layer_input",
        ),
        16,
    ),
    **dict.fromkeys(
        (
            "n_shared_experts", "n_group", "topk_group", "num_expert_group", "mamba_n_groups", "n_groups",
            "mamba_ngroups", "num_mem_blocks",
        ),
        1,
    ),
    **dict.fromkeys(("mamba_dt_rank", "laurel_rank", "time_step_rank"), 8),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len", "max_position_embeddings", "index_topk"), CONTEXT),
    "mamba_d_ssm": 128,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}  # fmt: skip
# whatever the class
COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
# may be set where the class leaves them open
OPEN = {
    "num_key_value_heads", "num_experts_per_tok", "eos_token_id", "pad_token_id", "bos_token_id", "head_dim",
    "query_pre_attn_scalar",
}  # fmt: skip

SLIDING = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"] * 2
CONV = ["conv", "full_attention"] * 2
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
AXES = {**PLAIN, "mrope_section": [2, 3, 3]}
HALF = {**PLAIN, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
ZAMBA = {"num_hidden_layers": 4, "attention_head_dim": 32, "attention_hidden_size": 128}
GEMMA4 = {"num_hidden_layers": 4, "layer_types": SLIDING * 2, "num_kv_shared_layers": 2, "per_layer_config": None}
KIMI = {"layer_types": LINEAR, "linear_num_heads": 2, "linear_head_dim": 16, "mlp_layer_types": ["dense"] * 4}
BY_TYPE: dict[str, dict[str, Any]] = {
    **{
        name: {"layer_types": SLIDING}
        for name in (
            "gemma3_text",
            "exaone4",
            "afmoe",
            "cohere2",
            "cohere2_moe",
            "exaone_moe",
            "kolibri1",
            "ministral",
            "olmo3",
            "beam",
        )
    },
    **{name: {"layer_types": LINEAR} for name in ("qwen3_next", "granitemoehybrid")},
    **{
        name: {"layer_types": LINEAR, "rope_parameters": {**HALF, "mrope_interleaved": True}}
        for name in ("qwen3_5_text", "qwen3_5_moe_text")
    },
    **{name: {"sliding_window": None} for name in ("mistral", "starcoder2", "step3p7_text")},
    **{
        name: {"rope_parameters": AXES}
        for name in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text")
    },
    **{
        name: {"rope_parameters": {**AXES, "mrope_interleaved": True}}
        for name in ("qwen3_vl_text", "qwen3_vl_moe_text", "qwen2_5_omni_text", "qwen3_omni_moe_text")
    },
    **{
        name: {"is_decoder": True}
        for name in (
            "bert",
            "bert-generation",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "xlm-roberta",
            "xlm-roberta-xl",
            "megatron-bert",
            "rembert",
            "big_bird",
        )
    },
    **{name: GEMMA4 for name in ("gemma4_text", "gemma4_unified_text")},
    **{name: KIMI for name in ("kimi_linear", "bailing_hybrid")},
    "glm4v_moe_text": {"rope_parameters": HALF},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": SLIDING * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    },
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2": {"layer_types": CONV, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": CONV, "num_dense_layers": 1},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dots1": {
        "layer_types": ["full_attention"] * 2,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**PLAIN, "mrope_section": [3, 3, 2]},
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "zamba": {**ZAMBA, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        **ZAMBA,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 32,
        "moe_layers": [],
        "floor_scale": 64,
    },
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {"sliding_attention": PLAIN, "full_attention": PLAIN},
    },
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "xdrope", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2], "alpha": 1.0}
    },
    "deepseek_v2": {"topk_method": "greedy"},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "heads_per_ngram": 2,
    },
    "glm5_next_text": {"num_key_value_heads": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": CONTEXT},
    # of image-text models, beside their text model's own
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
}
SKIPPED = {
    **dict.fromkeys(("gemma3n", "fast_vlm", "perception_lm"), "needs timm"),
    "blt": "takes a minute to build",
    "phi4_multimodal": "its audio and vision models are large by default",
    "moshi": "its audio decoder is large by default",
    "idefics": "its vision model is large by default",
    "pi0": "a robot's policy",
    "unlimited_ocr": "398M parameters by default",
    "janus": "121M parameters by default",
    "deepseek_ocr2": "its vision model is large by default",
}
