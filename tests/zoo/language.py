"""transformers' models of text, by tiny random configurations: one entry for each family."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from .case import BATCH, Case

TOKENS, VOCABULARY = 8, 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "embedding_size": 32, "type_vocab_size": 2,
    # other words for the same
    "d_model": 32, "d_ff": 48, "d_kv": 8, "ffn_dim": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0, "attention_types": [[["global", "local"], 1]], "rotary_dim": 4,
    "ffn_hidden_size": 48, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "dim": 32, "hidden_dim": 48, "d_inner": 48,
    "max_seq_len": 64, "expansion_ratio": 2, "num_encoder_layers": 2, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "word_embed_proj_dim": 32,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_num_experts": 4, "moe_k": 2,
    # state spaces and recurrence
    "state_size": 4, "time_step_rank": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_n_groups": 1, "lru_width": 32, "attention_window_size": 8, "attention_hidden_size": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

CAUSAL: dict[str, dict[str, Any]] = {
    "afmoe": {}, "apertus": {}, "arcee": {}, "bamba": {"attn_layer_indices": [1]}, "biogpt": {}, "bitnet": {},
    "bloom": {}, "codegen": {"rotary_dim": 4}, "cohere": {}, "cohere2": {"sliding_window": 4}, "ctrl": {"dff": 48},
    "deepseek_v2": {}, "deepseek_v3": {}, "diffllama": {}, "doge": {}, "ernie4_5": {}, "ernie4_5_moe": {},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 64}, "falcon_mamba": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16}, "glm4_moe": {}, "gpt2": {}, "gpt_bigcode": {}, "gpt_neo": {}, "gpt_neox": {},
    "gpt_oss": {}, "gptj": {"rotary_dim": 4}, "granite": {}, "granitemoe": {}, "granitemoehybrid": {
        "layer_types": ["mamba", "attention"]}, "helium": {}, "hunyuan_v1_dense": {}, "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {"kv_channels": 8}, "lfm2": {"layer_types": ["conv", "full_attention"]}, "llama": {},
    "llama4_text": {"intermediate_size_mlp": 48, "moe_layers": [1]}, "mamba": {}, "mamba2": {
        "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, "minimax": {
        "layer_types": ["linear_attention", "full_attention"], "block_size": 8}, "ministral": {},
    "mistral": {}, "mixtral": {}, "modernbert-decoder": {}, "mpt": {"max_seq_len": 64}, "nanochat": {},
    "nemotron": {}, "olmo": {}, "olmo2": {}, "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {}, "openai-gpt": {}, "opt": {}, "persimmon": {}, "phi": {}, "phi3": {}, "phimoe": {}, "qwen2": {},
    "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {}, "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"]}, "recurrent_gemma": {"num_hidden_layers": 3}, "rwkv": {},
    "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {}, "xglm": {}, "zamba2": {
        "layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    "albert": {}, "bert": {}, "big_bird": {"attention_type": "original_full"}, "camembert": {}, "convbert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
    "distilbert": {}, "electra": {}, "ernie": {}, "esm": {"mask_token_id": 3, "position_embedding_type": "rotary"},
    "eurobert": {}, "flaubert": {}, "fnet": {}, "funnel": {"block_sizes": [1, 1], "d_head": 8, "num_decoder_layers": 1},
    "ibert": {}, "layoutlm": {}, "longformer": {"attention_window": 4}, "megatron-bert": {}, "mobilebert": {
        "intra_bottleneck_size": 16, "true_hidden_size": 16}, "modernbert": {}, "mpnet": {}, "nystromformer": {
        "num_landmarks": 4, "segment_means_seq_len": 8}, "rembert": {"input_embedding_size": 16,
        "output_embedding_size": 16}, "roberta": {}, "roberta-prelayernorm": {}, "roformer": {}, "squeezebert": {
        "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2,
        "output_groups": 2}, "xlm": {}, "xlm-roberta": {}, "xmod": {"languages": ["en"], "default_language": "en"},
    "yoso": {"use_expectation": True},
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": {}, "bigbird_pegasus": {"attention_type": "original_full"}, "blenderbot": {}, "blenderbot-small": {},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "longt5": {}, "m2m_100": {}, "marian": {}, "mbart": {}, "mt5": {}, "mvp": {}, "nllb-moe": {"expert_capacity": 8},
    "pegasus": {}, "pegasus_x": {"block_size": 4, "num_global_tokens": 2}, "plbart": {},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2}, "switch_transformers": {}, "t5": {}, "umt5": {},
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "canine": {"num_hash_functions": 2, "num_hash_buckets": 64, "local_transformer_stride": 4,
               "downsampling_rate": 2, "upsampling_kernel_size": 2}, "xlnet": {"d_head": 8},
    "dpr": {}, "lilt": {"hidden_size": 24, "num_attention_heads": 2}, "nomic_bert": {},
}  # fmt: skip


def cases() -> dict[str, Case]:
    """Case by family."""
    found = {}
    for auto, families, batch in (
        (AutoModelForCausalLM, CAUSAL, _tokens_and_labels),
        (AutoModelForMaskedLM, MASKED, _tokens_and_labels),
        (AutoModelForSeq2SeqLM, SEQ2SEQ, _tokens_and_labels),
        (AutoModel, BODIES, _tokens),
    ):
        for family, own in families.items():
            start = {"decoder_start_token_id": 0} if families is SEQ2SEQ else {}
            found[family] = Case(_maker(auto, family, start | own), batch)
    return found


def configured(family: str, sizes: dict[str, Any], own: dict[str, Any]) -> Any:
    """A family's configuration with what it knows of the sizes, and its own."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    known = {*inspect.signature(kind).parameters, *kind.attribute_map}
    for base in kind.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    config = kind(
        **{word: value for word, value in sizes.items() if word in known and kind.attribute_map.get(word) not in own}
        | own
    )
    if getattr(config, "decoder_start_token_id", 0) is None:
        config.decoder_start_token_id = 0
    return config


def _maker(auto: Any, family: str, own: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: auto.from_config(configured(family, SIZES, own))


def _tokens(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS))}


def _tokens_and_labels(model: nn.Module) -> dict[str, Any]:
    tokens = _tokens(model)["input_ids"]
    return {"input_ids": tokens, "labels": tokens.clone()}
