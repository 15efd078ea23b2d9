"""The reference model of an objective: the model as it was before the first step."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.kernels.kept_factors import keep_factors
from qlora_cli.types import IGNORE_INDEX, Batch, copy_to

LogProbs = Callable[[Batch], Tensor]
"""Returns the log-probability of each example in a batch, (S,)."""


class Reference:
    """The weights that are trained, as they are when this is made, or what they say about rows.

    With a fresh LoRA adapter they are the plain base: B is zero. With a warm start they are base
    and that adapter. The base is in memory once, and the same layers compute both models, so equal
    weights give equal bits.

    Args:
        model: the model that is trained, before the first step.
        is_kept: keep a copy of the trained weights. Without it, `precompute` has to see each batch
            before the first step.
    """

    def __init__(self, model: nn.Module, *, is_kept: bool) -> None:
        trained = [p for p in model.parameters() if p.requires_grad] if is_kept else []
        self._weights = [(weight, weight.detach().clone()) for weight in trained]
        self._is_kept = is_kept
        self.known: dict[str, float] = {}
        """Log-probability by the content of an example, and whether it is trained on or evaluated:
        the two are computed in other batches, which round otherwise."""

    @property
    def copies(self) -> list[Tensor]:
        """The copies of the trained weights."""
        return [copied for _, copied in self._weights]

    @torch.no_grad()
    def add_to(
        self,
        batches: Sequence[Batch],
        device: torch.device,
        objective: nn.Module,
        log_probs: LogProbs,
    ) -> list[Batch]:
        """Add the log-probabilities under the reference to batches.

        They are computed in evaluation mode, without dropout. Those of evaluation rows are kept for
        the next evaluation. Batches that bring them stay as they are.
        """
        if all(batch.reference is not None for batch in batches):
            return list(batches)
        is_training = objective.training
        keys = [_keys(batch, is_training=is_training) for batch in batches]
        if all(key in self.known for of_batch in keys for key in of_batch):
            pairs = zip(batches, keys, strict=True)
            return [self._look_up(batch, of_batch, device) for batch, of_batch in pairs]
        assert self._is_kept, "precompute() has seen every batch"
        with eval_mode(objective), self._restored():
            found = [replace(one, reference=log_probs(one.to(device))) for one in batches]
        if not is_training:
            for batch, of_batch in zip(found, keys, strict=True):
                assert batch.reference is not None
                self.known.update(zip(of_batch, batch.reference.tolist(), strict=True))
        return found

    @torch.no_grad()
    def precompute(
        self, batch: Batch, objective: nn.Module, log_probs: LogProbs, *, is_training: bool
    ) -> None:
        """Compute the log-probabilities of a batch with the weights as they are, and keep them.

        A batch whose examples are all known is not computed again.

        Args:
            batch: on the device.
            is_training: it is a micro-batch of a step, and not of an evaluation.
        """
        keys = _keys(batch, is_training=is_training)
        if all(key in self.known for key in keys):
            return
        with eval_mode(objective):
            found = log_probs(batch).tolist()
        for key, value in zip(keys, found, strict=True):
            self.known.setdefault(key, value)

    def use(self, known: Mapping[str, float]) -> None:
        """Take log-probabilities that were computed by an earlier run with the same weights."""
        self.known = dict(known)

    def _look_up(self, batch: Batch, keys: Sequence[str], device: torch.device) -> Batch:
        found = [self.known[key] for key in keys]
        return replace(batch, reference=copy_to(device, torch.tensor(found, dtype=torch.float64)))

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


def _keys(batch: Batch, *, is_training: bool) -> list[str]:
    stage = "train" if is_training else "eval"
    return [f"{stage}-{key}" for key in content_keys(batch)]


def content_keys(batch: Batch) -> list[str]:
    """Return a digest of the tokens and the loss mask of each example in a batch, (S,)."""
    if not batch.documents:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(1).tolist()
        rows = zip(batch.input_ids.tolist(), batch.labels.tolist(), lengths, strict=True)
        return [_digest(ids[:length], labels[:length]) for ids, labels, length in rows]
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    starts = list(accumulate(batch.documents, initial=0))
    prefixes = batch.prefixes or (0,) * len(batch.documents)
    links = batch.links or (1,) * len(batch.documents)
    keys: list[str] = []
    for number in links:
        first = starts[len(keys)]
        for _ in range(number):
            start, stop = starts[len(keys)], starts[len(keys) + 1]
            prefix = prefixes[len(keys)]
            whole = ids[first : first + prefix] + ids[start:stop]
            keys.append(_digest(whole, [IGNORE_INDEX] * prefix + labels[start:stop]))
    return keys


def _digest(ids: list[int], labels: list[int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(array("q", ids).tobytes())
    # Nothing predicts the first token, so its label does not matter.
    digest.update(array("q", labels[1:]).tobytes())
    return digest.hexdigest()
