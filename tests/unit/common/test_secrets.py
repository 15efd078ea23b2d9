from __future__ import annotations

import logging

import pytest

from qlora_cli.common.secrets import MaskedFormatter, find_secret, masked

HOLD = [
    ("https://user:hunter22@example.com/x", "https://***@example.com/x"),
    ("see https://tok3n@example.com now", "see https://***@example.com now"),
    ("s3://b/k?a=1&X-Amz-Signature=abc&c=2", "s3://b/k?a=1&X-Amz-Signature=***&c=2"),
    ("https://x/?ACCESS_TOKEN=abc", "https://x/?ACCESS_TOKEN=***"),
    ("hf_" + "a1B2" * 8, "***"),
    ("x ghp_" + "a1B2" * 9 + " y", "x *** y"),
    ("sk-ant-" + "a" * 30, "***"),
    ("AKIA" + "A1B2" * 4, "***"),
]
HOLD_NOT = [
    "https://example.com/a@b", "HuggingFaceTB/SmolLM2-135M-Instruct", "hf_short", "me@example.com",
    "data/train.jsonl?x=1", "models/sk-7b", "s3://bucket/key", "tokens=3", "https://x/?key",
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), HOLD)
def test_secrets_are_found_and_hidden(text: str, shown: str) -> None:
    assert find_secret(text) is not None
    assert masked(text) == shown
    record = logging.LogRecord("qlora", logging.INFO, "", 1, "said %s", (text,), None)
    assert MaskedFormatter().format(record) == f"said {shown}"


@pytest.mark.parametrize("text", HOLD_NOT)
def test_texts_without_secrets_are_unchanged(text: str) -> None:
    assert find_secret(text) is None
    assert masked(text) == text
