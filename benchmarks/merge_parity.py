"""Compare our merge with PEFT's merge in memory, for each variant of LoRA.

    python benchmarks/merge_parity.py > benchmarks/merge_parity.md

It uses tiny bfloat16 models with random weights; every trained tensor is random too, and not zero.
For a quantized base, the reference is PEFT's merge into an unquantized model with the dequantized
weights.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.peft_edits import PeftEdits
from qlora_cli.adapters.weight_edits import build_skeleton
from qlora_cli.errors import ModelError
from qlora_cli.export.dequantize import FakeQuantizer
from qlora_cli.export.merge_shards import ShardMerger
from qlora_cli.models.quantization import FourBit, Int8, QuantizationConfig, Unquantized
from qlora_cli.models.shards import Shards
from qlora_cli.models.weight_names import WeightNames

BFLOAT16 = torch.bfloat16
INPUT = torch.arange(1, 49)[None]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS: dict[str, dict[str, Any]] = {
    "alpha / r": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"v_proj": 5, "layers.0.mlp.down_proj": 3},
    },
    "layers_to_transform": {"layers_to_transform": [1]},
    "bias: all": {"bias": "all"},
    "bias: lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "modules_to_save: head": {"modules_to_save": ["lm_head"]},
    "modules_to_save: embedding": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save: both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 5]},
    "added tokens": {"modules_to_save": ["embed_tokens", "lm_head"], "added": 4},
    "added tokens, those alone": {"trainable_token_indices": [256, 257], "added": 2},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "fan_in_fan_out (GPT-2)": {"kind": "gpt2", "fan_in_fan_out": True},
    "fan_in_fan_out, DoRA (GPT-2)": {"kind": "gpt2", "fan_in_fan_out": True, "use_dora": True},
    "target_parameters (experts in one tensor)": {
        "kind": "gpt_oss", "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "target_parameters (experts apart)": {
        "kind": "mixtral", "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "target_parameters (Qwen2-MoE)": {
        "kind": "qwen2_moe", "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    # PEFT turns it into target_parameters, with the router's among them.
    "all-linear (Mixtral)": {"kind": "mixtral", "target_modules": "all-linear"},
}  # fmt: skip
BASES: dict[str, QuantizationConfig] = {"none": Unquantized(), "nf4": FourBit(), "int8": Int8()}


@dataclass(frozen=True)
class Outcome:
    """Differences of one merge."""

    note: str = ""
    tensors: int = 0
    equal: int = 0
    difference: float = 0.0
    """Largest difference from PEFT's merge, relative to the largest value of the tensor."""
    logits: float = 0.0
    """Largest difference of float32 logits from those of base plus adapter, over their range."""
    untied: bool = False


