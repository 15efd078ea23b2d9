"""Tiny real models and tokenizers for every test: built here, no downloads."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before transformers is imported: a test never asks the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The quickstart's model: `scripts/get_demo_model.py` brings it."""
DATA = Path(os.environ.get("QLORA_TEST_DATA", ROOT.parent / "shared" / "data"))
"""Real data sets, if present."""

needs_model = pytest.mark.skipif(
    not MODEL.exists(), reason=f"no demo model at {MODEL.relative_to(ROOT)}"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA.name}")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(template: str | None = CHATML) -> Any:
    """Byte-level BPE without merges: 256 bytes and the special tokens of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = template
    return fast


def save_tiny_model(
    folder: Path, *, dtype: str = "float32", family: str = "Llama", **changes: Any
) -> Path:
    """A random two-layer model of width 32 with its tokenizer, as an ordinary model folder.

    Args:
        family: of transformers' classes.
        changes: settings of its config.
    """
    import torch
    import transformers

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 260,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Large enough that a gradient through two layers is more than rounding noise.
        "initializer_range": 0.2,
        **changes,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep prepared and unpacked files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny float32 model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, Any]]:
    """Conversations whose answers follow a rule that a tiny model can start to learn."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {word} {count}"},
                {"role": "assistant", "content": " ".join([word] * count)},
            ]
        }
        for word in ("ab", "cd", "ef", "gh")
        for count in (1, 2, 3, 5)
    ]


@pytest.fixture
def tiny_recipe(
    tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path
) -> Callable[..., Any]:
    """Make a Recipe on the tiny model; keyword arguments replace or extend its sections."""
    from qlora_cli.recipe.schema import Recipe

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")

    def make(**sections: Any) -> Recipe:
        document: dict[str, Any] = {
            "model": {"path": str(tiny_model)},
            "adapter": {"type": "lora", "r": 4, "alpha": 8},
            "data": {
                "train": {"path": str(data)},
                "evaluation": {"path": str(data), "limit": 6},
                "max_length": 96,
            },
            "training": {
                "max_steps": 4,
                "batch_size": 4,
                "micro_batch_size": 2,
                "precision": "fp32",
                "gradient_checkpointing": False,
            },
            "optimizer": {"type": "adamw", "learning_rate": 1e-2},
            "output": {"dir": str(tmp_path / "run")},
        }
        for name, section in sections.items():
            kept = document.get(name, {})
            same = section.get("type") == kept.get("type") or "type" not in section
            document[name] = {**kept, **section} if same else section
        return Recipe.model_validate(document)

    return make


@pytest.fixture
def write_recipe(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of `tiny_recipe` to a file."""
    import yaml

    def write(**sections: Any) -> Path:
        document = tiny_recipe(**sections).model_dump(mode="json", exclude_unset=True)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path

    return write


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of a test with the mark `quick_every(n)` slow, but for one in n."""
    seen: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("quick_every"):
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Mark all values of a parameter slow but for a few, which `scripts/test.sh` tries too."""
    return [one if one in quick else pytest.param(one, marks=pytest.mark.slow) for one in values]


def each_optimizer() -> list[Any]:
    """Return an optimizer of each type, with its defaults."""
    from qlora_cli.recipe.field_types import FieldType
    from qlora_cli.recipe.schema import Recipe

    variants = FieldType.of(Recipe.model_fields["optimizer"]).variants
    return [kind.model_validate({"type": name}) for name, kind in variants.items()]


def exit_code(*arguments: object) -> int:
    """Run a command in this process."""
    from qlora_cli.cli import main

    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Return what a command prints with --json; a non-zero exit code is an error."""
    capsys.readouterr()
    assert exit_code(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)
