"""Greedy answers in batches."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.generate import answer
from qlora_cli.types import Prompt


def test_the_head_is_given_rows_without_gaps(tiny_model: Path) -> None:
    """In bfloat16 on a CPU, torch copies the head's weights for each row of a view with gaps."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    seen: list[bool] = []

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        seen.append(inputs[0].is_contiguous())

    head = model.get_output_embeddings()
    head.register_forward_hook(note)
    texts = answer(
        model,
        [Prompt([65, 66, 67], ""), Prompt([68], "")],
        AutoTokenizer.from_pretrained(tiny_model),
        stop_token_ids=[],
        max_new_tokens=3,
        batch_size=2,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert len(texts) == 2
    assert seen == [True] * 3
    assert not head._forward_pre_hooks, "the hook outlived the call"
