"""Write a tiny GGUF file, without llama.cpp."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_cli.models.base import load_model
from qlora_cli.models.tokenizer import load_tokenizer


def write_gguf(folder: Path, file: Path, *, scale: float = 1.0) -> None:
    """The tiny model as a GGUF file, by the names and orders that llama.cpp expects."""
    import gguf

    model = load_model(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # Readers need a merge. The bytes of this one are never next to each other in UTF-8.
    rare = "\u00ff"
    tokens += [rare + rare]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL
            if token in special
            else gguf.TokenType.UNUSED
            if token.startswith("[PAD")
            else gguf.TokenType.NORMAL
            for token in tokens
        ]
    )
    writer.add_token_merges([f"{rare} {rare}"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:  # llama.cpp rotates neighbours, transformers halves
                rows = tensor.view(count, 2, -1, tensor.shape[1])
                tensor = rows.transpose(1, 2).reshape(tensor.shape)
        ours = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(ours, (tensor * scale).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
