"""Tiny language models of every family that transformers has: its configuration with small numbers in its fields."""

import torch
from tiny import VOCAB_SIZE
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ2SEQ = sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 3_000_000

_LAYERS, _HEADS, _WIDTH, _HEAD_WIDTH = 2, 4, 32, 8
_SIZES = (
    (
        _WIDTH,
        "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim attention_hidden_size lru_width "
        "embed_dim model_dim hidden_dim",
    ),
    (
        2 * _WIDTH,
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner "
        "moe_intermediate_size shared_expert_intermediate_size dense_intermediate_size mlp_hidden_size "
        "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size intermediate_size_mlp",
    ),
    (
        _LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group topk_group "
        "num_selects moe_top_k",
    ),
    (
        _HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts mamba_n_heads conv_kernel mamba_d_conv num_expert "
        "num_key_value_heads num_kv_heads n_kv_heads",
    ),
    (
        _HEAD_WIDTH,
        "head_dim d_kv kv_channels qk_nope_head_dim v_head_dim state_size mamba_d_state qk_rope_head_dim "
        "index_head_dim rotary_dim",
    ),
    (16, "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim time_step_rank sliding_window"),
    (VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"),
    (
        128,
        "max_position_embeddings n_positions max_source_positions max_target_positions seq_length context_length "
        "max_sequence_length",
    ),
    (0, "bos_token_id num_nextn_predict_layers"),
    (1, "pad_token_id decoder_start_token_id"),
)
# What the names of fields do not tell
_OF_FAMILY = {
    "bamba": {"attn_layer_indices": [1]},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 4,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 8,
    },
    "reformer": {"axial_pos_embds_dim": [8, 24]},
    "deepseek_v2": {"num_experts_per_tok": 2},
}
_TOKENS = {"eos_token_id": None, "forced_bos_token_id": None, "forced_eos_token_id": None}
_SMALL = {name: size for size, names in _SIZES for name in names.split()} | _TOKENS


def tiny_text_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a family, with small numbers in the fields that have other ones, and no dropout."""
    return _shrink(CONFIG_MAPPING[model_type])


def _shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = config_class().to_dict()
    fields = {name: value for name, value in _SMALL.items() if name in default and default[name] is not None}
    fields |= {name: value for name, value in _TOKENS.items() if name in default}
    fields |= {name: 0.0 for name, value in default.items() if "dropout" in name and isinstance(value, float)}
    fields |= {name: True for name in ("is_decoder",) if name in default}
    fields |= {name: _for_two_layers(value) for name, value in default.items() if _is_for_each_layer(name, value)}
    for name, sub_class in (config_class.sub_configs or {}).items():
        if isinstance(default.get(name), dict) and sub_class is not None and hasattr(sub_class, "to_dict"):
            fields[name] = _shrink(sub_class).to_dict()
    if default.get("is_encoder_decoder"):
        fields["decoder_start_token_id"] = 1
    return config_class(**fields | _OF_FAMILY.get(config_class.model_type, {}))


def _is_for_each_layer(name: str, value) -> bool:
    return isinstance(value, list) and len(value) > _LAYERS and not name.endswith(("section", "ids"))


def _for_two_layers(values: list) -> list:
    """Two kinds of layers, if there are so many."""
    other = next((value for value in values if value != values[0]), values[0])
    return [values[0], other]


@torch.no_grad()
def randomize_lightly(model: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Matrices of normal noise, other weights as they are initialised: some families have logarithms there."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std)
    model.tie_weights()
    return model
