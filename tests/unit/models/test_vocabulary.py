"""Tokens without a row in the embedding are refused before any row is read."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from qlora_cli.errors import DataError, ModelError
from qlora_cli.inspect.preview import preview
from qlora_cli.loop.run_data import prepare_data
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.plan.plan import plan
from qlora_cli.train.train import train


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with 258 tokens and an embedding of 260 rows."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def add_tokens(base: Path, *tokens: AddedToken | str, special: bool = False) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(base)


def change(path: Path, **values: object) -> None:
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}), "utf-8")


def add_ordinary(base: Path) -> None:
    add_tokens(base, "one", "two", "three")


def add_special_that_the_template_writes(base: Path) -> None:
    add_tokens(base, "<a>", "<b>", "<c>", special=True)
    (base / "chat_template.jinja").write_text("{{ '<c>' + messages[0].content }}", "utf-8")


def pad_with_it(base: Path) -> None:
    add_tokens(base, "<a>", "<b>", "<pad>", special=True)
    change(base / "tokenizer_config.json", pad_token="<pad>")


def shrink_the_embedding(base: Path) -> None:
    change(base / "config.json", vocab_size=250, pad_token_id=None)


def stop_beyond(base: Path) -> None:
    change(base / "generation_config.json", eos_token_id=[257, 260])


def pad_beyond(base: Path) -> None:
    change(base / "generation_config.json", pad_token_id=32000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (add_ordinary, "261 tokens, with ids up to 260.*260 rows; tokens.*: 1, such as 'three'"),
        (add_special_that_the_template_writes, "'<c>' .260."),
        (pad_with_it, "'<pad>' .260."),
        (shrink_the_embedding, "250 rows; tokens without a row: 8"),
        (stop_beyond, r"generation_config.json: eos_token_id .260. is not a token"),
        (pad_beyond, r"generation_config.json: pad_token_id .32000. is not a token"),
    ],
)
def test_a_missing_embedding_row_is_refused_by_train_preview_and_plan(
    base: Path, tiny_recipe: Callable[..., Any], damage: Callable[[Path], None], said: str
) -> None:
    damage(base)
    recipe = tiny_recipe(model={"path": str(base)})
    for command in (train, preview, plan):
        with pytest.raises(ModelError, match=said) as caught:
            command(recipe)
        assert caught.value.hint


def test_a_special_token_that_nothing_writes_may_lack_a_row(
    base: Path, tiny_recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Gemma 3's text models have such a token, for images."""
    add_tokens(base, "<a>", "<b>", "<image>", special=True)
    recipe = tiny_recipe(model={"path": str(base)})
    with caplog.at_level(logging.INFO, "qlora"):
        prepare_data(recipe)
    assert "no row in the embedding for <image>" in caplog.text

    (tmp_path / "plain.jsonl").write_text('{"text": "ab"}\n{"text": "see <image> here"}\n', "utf-8")
    data = {
        "train": {"path": str(tmp_path / "plain.jsonl"), "format": {"type": "text"}},
        "max_length": 64,
    }
    recipe = tiny_recipe(model={"path": str(base)}, data=data)
    for command in (prepare_data, preview):
        with pytest.raises(DataError, match=r"plain.jsonl:2: the row has token 260"):
            command(recipe)
