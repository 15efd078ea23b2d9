from __future__ import annotations

import re

import pytest

from qlora_cli.export.ollama import modelfile
from tests.conftest import CHATML, make_tokenizer

DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)
OTHER_END = CHATML.replace("{% if add", "{% if messages|length > 1 %}!{% endif %}{% if add")
UPPER = CHATML.replace("message['content']", "message['content']|upper")


def test_chatml_becomes_the_template_of_ollama() -> None:
    tokenizer = make_tokenizer()
    assert modelfile(tokenizer, "mine-Q8_0.gguf", [tokenizer.eos_token_id]) == (
        "FROM ./mine-Q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n<|im_start|>assistant\n"
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_system_message_of_the_template_is_named() -> None:
    text = modelfile(make_tokenizer(DEFAULT + CHATML), "mine.gguf", [])
    assert text is not None
    assert re.findall(r'SYSTEM """(.*)"""', text) == ["Be kind."]


@pytest.mark.parametrize(
    "template",
    [None, NO_SYSTEM, OTHER_END, UPPER],
    ids=["none", "no system", "long ones end otherwise", "contents are changed"],
)
def test_a_template_that_ollama_cannot_express_has_no_modelfile(template: str | None) -> None:
    assert modelfile(make_tokenizer(template), "mine.gguf", []) is None
