"""Every objective computes its loss with the kernel that it is given, and never all logits.

An objective of a head that scores rows has no use for the kernel: it must compute no logits of
tokens at all. Sums, weights and metrics are held to the same.

An objective that computes a loss of its own is right, slow and large: nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.adapters import LoRA
from qlora_cli.kernels.cross_entropy import CrossEntropy, cross_entropy
from qlora_cli.models.base import load_model
from qlora_cli.models.heads import initialize_head
from qlora_cli.objectives import Classify, ObjectiveConfig, Reward, Supervised
from qlora_cli.objectives.base import Objective, same
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.types import IGNORE_INDEX, Batch, HeadSpec
from tests.conftest import save_tiny_model

ROWS, TOKENS, SUPERVISED, VOCABULARY = 4, 32, 2, 260

_UNION = get_args(ObjectiveConfig)
OBJECTIVES: tuple[Any, ...] = get_args(_UNION[0]) if _UNION else (ObjectiveConfig,)
"""All classes of the union."""


SETTINGS: dict[str, Any] = {"classify": {"labels": ["no", "maybe", "yes"]}}
"""Settings without a default, by type."""


def configs() -> list[Any]:
    """Return each objective of the union; those with a head with each kind of outputs."""
    types = {kind: kind.model_fields["type"].default for kind in OBJECTIVES}
    found = [kind(**SETTINGS.get(name, {})) for kind, name in types.items()]
    labels = SETTINGS["classify"]["labels"]
    weights = {"class_weights": {"no": 3.0}}
    return [
        *found,
        Classify(labels=labels, **weights),
        Classify(labels=labels, problem="multi", **weights),
        Classify(problem="regression"),
        Reward(center_rewards=0.1),
    ]


def make_batch(config: Any = None, rows: int = ROWS) -> Batch:
    """Make pairs of rows with two supervised tokens in each row, or rows with labels."""
    ids = torch.randint(1, 250, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    if getattr(config, "rows", "") == "labels":
        number = len(config.example_values)
        values = tuple(tuple(float((at + n) % 2) for n in range(number)) for at in range(rows))
        return Batch(ids, torch.ones_like(ids), labels, values=values)
    pairs = rows // 2
    values = tuple((float(at % 2),) for at in range(pairs))
    return Batch(ids, torch.ones_like(ids), labels, links=(2,) * pairs, values=values)


def prepared(objective: Objective, batch: Batch) -> Batch:
    """Compute what the losses need before the first of them."""
    [found] = objective.prepare([batch], torch.device("cpu"), same)
    return found


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
    """Assert that an objective makes its loss of those of its kernel, over supervised tokens.

    The kernel's losses are doubled, which has to change the loss; its gradient is multiplied by 0,
    1 and 2, and what that adds has to grow alike.
    """
    batch, calls = make_batch(config), 0

    def scaled(losses: int, gradient: int) -> CrossEntropy:
        def kernel(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            found, grad = cross_entropy(logits, targets)
            return losses * found, gradient * grad

        return kernel

    def loss_and_gradients(kernel: CrossEntropy) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        objective = config.build(model, torch.float32, kernel)
        with moved(model), LargestLogits(model) as largest:
            known = prepared(objective, batch)
            loss, _ = objective(known)
            loss.backward()
            objective.of_rows(known)
        assert largest.rows <= ROWS * (SUPERVISED + 1), "it computes logits of unsupervised tokens"
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    zero, one, two = (loss_and_gradients(scaled(1, factor)) for factor in (0, 1, 2))
    assert calls, "it does not call the cross-entropy that `build` is given"
    unused = "it does not return the {} of the cross-entropy that `build` is given"
    assert loss_and_gradients(scaled(2, 1))[0] != one[0], unused.format("loss")
    near = {"rtol": 1e-4, "atol": 1e-4}  # differences of float32 sums
    gradients = [(b - a, c - b) for a, b, c in zip(zero[1], one[1], two[1], strict=True)]
    assert any(first.any() for first, _ in gradients), unused.format("gradient")
    for first, second in gradients:
        torch.testing.assert_close(second, first, **near, msg=unused.format("gradient"))


@contextmanager
def moved(model: nn.Module) -> Iterator[None]:
    """Make the model another one than its reference: B is zero before the first step."""
    generator = torch.Generator().manual_seed(1)
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for weight in moved:
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in moved:
                weight.zero_()


def refuse_wrong_sums(config: Any, model: nn.Module) -> None:
    """Assert that loss, metrics, weight and shares of the rows are what a step and a log expect."""
    objective = config.build(model, torch.float32, cross_entropy)
    batch = prepared(objective, make_batch(config))
    empty = replace(make_batch(config), links=(), values=())
    empty.labels.fill_(IGNORE_INDEX)
    result = objective(batch)
    assert isinstance(result, tuple), "forward() has to return the loss sum and metrics by name"
    loss, metrics = result
    of_rows, weight = objective.of_rows(batch), objective.weight(batch)
    for name, value in {"the loss": loss, **metrics}.items():
        is_scalar = value.shape == () and value.dtype == torch.float32
        assert is_scalar, f"{name} has to be a float32 scalar: {value.dtype}, {value.shape}"
        assert value.requires_grad == (name == "the loss"), (
            f"{name} has to carry a gradient" if value is loss else f"detach the metric {name!r}"
        )
    assert type(weight) is int, f"weight() has to return an int: {type(weight)}"
    assert weight > 0
    nothing = objective(replace(empty, reference=batch.reference, divergence=batch.divergence))
    assert nothing[1].keys() == metrics.keys(), "every micro-batch has the same metrics"
    assert nothing[0].requires_grad, "a rank without rows takes part in the backward pass"
    assert (of_rows.shape, of_rows.dtype) == ((len(batch.labels),), torch.float64)
    assert not of_rows.requires_grad, "of_rows() has to run without a gradient"
    torch.testing.assert_close(
        of_rows.sum(), loss.detach().double(), rtol=1e-5, atol=1e-5,
        msg=lambda why: f"of_rows() has to add up to the loss of forward(). {why}",
    )  # fmt: skip
    measured = objective.measured(batch)
    assert measured.keys() == {"loss", *metrics}, "measured() has the loss and the same metrics"
    once = make_batch(config)
    double = Batch(
        torch.cat([once.input_ids] * 2),
        torch.ones(2 * ROWS, TOKENS, dtype=torch.long),
        torch.cat([once.labels] * 2),
        links=once.links * 2,
        values=once.values * 2,
    )
    twice, _ = objective(prepared(objective, double))
    torch.testing.assert_close(
        twice, 2 * loss, msg=lambda why: f"forward() has to return a sum, and not a mean. {why}"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "base")
    base = load_model(folder, dtype=torch.float32).requires_grad_(False)
    assert base.config.vocab_size == VOCABULARY
    return LoRA(r=4).attach(base)


@pytest.fixture(scope="module")
def load_head(tmp_path_factory: pytest.TempPathFactory) -> Callable[[HeadSpec], Any]:
    """Return a function that makes a model with a head."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "base")

    @cache
    def load(head: HeadSpec) -> Any:
        base = load_model(folder, head, may_lack_head=True, dtype=torch.float32)
        torch.manual_seed(0)
        initialize_head(base)
        return LoRA(r=4).attach(base.requires_grad_(False))

    return load


