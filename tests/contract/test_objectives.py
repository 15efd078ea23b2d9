"""Every objective computes its loss with the kernel that it is given, and never all logits.

An objective that computes a loss of its own is right, slow and large: nothing else would notice.
"""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.adapters import LoRA
from qlora_cli.kernels.cross_entropy import CrossEntropy, cross_entropy
from qlora_cli.models.base import load_model
from qlora_cli.objectives import ObjectiveConfig, Supervised
from qlora_cli.objectives.base import Objective
from qlora_cli.types import IGNORE_INDEX, Batch
from tests.conftest import save_tiny_model

ROWS, TOKENS, SUPERVISED, VOCABULARY = 3, 32, 2, 260

_UNION = get_args(ObjectiveConfig)
OBJECTIVES: tuple[Any, ...] = get_args(_UNION[0]) if _UNION else (ObjectiveConfig,)
"""All classes of the union."""


def make_batch() -> Batch:
    """Make rows with two supervised tokens each."""
    ids = torch.randint(1, 250, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    return Batch(ids, torch.ones_like(ids), labels)


class LargestLogits(TorchDispatchMode):
    """Records the largest number of rows of a tensor as wide as the vocabulary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows = 0
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dim() and found.shape[-1] == VOCABULARY:
            is_view = found.untyped_storage().data_ptr() in self._weights
            self.rows = max(self.rows, 0 if is_view else found.numel() // VOCABULARY)
        return found


def refuse_its_own_loss(config: Any, model: nn.Module) -> None:
    """Assert that the loss of an objective is that of its kernel, over supervised tokens alone."""
    batch, calls = make_batch(), 0

    def doubled(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        loss, grad = cross_entropy(logits, targets)
        return 2 * loss, 2 * grad

    def loss_and_gradients(kernel: CrossEntropy) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        objective = config.build(model, torch.float32, kernel)
        with LargestLogits(model) as largest:
            loss, _ = objective(batch)
            loss.backward()
            objective.of_rows(batch)
        assert largest.rows <= ROWS * (SUPERVISED + 1), "it computes logits of unsupervised tokens"
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = loss_and_gradients(cross_entropy)
    other_loss, other_gradients = loss_and_gradients(doubled)
    assert calls, "it does not call the cross-entropy that it is given"
    torch.testing.assert_close(other_loss, 2 * loss, msg="it does not return its loss")
    assert gradients
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, 2 * one, msg="it does not return its gradient")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "base")
    base = load_model(folder, dtype=torch.float32).requires_grad_(False)
    assert base.config.vocab_size == VOCABULARY
    return LoRA(r=4).attach(base)


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda kind: kind.model_fields["type"].default)
def test_an_objective_uses_the_kernel_that_it_is_given(config: Any, model: Any) -> None:
    refuse_its_own_loss(config(), model)


class _Own(Objective):
    """The same loss, from all logits."""

    unit: ClassVar[str] = "supervised_tokens"

    def losses(self, batch: Batch) -> Tensor:
        logits = self.model(**batch.inputs()).logits[:, :-1]  # (B, T - 1, V)
        targets = batch.labels[:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T - 1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses(batch).sum(), {}

    def weight(self, batch: Batch) -> int:
        return batch.num_supervised

    def of_rows(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.losses(batch).sum(1).double()


class _Supervised(_Own):
    """The same loss, from the logits of supervised tokens."""

    def losses(self, batch: Batch) -> Tensor:
        logits = self.model(**batch.inputs(), logits_to_keep=SUPERVISED + 1).logits[:, :-1]
        targets = batch.labels[:, -SUPERVISED:]
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


class _OnlyRows(_Own):
    """The kernel's loss in training, and all logits in evaluation."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, kernel: CrossEntropy) -> None:
        super().__init__(model, dtype)
        self._right = Supervised().build(model, dtype, kernel)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found: tuple[Tensor, dict[str, Tensor]] = self._right(batch)
        return found


class _OnlyCalled(_OnlyRows):
    """The kernel is called, and another loss returned."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        super().forward(batch)
        return _Supervised(self.model, self.dtype).forward(batch)

    def of_rows(self, batch: Batch) -> Tensor:
        return self._right.of_rows(batch)


@pytest.mark.parametrize(
    ("kind", "takes_kernel", "said"),
    [
        (_Own, False, "logits of unsupervised tokens"),
        (_Supervised, False, "does not call the cross-entropy"),
        (_OnlyRows, True, "logits of unsupervised tokens"),
        (_OnlyCalled, True, "does not return its loss"),
    ],
)
def test_an_objective_with_a_loss_of_its_own_fails(
    kind: Any, takes_kernel: bool, said: str, model: Any
) -> None:
    class Config:
        def build(self, model: nn.Module, dtype: torch.dtype, kernel: CrossEntropy) -> Objective:
            objective: Objective = kind(model, dtype, *[kernel] * takes_kernel)
            return objective

    with pytest.raises(AssertionError, match=said):
        refuse_its_own_loss(Config(), model)
