import logging
from typing import get_args

import pytest
import torch

from qlora_cli.optim.optimizers import AdamW, AdamW8bit, OptimizerConfig, PagedAdamW32bit

CPU = torch.device("cpu")
CLASSES = get_args(get_args(OptimizerConfig)[0])


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    bias = torch.nn.Parameter(torch.randn(64, generator=generator))
    frozen = torch.nn.Parameter(torch.randn(4, 4, generator=generator), requires_grad=False)
    return [matrix, bias, frozen]


def run(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
    target = torch.linspace(-1, 1, 64)
    for _ in range(steps):
        loss = ((parameters[0] @ target + parameters[1]) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_optimizer_lowers_the_loss_and_leaves_frozen_weights_alone(config_class) -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = config_class(learning_rate=1e-2).build(parameters, CPU)
    run(optimizer, parameters, 5)
    assert not torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])
    assert torch.equal(parameters[2], before[2])


@pytest.mark.parametrize("config_class", CLASSES)
def test_weight_decay_is_for_matrices_alone(config_class) -> None:
    parameters = make_parameters()
    optimizer = config_class(weight_decay=0.5).build(parameters, CPU)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(parameters[0]): 0.5, id(parameters[1]): 0.0}


def test_adamw_is_torchs_own() -> None:
    ours, theirs = make_parameters(), make_parameters()
    config = AdamW(learning_rate=3e-3, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-7)
    run(config.build(ours, CPU), ours, 20)
    reference = torch.optim.AdamW(
        [
            {"params": theirs[:1], "weight_decay": 0.1},
            {"params": theirs[1:2], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.95),
        eps=1e-7,
    )
    run(reference, theirs, 20)
    # The fused kernel orders its float32 operations otherwise.
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-6)


def test_8bit_states_stay_near_the_32_bit_ones() -> None:
    exact, rounded = make_parameters(), make_parameters()
    start = make_parameters()[0]
    run(AdamW(learning_rate=1e-2).build(exact, CPU), exact, 20)
    run(AdamW8bit(learning_rate=1e-2).build(rounded, CPU), rounded, 20)
    error = (exact[0] - rounded[0]).norm() / (exact[0] - start).norm()
    assert 0 < error < 0.1


def test_paged_falls_back_off_cuda_and_says_so_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="qlora"):
        optimizer = PagedAdamW32bit().build(make_parameters(), CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [record.getMessage() for record in caplog.records] == [
        "optimizer.type: paged_adamw_32bit pages into CUDA memory; no CUDA here, so adamw"
    ]
