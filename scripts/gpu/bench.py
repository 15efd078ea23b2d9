"""Shared by the checks: random models, recipes, rows, and commands in separate processes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.recipe.schema import Recipe
from scripts.gpu.older_torch import missing_arguments

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class NotHere(Exception):
    """The check needs a card. Everything up to that point has run."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the large model and of its batches."""

    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    """Layers of the model for speed and memory; gradients are compared with the first half."""
    tokens: int
    """Tokens of a forward pass."""
    documents: int
    """Rows that these tokens are cut into."""
    steps: int
    """Steps that are timed, after two that are not."""
    lengths: tuple[int, ...] = (1, 300, 77, 2048)
    """Documents of the attention checks."""
    new_lengths: int = 40
    """Different lengths whose first call is timed."""
    varied: int = 30
    """Micro-batches of the fragmentation check."""
    long: int = 2048
    """Tokens of the long documents in the resume check."""

    @property
    def head_size(self) -> int:
        return self.width // self.heads


LLAMA_8B = Sizes(4096, 14336, 32, 8, 32768, layers=8, tokens=8192, documents=12, steps=4)
"""The layers of Llama 3.1 8B, fewer of them, with a smaller vocabulary."""
SMALL_CARD = Sizes(4096, 14336, 32, 8, 32768, layers=4, tokens=2048, documents=6, steps=4)
"""The same for cards with less than 40 GiB."""
TINY = Sizes(
    64, 96, 4, 2, 320, layers=2, tokens=96, documents=3, steps=1,
    lengths=(1, 30, 7, 40), new_lengths=2, varied=3, long=160,
)  # fmt: skip
"""Enough to run the code of the checks on a CPU."""


def sizes_of(device: torch.device) -> Sizes:
    """Choose the sizes for a device."""
    if device.type == "cpu":
        return TINY
    total = torch.cuda.get_device_properties(device).total_memory
    return LLAMA_8B if total >= 40 * 2**30 else SMALL_CARD


@dataclass
class Bench:
    """A temporary folder with random models and rows; checks note their figures on it."""

    folder: Path
    device: torch.device
    sizes: Sizes
    deadline: float | None = None
    """Time (`time.monotonic`) at which the checks have to end."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures of the check that runs, by name."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def needs_card(self) -> None:
        """End a check that cannot tell more without a card."""
        if not self.is_cuda:
            raise NotHere

    def note(self, name: str, value: Any) -> Any:
        """Record a figure for the report, and return it."""
        self.figures[name] = value
        return value

    def at_most(self, value: float, limit: float, name: str) -> str:
        """Note a figure, check that it is within a limit, and return it as text."""
        self.note(name, value)
        assert value <= limit, f"{name} {value:.1e}, at most {limit:.0e} is allowed"  # NaN too
        return f"{name} {value:.1e}"

    def remaining(self) -> float | None:
        """Return the seconds left; None without a limit."""
        return None if self.deadline is None else max(1.0, self.deadline - time.monotonic())

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def start_memory(self) -> int:
        """Free cached memory, reset the peaks, and return the allocated bytes (0 on a CPU)."""
        gc.collect()  # models are in reference cycles of PEFT's
        if not self.is_cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_memory(self) -> tuple[int, int]:
        """Return the peak of allocated and of reserved bytes (0 on a CPU)."""
        if not self.is_cuda:
            return 0, 0
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def small_model(self) -> Path:
        """Return a random model of 256 x 4 layers (heads of 32) with a byte tokenizer."""
        folder = self.folder / "small"
        if not folder.exists():
            width, layers = (256, 4) if self.is_cuda else (64, 2)
            save_model(folder, width, 3 * width, width // 32, width // 64, 260, layers)
        return folder

    def large_model(self, layers: int | None = None) -> Path:
        """Return the model of `sizes`, or its first layers."""
        sizes = self.sizes
        whole = self.folder / "large"
        if not whole.exists():
            shape = sizes.width, sizes.intermediate, sizes.heads, sizes.kv_heads
            save_model(whole, *shape, sizes.vocabulary, sizes.layers, device=self.device)
        if layers in (None, sizes.layers):
            return whole
        folder = self.folder / f"large-{layers}"
        if not folder.exists():
            folder.mkdir()
            for path in whole.iterdir():
                (folder / path.name).hardlink_to(path)
            config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").unlink()
            config["num_hidden_layers"] = layers
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def rows(self, *, is_long: bool = False) -> Path:
        """Return a file of rows that a small model learns quickly."""
        path = self.folder / ("long.jsonl" if is_long else "rows.jsonl")
        if not path.exists():
            words = [chr(97 + i) + chr(97 + (7 * i) % 26) for i in range(26)]
            counts = [self.sizes.long // 3] * 4 if is_long else range(1, 9)
            rows = [
                {"prompt": f"say {word} {count}", "completion": " ".join([word] * count)}
                for word in words
                for count in counts
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def recipe(
        self, name: str, *, model: Path | None = None, is_long: bool = False, **sections: Any
    ) -> Recipe:
        """Make the recipe of a short run. Keyword arguments extend its sections."""
        source = {
            "path": str(self.rows(is_long=is_long)),
            "format": {"type": "prompt_completion"},
        }
        document: dict[str, Any] = {
            "model": {"path": str(model or self.small_model())},
            "quantization": {"type": "nf4"},
            "adapter": {"type": "lora", "r": 8, "dropout": 0.0},
            "data": {"train": source, "evaluation": {**source, "limit": 48}, "max_length": 128},
            "training": {"max_steps": 12, "batch_size": 8, "micro_batch_size": 4},
            "optimizer": {"type": "adamw", "learning_rate": 3e-3},
            "output": {"dir": str(self.folder / name)},
        }
        for section, values in sections.items():
            document[section] = {**document.get(section, {}), **values}
        if not self.is_cuda:
            document["device"] = "cpu"
        return Recipe.model_validate(document)

    def write_recipe(self, name: str, **sections: Any) -> Path:
        """Write the recipe of a short run, and return its file."""
        path = self.folder / f"{name}.yaml"
        recipe = self.recipe(name, **sections).model_dump(mode="json")
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    def command(self, *words: object, options: Sequence[object] = ()) -> Any:
        """Run `qlora` in a process of its own, as users do, and return what it printed.

        Args:
            options: those of `scripts/gpu/command.py`, which then runs it.
        """
        module: list[object] = ["qlora_cli"]
        if options or (self.is_cuda and missing_arguments()):
            module = ["scripts.gpu.command", *options, "--"]
        command = [sys.executable, "-m", *map(str, module), *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT,
            timeout=self.remaining(), check=False,
        )  # fmt: skip

    def qlora(self, *words: object) -> Any:
        """Run a command that has to succeed without a warning, and return its JSON."""
        done = self.command(*words, "--json")
        assert done.returncode == 0, f"exit code {done.returncode}: {last_line(done.stderr)}"
        warned = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
        assert not warned, warned[0]
        return json.loads(done.stdout)

    def train(self, name: str, **sections: Any) -> Path:
        """Train through the command line, and return the run folder."""
        self.qlora("train", self.write_recipe(name, **sections))
        return self.folder / name


def save_model(
    folder: Path,
    width: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    layers: int,
    *,
    device: torch.device | None = None,
) -> None:
    """Write a random Llama with a byte tokenizer, in bfloat16.

    Args:
        device: makes the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=min(0.05, width**-0.5),
        dtype=torch.bfloat16,
    )
    with torch.device(device or "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> Any:
    """Return a byte tokenizer with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max())


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of what is expected."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def metrics(run: Path, name: str) -> list[float]:
    """Return a metric of a run, as it was logged."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]
