"""Measure how full packed rows are and the cost of padding, and prove that examples are isolated.

    python benchmarks/packing.py DATA > benchmarks/packing.md

DATA is a folder with gsm8k/train.jsonl. The tokenizer and the first model are those of the demo
model (scripts/get_demo_model.py) or of `--model`. Everything runs on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qlora_cli._compat import quiet_libraries
from qlora_cli.data.batching.collate import proof_batches
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.data.config import Data
from qlora_cli.data.prepared.prepare import PreparedData, prepare
from qlora_cli.errors import ModelError
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.packed_attention import attend_by_document, check_packing
from qlora_cli.models.quantization import FourBit, Int8, QuantizationConfig, Unquantized
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.types import Example

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = "python benchmarks/packing.py DATA"

ROW_LENGTHS = (1024, 2048, 4096)
BATCHES = ((4, 4), (16, 4), (32, 4), (64, 4))
"""Rows per step and per forward. If both are equal, rows are not grouped by length."""

BACK_ENDS = ("eager", "sdpa")
WEIGHTS: dict[str, QuantizationConfig] = {"none": Unquantized(), "nf4": FourBit(), "int8": Int8()}
DTYPES = (torch.float32, torch.bfloat16)

SIZE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
RANDOM: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Its window is shorter than the examples; every other layer sees all of them.
    "Gemma 3, random weights": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": 16,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "Qwen 3, random weights": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "LFM 2, random weights": (
        "Lfm2Config", "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
}  # fmt: skip
"""Config and class by name, with settings in addition to SIZE. The last carries state in its
convolutions."""


@dataclass(frozen=True)
class Case:
    """A model to prove isolation for."""

    name: str
    attention: str
    weights: str
    dtype: torch.dtype
    model: PreTrainedModel
    vocab_size: int


def stream(
    prepared: PreparedData, batch_size: int, micro: int, max_length: int | None
) -> BatchStream:
    """Batch the first epoch as `qlora train` does."""
    return BatchStream(
        prepared.examples,
        batch_size=batch_size,
        micro_batch_size=micro,
        seed=0,
        epochs=1,
        pad_token_id=0,
        max_length=max_length,
    )


def cases(model: Path) -> Iterator[Case]:
    for weights, quantization in WEIGHTS.items():
        for attention in BACK_ENDS:
            for dtype in DTYPES:
                config = BaseModelConfig(path=str(model), attention=attention)
                options = quantization.load_options(dtype)
                loaded = config.load(options, torch.device("cpu"))
                size = loaded.config.vocab_size
                yield Case("SmolLM2-135M-Instruct", attention, weights, dtype, loaded, size)
    for name, (config_name, class_name, settings) in RANDOM.items():
        for attention in BACK_ENDS:
            made = getattr(transformers, config_name)(**SIZE, **settings)
            made._attn_implementation = attention
            torch.manual_seed(0)
            random = getattr(transformers, class_name)(made)
            yield Case(name, attention, "none", torch.float32, random, SIZE["vocab_size"])


def proof_row(case: Case, examples: Sequence[Example]) -> str:
    """Make one line of the table."""
    attend_by_document(case.model)
    # A small vocabulary has other words at these ids; what they say plays no part.
    rows = [[i % case.vocab_size for i in example.input_ids] for example in examples]
    batches = proof_batches([Example(ids, ids) for ids in rows], pad_token_id=0)
    try:
        outcome, text = "proved", check_packing(case.model, *batches, case.dtype).summary()
    except ModelError as error:
        outcome, text = "refused", str(error)
    leak, leak_allowed, reach, difference, allowed = re.findall(r"\d\.\de[+-]\d+", text)
    dtype = str(case.dtype).removeprefix("torch.")
    cells = [
        case.name, case.attention, case.weights, dtype, f"{leak} ({leak_allowed})", reach,
        f"{difference} ({allowed})", outcome,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def report(
    prepared: PreparedData, tokenizer: PreTrainedTokenizerFast, model: Path
) -> Iterator[str]:
    longest = max(len(example.input_ids) for example in prepared.examples)
    yield "# Packing\n"
    yield (
        f"GSM8K train: {prepared.num_rows:,} rows, {prepared.num_tokens:,} tokens of SmolLM2's "
        f"tokenizer with its chat template ({len(tokenizer):,} tokens), the longest row {longest}. "
        "Each line is from the log of `qlora train`, about the first epoch.\n"
    )
    yield "## Packed\n"
    for max_length in ROW_LENGTHS:
        yield f"- `max_length` {max_length}: {stream(prepared, 16, 4, max_length).summary()}"
    yield "\n## Without packing, where attention is not ours and rows are padded\n"
    for batch_size, micro in BATCHES:
        grouped = " (nothing to group)" if batch_size == micro else ""
        line = stream(prepared, batch_size, micro, None).summary()
        yield f"- `micro_batch_size` {micro} of {batch_size}{grouped}: {line}"
    yield "\n## The proof\n"
    yield (
        "`qlora train` runs this before training, on the start of three rows. In brackets: the "
        "tolerance, which is rounding, or twice the effect of changing one row on the others of a "
        "batch that is not packed. In 8 bit that is large, because the outliers of all rows "
        "together decide how each is quantized; gradients do not pass that way. The last model "
        "carries state across the boundary.\n"
    )
    columns = (
        "model", "attention", "weights", "computed in",
        "change of the other examples' logits, in units of their spread",
        "gradient across the boundary (0)", "difference of a loss, packed and unpacked", "outcome",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for case in cases(model):
        yield proof_row(case, prepared.examples[:3])
    names = ("torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield f"\nVersions: {versions}. Command: `{COMMAND}`."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with gsm8k/train.jsonl")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="SmolLM2 135M Instruct")
    args = parser.parse_args()
    quiet_libraries()
    model = BaseModelConfig(path=str(args.model)).locate()
    tokenizer = load_tokenizer(model)
    source = {
        "path": str(args.data / "gsm8k/train.jsonl"),
        "format": {
            "type": "prompt_completion", "prompt_field": "question", "completion_field": "answer",
        },
    }  # fmt: skip
    data = Data.model_validate({"train": source, "max_length": max(ROW_LENGTHS)})
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(data.train_sources, tokenizer, data, Path(folder))
        for line in report(prepared, tokenizer, model):
            print(line, flush=True)


if __name__ == "__main__":
    main()