def refuse_token_logits(config: Any, model: nn.Module) -> None:
    """Assert that an objective of a head computes no logits of tokens, and trains the head."""

    def kernel(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("rows are scored, and no token is predicted")

    model.zero_grad()
    objective, batch = config.build(model, torch.float32, kernel), make_batch(config)
    with LargestLogits(model) as largest:
        objective(batch)[0].backward()
        objective.of_rows(batch)
    assert largest.rows == 0, "it computes logits of tokens"
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.any() for n, grad in trained.items() if "lora_A" not in n)
    assert any("score" in name for name in trained), "the head has to be trained"


@pytest.mark.parametrize("config", configs(), ids=lambda one: one.type)
def test_an_objective_keeps_its_contract(
    config: Any, model: Any, load_head: Callable[[HeadSpec], Any]
) -> None:
    if config.head is None:
        refuse_its_own_loss(config, model)
        refuse_wrong_sums(config, model)
    else:
        refuse_token_logits(config, load_head(config.head))
        refuse_wrong_sums(config, load_head(config.head))


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


class _OwnGradient(_OnlyRows):
    """The value of the kernel's loss, with the gradient of another one."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = super().forward(batch)
        own, _ = _Supervised(self.model, self.dtype).forward(batch)
        return own + (loss - own).detach(), {}

    def of_rows(self, batch: Batch) -> Tensor:
        return self._right.of_rows(batch)


@pytest.mark.parametrize(
    ("kind", "takes_kernel", "said"),
    [
        (_Own, False, "logits of unsupervised tokens"),
        (_Supervised, False, "does not call the cross-entropy"),
        (_OnlyRows, True, "logits of unsupervised tokens"),
        (_OnlyCalled, True, "does not return the loss"),
        (_OwnGradient, True, "does not return the gradient"),
    ],
)
def test_an_objective_with_a_loss_of_its_own_fails(
    kind: Any, takes_kernel: bool, said: str, model: Any
) -> None:
    with pytest.raises(AssertionError, match=said):
        refuse_its_own_loss(_config_of(kind, takes_kernel=takes_kernel), model)


def _config_of(kind: Any, *, takes_kernel: bool = True) -> Any:
    class Config:
        def build(self, model: nn.Module, dtype: torch.dtype, kernel: CrossEntropy) -> Objective:
            objective: Objective = kind(model, dtype, *[kernel] * takes_kernel)
            return objective

    return Config()


class _Smoothed(TokenLoss):
    """Label smoothing: a share of the kernel's loss, and a term of its own."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, kernel: CrossEntropy) -> None:
        def smoothed(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss, grad = kernel(logits, targets)
            rest, at = torch.log_softmax(logits.float(), 1), 1 / logits.shape[1]
            return 0.9 * loss - 0.1 * rest.mean(1).sum(), 0.9 * grad + 0.1 * (rest.exp() - at)

        super().__init__(model, dtype, smoothed)


def test_an_objective_may_add_terms_to_the_loss_of_its_kernel(model: Any) -> None:
    refuse_its_own_loss(_config_of(_Smoothed), model)


class _Mean(TokenLoss):
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(batch)[0] / max(1, batch.num_supervised), {}

    def of_rows(self, batch: Batch) -> Tensor:
        return super().of_rows(batch) / max(1, batch.num_supervised)


class _Detached(TokenLoss):
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(batch)[0].detach(), {}


class _AttachedMetric(TokenLoss):
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = super().forward(batch)
        return loss, {"double": 2 * loss}


class _MetricOfRows(TokenLoss):
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(batch)[0], {"rows": torch.ones(len(batch.labels))}


class _MetricAtTimes(TokenLoss):
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = super().forward(batch)
        return loss, {"all": loss.detach()} if batch.num_supervised else {}


class _NoMetrics(TokenLoss):
    def forward(self, batch: Batch) -> Any:
        return super().forward(batch)[0]


class _TensorWeight(TokenLoss):
    def weight(self, batch: Batch) -> Any:
        return (batch.labels != IGNORE_INDEX).sum()


class _OtherRows(TokenLoss):
    def of_rows(self, batch: Batch) -> Tensor:
        return super().of_rows(batch) / 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (_Mean, "has to return a sum, and not a mean"),
        (_Detached, "the loss has to carry a gradient"),
        (_AttachedMetric, "detach the metric 'double'"),
        (_MetricOfRows, "rows has to be a float32 scalar"),
        (_MetricAtTimes, "every micro-batch has the same metrics"),
        (_NoMetrics, "has to return the loss sum and metrics by name"),
        (_TensorWeight, "has to return an int"),
        (_OtherRows, "has to add up to the loss of forward"),
        (_Smoothed, "has to add up to the loss of forward"),  # it did not override `of_rows`
    ],
)
def test_an_objective_with_wrong_sums_fails(kind: Any, said: str, model: Any) -> None:
    with pytest.raises(AssertionError, match=said):
        refuse_wrong_sums(_config_of(kind), model)
