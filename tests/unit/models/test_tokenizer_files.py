"""Adapters and merged models keep the base's tokenizer files; other tokens are noticed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from qlora_cli.errors import ModelError
from qlora_cli.export.merge import merge
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.models.tokenizer_check import PROBES, first_difference, require_as_in_file
from qlora_cli.models.tokenizer_files import (
    save_plainly,
    save_tokenizer,
    tokenizer_files,
)
from qlora_cli.train.train import train
from tests.conftest import CHATML, make_tokenizer, save_tiny_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_base(base: Path, *, kind: str = "PreTrainedTokenizerFast", digits: int = 3) -> None:
    """Write the files of a tokenizer that splits numbers into groups, as of a model of 2024."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ).replace("DIGITS", str(digits))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["123 1234 the then say hello 999 12345 2024 (a, b)"] * 40, trainer
    )
    tokenizer.save(str(base / "tokenizer.json"))
    config = {
        "tokenizer_class": kind, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "chat_template": CHATML, "model_max_length": 512, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    ids = {"eos_token_id": tokenizer.token_to_id("<|im_end|>")}
    (base / "generation_config.json").write_text(json.dumps({**ids, "top_k": 7}), "utf-8")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_tiny_model(tmp_path / "base", vocab_size=330)
    write_base(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tokenizer_files(folder)}


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 4}, {"type": "full"}])
def test_a_run_and_its_merge_have_the_files_of_the_base(
    base: Path, tiny_recipe: Callable[..., Any], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    train(tiny_recipe(model={"path": str(base)}, adapter=adapter))
    merge(tmp_path / "run", tmp_path / "merged", weights="last")
    names = ("config.json", "generation_config.json")
    for folder in (tmp_path / "run/last", tmp_path / "merged"):
        assert contents(folder) == contents(base)
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_another_chat_template_changes_only_the_template(
    base: Path, tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    template = CHATML.replace("user", "human") + "{# another #}"
    (tmp_path / "t.jinja").write_text(template, "utf-8")
    recipe = tiny_recipe(model={"path": str(base)})
    changed = recipe.model_dump(mode="json")
    changed["data"]["chat_template"] = str(tmp_path / "t.jinja")
    train(type(recipe).model_validate(changed))
    merge(tmp_path / "run", tmp_path / "merged", weights="last")
    before = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    for folder in (tmp_path / "run/last", tmp_path / "merged"):
        after = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        assert after == {**before, "chat_template": template}
        assert list(after) == list(before)
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert load_tokenizer(folder).chat_template == template


@pytest.mark.parametrize("place", ["chat_template.jinja", "both", "none"])
def test_a_template_is_written_where_the_base_has_its_own(
    base: Path, tmp_path: Path, place: str
) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    if place != "both":
        del config["chat_template"]
        (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if place != "none":
        (base / "chat_template.jinja").write_text(CHATML, "utf-8")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages }}"
    target = tmp_path / "saved"
    target.mkdir()
    save_tokenizer(tokenizer, base, target)
    assert load_tokenizer(target).chat_template == "{{ messages }}"
    written = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
    assert ("chat_template" in written) is (place != "chat_template.jinja")
    assert (target / "chat_template.jinja").exists() is (place != "none")


def test_added_tokens_change_what_they_must_and_keep_the_class(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<new>"])
    target = tmp_path / "saved"
    target.mkdir()
    save_tokenizer(tokenizer, base, target)
    written = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & set(written)
    assert load_tokenizer(target)("a<new>b")["input_ids"][1] == len(tokenizer) - 1


# Model types whose tokenizer transformers 5 builds anew, and classes that it builds anew.
OVERRIDDEN = [
    ("qwen2", "LlamaTokenizerFast"),
    ("qwen2", "Qwen2TokenizerFast"),
    ("qwen3", "Qwen2Tokenizer"),
    ("llama", "GPT2Tokenizer"),
    ("llama", "GPT2TokenizerFast"),
    ("llama", "GPTNeoXTokenizerFast"),
    ("phi", "CodeGenTokenizer"),
    ("gpt_neox", "GPTNeoXTokenizerFast"),
    ("mistral", "LlamaTokenizer"),
    ("llama", "PreTrainedTokenizerFast"),
]


@pytest.mark.parametrize(("model_type", "kind"), OVERRIDDEN)
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_ids_are_those_of_the_file(
    tmp_path: Path, model_type: str, kind: str, digits: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), "utf-8")
    write_base(tmp_path, kind=kind, digits=digits)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "qlora"):
        tokenizer = load_tokenizer(tmp_path)
    texts = [*PROBES, "1234", "the 12345", "say 999 hello"]
    assert first_difference(tokenizer, stored, texts) is None
    assert tokenizer.chat_template == CHATML
    if (model_type, digits) == ("qwen2", 3):  # it would split every digit
        assert "the file's tokens are used" in caplog.text


def test_a_config_with_a_prefix_space_still_gives_the_files_numbers(tmp_path: Path) -> None:
    write_base(tmp_path, kind="GPT2TokenizerFast", digits=1)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "add_prefix_space": True}), "utf-8")
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert first_difference(load_tokenizer(tmp_path), stored, ["\n12345"]) is None


def test_rows_with_other_tokens_than_the_file_gives_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path, kind="GPT2TokenizerFast", digits=1)
    tokenizer = load_tokenizer(tmp_path)
    require_as_in_file(tokenizer, tmp_path, ["say qq 12"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("qq", "r")
    with pytest.raises(ModelError, match="for a row of the data"):
        require_as_in_file(tokenizer, tmp_path, ["say 12", "say qq 12"])


def test_rows_may_have_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    write_base(tmp_path, kind="GPT2TokenizerFast", digits=1)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    added = {"320": {"content": "<|tool|>", "special": True}}
    path.write_text(json.dumps({**config, "added_tokens_decoder": added}), "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert "<|tool|>" in tokenizer.get_vocab()
    require_as_in_file(tokenizer, tmp_path, ["<|tool|> 12"])


OTHER_PYTHON = os.environ.get("QLORA_TRANSFORMERS_4", "")
"""The python of an environment with transformers 4 (no torch is needed)."""


@pytest.mark.skipif(not OTHER_PYTHON, reason="QLORA_TRANSFORMERS_4 names no python")
def test_transformers_4_reads_the_written_files(
    base: Path, tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    train(tiny_recipe(model={"path": str(base)}))
    merge(tmp_path / "run", tmp_path / "merged", weights="last")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    save_plainly(make_tokenizer(), unpacked)
    script = (
        "import sys; from transformers import AutoTokenizer as A\n"
        "for f in sys.argv[1:]:\n"
        "    t = A.from_pretrained(f); print(t('say 1234 <|im_start|>')['input_ids'])\n"
    )
    folders = [base, tmp_path / "run/last", tmp_path / "merged", unpacked]
    done = subprocess.run(
        [OTHER_PYTHON, "-c", script, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *of_base, plain = done.stdout.splitlines()
    assert len(set(of_base)) == 1
    assert of_base[0] == str(load_tokenizer(base)("say 1234 <|im_start|>")["input_ids"])
    assert plain == str(make_tokenizer()("say 1234 <|im_start|>")["input_ids"])
