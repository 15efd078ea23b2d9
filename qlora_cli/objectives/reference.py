"""The reference model of an objective: the model as it was before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.kernels.kept_factors import keep_factors
from qlora_cli.types import Batch


class Reference:
    """The weights that are trained, as they are when this is made.

    With a fresh LoRA adapter they are the plain base: B is zero. With a warm start they are base
    and that adapter. The base is in memory once, and the same layers compute both models, so equal
    weights give equal bits.

    Args:
        model: the model that is trained, before the first step.
        is_kept: keep a copy of the trained weights. Without it, all log-probabilities have to be
            computed before the first step.
    """

    def __init__(self, model: nn.Module, *, is_kept: bool) -> None:
        trained = [p for p in model.parameters() if p.requires_grad] if is_kept else []
        self._weights = [(weight, weight.detach().clone()) for weight in trained]

    @torch.no_grad()
    def add_to(
        self,
        batches: Sequence[Batch],
        device: torch.device,
        objective: nn.Module,
        log_probs: Callable[[Batch], Tensor],
    ) -> list[Batch]:
        """Add the log-probabilities under the reference to the batches that are without them.

        They are computed in evaluation mode, without dropout.

        Args:
            log_probs: returns those of the examples in a batch, (S,).
        """
        if all(batch.reference is not None for batch in batches):
            return list(batches)
        with eval_mode(objective), self._restored():
            return [
                batch
                if batch.reference is not None
                else replace(batch, reference=log_probs(batch.to(device)))
                for batch in batches
            ]

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put the copies in the place of the trained weights, and those back afterwards."""
        self._swap()
        try:
            with keep_factors():  # those of the trained weights are others
                yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for at, (weight, other) in enumerate(self._weights):
            weight.data, found = other, weight.data
            self._weights[at] = weight, found
