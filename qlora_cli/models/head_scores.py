"""Apply a head that scores rows to any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.common.progress import Progress
from qlora_cli.data.batching.collate import chunks, longest_first, pad_batch
from qlora_cli.objectives.head_outputs import HeadOutputs
from qlora_cli.types import Example

if TYPE_CHECKING:
    from torch import Tensor, nn


@torch.no_grad()
def score_rows(
    model: nn.Module,
    examples: Sequence[Example],
    dtype: torch.dtype,
    *,
    device: torch.device,
    batch_size: int,
    pad_token_id: int,
    name: str,
) -> Tensor:
    """Return the outputs of the head for each example, (S, K) in float32, on the host.

    Args:
        model: a sequence classifier, with or without PEFT around it.
        dtype: autocast dtype; float32 means no autocast.
        batch_size: examples per forward pass.
        name: what is scored, for the progress in the log.
    """
    outputs, progress = HeadOutputs(model, dtype), Progress(name, len(examples))
    order = longest_first([len(example.input_ids) for example in examples])
    found: list[Tensor] = []
    with eval_mode(model):
        for group in chunks(order, batch_size):
            # Each stands for itself here, whatever it is linked with.
            some = [replace(examples[i], is_linked=False, prefix=0) for i in group]
            batch = pad_batch(some, pad_token_id)
            found.append(outputs(batch.to(device)).cpu())
            progress.add(len(group))
    scores = torch.cat(found)
    return scores[torch.tensor(order).argsort()]


def probabilities(outputs: Tensor, problem: str) -> Tensor:
    """Return the probability of each label (S, K) in float64; for numbers, the outputs."""
    if problem == "regression":
        return outputs.double()
    exact = outputs.double()
    return exact.softmax(1) if problem == "single" else exact.sigmoid()
