"""Shrink a model's config to a miniature: the same architecture with few, narrow layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_LAYERS = 4
"""Layers of a miniature, unless more are asked for."""
_SIZES = (
    (64, "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim lru_width "
         "input_embedding_size output_embedding_size attention_hidden_size ple_embed_dim "
         "pronunciation_embed_dim shape_embed_dim dim_model_base"),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff dim_ff "
         "d_inner feed_forward_size n_inner moe_intermediate_size shared_intermediate_size "
         "intermediate_size_mlp shared_expert_intermediate_size dense_intermediate_size "
         "expert_ffn_hidden_size moe_shared_expert_intermediate_size block_ff_dim "
         "shared_experts_intermediate_size"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads index_n_heads linear_num_heads linear_num_value_heads "
        "linear_num_key_heads num_attention_heads_per_layer"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
        "num_experts_per_token num_selected_experts moe_topk moe_k num_global_key_value_heads"),
    (16, "head_dim kv_channels d_head attention_head_size dim_head swa_head_dim "
         "attention_head_dim v_head_dim qk_head_dim global_head_dim index_head_dim linear_head_dim "
         "linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size "
         "index_topk local_attn_chunk_length lsh_attn_chunk_length chunk_size mamba_chunk_size "
         "d_rel"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (8, "qk_nope_head_dim qk_rope_head_dim rotary_dim q_lora_rank kv_lora_rank o_lora_rank "
        "hidden_size_per_layer_input gated_norm_rank laurel_rank mamba_dt_rank time_step_rank "
        "hc_lowrank"),
    (512, "encoder_hash_byte_group_vocab ngram_vocab_size_base vocab_size_per_layer_input "
          "pronunciation_vocab_size shape_vocab_size"),
    (1, "n_group topk_group num_expert_group n_groups mamba_n_groups"),
)  # fmt: skip
"""Size, and the settings that get it where a config has a larger one."""
_OF_NAME = {name: size for size, names in _SIZES for name in names.split()}
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip


def shrink_config(
    config: PretrainedConfig, *, vocab_size: int, max_layers: int = MAX_LAYERS
) -> PretrainedConfig:
    """Return the config of a miniature: narrow layers, and few of them, but each kind of the model.

    Args:
        vocab_size: number of tokens.
        max_layers: number of layers, at most.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    for part in {id(one): one for one in (small, text)}.values():
        _shrink(part, max_layers)
        if type(vars(part).get("vocab_size")) is int:
            _shrink_vocabulary(part, vocab_size)
    return small


def _shrink_vocabulary(config: Any, vocab_size: int) -> None:
    values = vars(config)
    values["vocab_size"] = size = min(values["vocab_size"], vocab_size)
    beyond = [
        name
        for name, value in values.items()
        if name.endswith("token_id") and type(value) is int and value >= size
    ]
    values.update(dict.fromkeys(beyond, size - 1))  # some configs do not accept None


def _shrink(config: Any, max_layers: int) -> None:
    # Not by setattr, which would check each change before the others that belong to it.
    values = vars(config)
    shares_keys = values.get("num_key_value_heads") != values.get("num_attention_heads")
    for name, size in _OF_NAME.items():
        value = values.get(name)
        if type(value) is int and value > size:
            values[name] = size
        elif isinstance(value, list) and value and all(type(one) is int for one in value):
            values[name] = [min(one, size) for one in value]
    if not shares_keys and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "qk_rope_head_dim" in values and type(values.get("head_dim")) is int:
        values["head_dim"] = values["qk_rope_head_dim"]  # of the rotary embedding
    number = next((values[n] for n in _LAYERS if type(values.get(n)) is int), 0)
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == number > 1}
    kinds: dict[tuple[str, ...], int] = {}
    for i in range(number):
        kinds.setdefault(tuple(str(value[i]) for value in lists.values()), i)
    others = [i for i in range(number) if i not in kinds.values()]
    wanted = max(2, len(kinds)) if max_layers <= MAX_LAYERS else number
    kept = sorted([*kinds.values(), *others][: min(wanted, max_layers)])
    for name, value in lists.items():
        values[name] = [value[i] for i in kept]
    if (spec := values.get("_heterogeneity_spec")) is not None:  # settings of single layers
        layers = spec.per_layer_overrides
        wanted_layers = {kept.index(i): layers[i] for i in layers if i in kept}
        layers.clear()
        layers.update(wanted_layers)
    for name in _LAYERS:
        if type(values.get(name)) is int:
            values[name] = min(values[name], len(kept))