def make_model(kind: str, *, tied: bool) -> Any:
    """Make a random model of two layers."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GptOssConfig,
        GptOssForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gpt2":
        gpt2 = GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64,
            tie_word_embeddings=tied, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        return GPT2LMHeadModel(gpt2).to(BFLOAT16)
    if kind == "gpt_oss":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        return GptOssForCausalLM(GptOssConfig(**sizes, **experts)).to(BFLOAT16)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).to(BFLOAT16)
    if kind == "qwen2_moe":
        experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts)).to(BFLOAT16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.02)
    return model.to(BFLOAT16)


def save_adapter(base: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Write an adapter with PEFT, with random values in every trained tensor."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=BFLOAT16)
    if added := settings.pop("added", 0):
        model.resize_token_embeddings(256 + added)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter, dtype=torch.float32)
    adapted.save_pretrained(folder)


def reference(base: Path, adapter: Path, rounded: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Load base plus adapter with PEFT, with the weights in `rounded` if given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    # Weights are stored in bfloat16 or dequantized to it, except in 8 bit.
    for name, value in rounded.items():
        parameter = model.get_parameter(name)
        parameter.data = value.float() if value.dtype == torch.float32 else value.to(dtype)
    stored = Shards(adapter / "adapter_model.safetensors").tensors
    rows = [
        t.shape[0]
        for name, t in stored.items()
        if re.search(r"embed_tokens\.([a-z_.]+\.)?weight$", name)
    ]
    if rows and rows[0] > model.config.vocab_size:
        model.resize_token_embeddings(rows[0], mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def examine(
    settings: dict[str, Any], folder: Path, *, tied: bool, config: QuantizationConfig
) -> Outcome:
    """Merge one variant in both ways."""
    from transformers import AutoModelForCausalLM

    settings = {"r": 8, "lora_alpha": 12, "target_modules": LINEAR, **settings}
    kind = settings.pop("kind", "llama")
    if kind == "gpt2":
        settings["target_modules"] = ["c_attn", "c_proj", "c_fc"]
    base, adapter, output = folder / "base", folder / "adapter", folder / "merged"
    make_model(kind, tied=tied).save_pretrained(base)
    save_adapter(base, adapter, settings)
    output.mkdir()
    shards = Shards(base)
    skeleton = build_skeleton(base, trust_remote_code=False)
    names = WeightNames(skeleton, shards.tensors)
    tied_keys = dict(skeleton.all_tied_weights_keys)
    rounding = FakeQuantizer(
        build_skeleton(base, trust_remote_code=False), config.load_options(BFLOAT16)
    )
    try:
        edits = PeftEdits(skeleton, names, adapter)
        merge = ShardMerger(
            shards, names, edits, rounding, tied_keys, as_trained=bool(rounding.names)
        )
        merge.verify(output, merge.write(output))
    except ModelError as error:
        return Outcome(note="refused: " + str(error).replace(str(folder), ""))
    stored = Shards(output)
    found = {names.in_model.get(name, name): stored.read(name) for name in stored.tensors}
    rounded = {name: rounding(name, shards.read(names.in_files[name])) for name in rounding.names}

    live = reference(base, adapter, rounded, torch.float32)
    expected = live(input_ids=INPUT, use_cache=False).logits
    config_of = AutoModelForCausalLM.from_pretrained(base).config
    config_of.tie_word_embeddings = tied and not merge.untied
    if merge.vocab_size is not None:
        config_of.vocab_size = merge.vocab_size
    config_of.save_pretrained(output)
    plain = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    given = plain(input_ids=INPUT, use_cache=False).logits

    state = reference(base, adapter, rounded, BFLOAT16).merge_and_unload().state_dict()
    for whole, pieces in names.parts.items():
        for one in pieces:
            state[one.name] = state[whole][one.expert, one.start : one.start + one.rows]
    pairs = {name: (value, state[name].to(BFLOAT16)) for name, value in found.items()}
    worst = max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-9))
        for a, b in pairs.values()
    )
    return Outcome(
        tensors=len(pairs),
        equal=sum(torch.equal(a, b) for a, b in pairs.values()),
        difference=worst,
        logits=float((given - expected).abs().max() / expected.abs().max()),
        untied=bool(merge.untied),
    )


def main() -> None:
    """Print the table."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    print(
        "# Merge parity\n\nMade by `python benchmarks/merge_parity.py`. Columns: tensors that are"
    )
    print("bit-equal to PEFT's merge in memory on the same (dequantized) base; largest difference,")
    print(
        "relative to the largest value of the tensor; difference of float32 logits from base plus"
    )
    print("adapter, relative to their range; whether tied matrices are still tied.\n")
    print("| variant | tied | base | bit-equal to PEFT | largest difference | logits | written |")
    print("|---|---|---|---|---|---|---|")
    for variant, settings in VARIANTS.items():
        for tied in (False, True):
            for base, config in BASES.items():
                with tempfile.TemporaryDirectory() as folder:
                    one = examine(dict(settings), Path(folder), tied=tied, config=config)
                start = f"| {variant} | {'yes' if tied else 'no'} | {base} |"
                if one.note:
                    print(f"{start} {one.note} | | | nothing |", flush=True)
                    continue
                written = ("untied" if one.untied else "tied") if tied else "as it is"
                print(
                    f"{start} {one.equal} of {one.tensors} | {one.difference:.1e} | "
                    f"{one.logits:.1e} | {written} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
