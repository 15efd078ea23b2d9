"""Answers to prompts, by greedy generation in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_cli.data.batches import prompt_batches
from qlora_cli.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@torch.no_grad()
def answer(
    model: nn.Module,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerFast,
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """The most likely continuation of each prompt, token by token, up to a stop token.

    Returns:
        One text per prompt, in their order, without special tokens.
    """
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # What is not said here, transformers takes from the model's own generation config.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    # Generation gives the head the last position of each row, a view with gaps between the rows.
    # torch multiplies such a view in bfloat16 on a CPU by a copy of the weights for each row.
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for batch in prompt_batches(
        prompts, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id
    ):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = model.generate(  # type: ignore[operator]
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                generation_config=greedy,
            )  # (B, T + new)
        new = output[:, batch.input_ids.shape[1] :]
        for index, text in zip(
            batch.indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[index] = text
    model.train(was_training)
    hook.remove()
    return texts
