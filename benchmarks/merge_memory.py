"""Merge a model many times larger than its memory limit.

    python -m benchmarks.merge_memory /somewhere/with/10/GB

Writes a random sharded model of 4.2 GB and an adapter on all of its linear layers, then runs
`qlora merge --no-logits` on them in a process with a data segment of at most 1 GiB (RLIMIT_DATA:
all private writable memory, touched or not), and prints the peak memory of that process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 2**30

CHILD = """
import resource, sys
from pathlib import Path
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from qlora_cli.cli import main
try:
    main(sys.argv[2:])
finally:
    status = Path("/proc/self/status").read_text()
    # Not ru_maxrss, which a process inherits from the one that started it.
    print([line for line in status.splitlines() if "VmHWM" in line][0], file=sys.stderr)
"""


def make_base(
    folder: Path, *, hidden: int, layers: int, shard: int, vocabulary: int = 32000
) -> int:
    """Write a random bfloat16 Llama in shards, layer by layer, and return its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from qlora_cli.adapters.weight_edits import build_skeleton
    from tests.conftest import make_tokenizer

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=vocabulary,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    files: list[dict[str, Any]] = [{}]
    total = size = 0
    for name, parameter in build_skeleton(folder, trust_remote_code=False).named_parameters():
        if size and size + 2 * parameter.numel() > shard:
            files.append({})
            size = 0
        files[-1][name] = parameter.shape
        size += 2 * parameter.numel()
        total += 2 * parameter.numel()
    places = {}
    torch.manual_seed(0)
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def make_run(run: Path, base: Path, *, quantization: str, r: int = 16) -> None:
    """Make a run folder with a random adapter, as training writes it."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    from qlora_cli.adapters.weight_edits import build_skeleton
    from qlora_cli.recipe.schema import Recipe
    from qlora_cli.runs.run_folder import environment
    from tests.conftest import make_tokenizer

    last = run / "last"
    last.mkdir(parents=True)
    config = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(build_skeleton(base, trust_remote_code=False), config)
    torch.manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape) * 0.02
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    save_file(tensors, last / "adapter_model.safetensors")
    config.save_pretrained(last)
    make_tokenizer().save_pretrained(last)
    (last / "generation_config.json").write_text('{"eos_token_id": 256}', encoding="utf-8")
    recipe = {
        "model": {"path": str(base)},
        "adapter": {"type": "lora", "r": r, "alpha": 16},
        "quantization": {"type": quantization},
        "data": {"train": {"path": "rows.jsonl"}},
        "training": {"max_steps": 1, "precision": "bf16"},
        "output": {"dir": str(run)},
    }
    Recipe.model_validate(recipe)
    (run / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    record = {
        "status": "finished", "seed": 0, "steps": 1, "max_steps": 1, "tokens": 1,
        "trained_weights": 1, "total_weights": 1, "seconds": 1.0, **environment(),
        "data": {
            "training": {"num_rows": 1, "num_tokens": 1, "num_supervised": 1}, "evaluation": None,
        },
    }  # fmt: skip
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


def merge(run: Path, output: Path, *options: str, limit: int = LIMIT) -> str:
    """Merge in a separate process, and return its standard error.

    Raises:
        CalledProcessError: it failed, or needed more than `limit` bytes of data (0: no limit).
    """
    command = [sys.executable, "-c", CHILD, str(limit), "merge", str(run), "--output", str(output)]
    done = subprocess.run(
        [*command, "--no-logits", *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def main() -> None:
    """Make, merge, measure, delete."""
    place = Path(sys.argv[1]) / "merge-memory"
    try:
        size = make_base(place / "base", hidden=2048, layers=36, shard=2**29)
        print(f"base: {size / 1e9:.2f} GB")
        for quantization in ("none", "nf4"):
            make_run(place / quantization, place / "base", quantization=quantization)
            start = time.monotonic()
            try:
                text = merge(place / quantization, place / "merged")
            except subprocess.CalledProcessError as error:
                sys.exit(f"{quantization}: {error.stdout}{error.stderr}")
            print(f"{quantization}: {time.monotonic() - start:.0f} s\n{text}")
            shutil.rmtree(place / "merged")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
