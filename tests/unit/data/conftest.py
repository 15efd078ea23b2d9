"""A small byte-level tokenizer, and chat templates of the kinds that real models have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>"
    "\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Turns have no role header, so the generation prompt is empty.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}"
    "{% endif %}{% endfor %}"
)
# Something follows the last turn that is not there in the middle of a conversation.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Reasoning of earlier turns is left out; the last answer gets a block of it, empty if need be.
REASONING = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip() %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{% if '</think>' in m.content %}{{ m.content }}{% else %}"
    "{{ '<think>\\n\\n</think>\\n\\n' + text }}{% endif %}"
    "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITHOUT_PROMPT = CHATML.partition("{% if add")[0]
WITHOUT_STOP = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "reasoning": REASONING,
    "without_prompt": WITHOUT_PROMPT,
    "without_stop": WITHOUT_STOP,
    "broken": "{% for m in messages %}\n{{ m.content }",
    "failing": "{{ messages[0].content + 1 }}",
}

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the capital of France is Paris.\n\nThe answer is 42 and the question", "a b c\n\n\n"] * 4,
        trainers.BpeTrainer(
            vocab_size=360,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tokenizer(trained_tokenizer: str) -> TokenizerMaker:
    """Makes a tokenizer with one of TEMPLATES; with `adds_bos` it puts <s> before every text."""

    def make(template: str | None = "chatml", *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(trained_tokenizer)
        if adds_bos:
            bos_id = tokenizer.token_to_id("<s>")
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", bos_id)]
            )
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        made.chat_template = TEMPLATES[template] if template else None
        return made

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: TokenizerMaker) -> PreTrainedTokenizerFast:
    """With the ChatML template."""
    return make_tokenizer()
