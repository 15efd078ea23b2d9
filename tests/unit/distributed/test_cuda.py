"""Test which machines are refused because torch cannot use their card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_cli.distributed.cuda import (
    CudaState,
    configure_cuda,
    refuse_unsupported_card,
    refuse_unusable_card,
    runs_on,
)
from qlora_cli.errors import RecipeError

VERSION = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\n"
    "GCC version:  gcc version 12.3.0\n"
)
OPEN_VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n"
    "GCC version:  gcc version 13.2.0\n"
)


def machine(root: Path, driver: str | None, version: str = VERSION) -> Path:
    """Make the files that a driver makes."""
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    (root / "dev/nvidiactl").touch()
    if driver is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        text = version.format(driver)
        (root / "proc/driver/nvidia/version").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("text", [VERSION, OPEN_VERSION])
@pytest.mark.parametrize(
    ("driver", "cuda"),
    [("535.183.01", "13.0"), ("550.54.15", "13.0"), ("570.86.10", "13.2"), ("470.57", "12.6")],
)
def test_an_old_driver_is_refused(tmp_path: Path, driver: str, cuda: str, text: str) -> None:
    state = CudaState("2.13.0", cuda, None, machine(tmp_path, driver, text))
    with pytest.raises(RecipeError, match=f"its driver {driver} is older than") as caught:
        refuse_unusable_card(state)
    assert "update the driver" in str(caught.value.hint)
    assert "device: cpu" in str(caught.value.hint)


def test_a_build_for_cpus_is_refused(tmp_path: Path) -> None:
    state = CudaState("2.13.0+cpu", None, None, machine(tmp_path, "580.65.06"))
    with pytest.raises(RecipeError, match=r"torch 2.13.0\+cpu is a build for CPUs") as caught:
        refuse_unusable_card(state)
    assert "torch==2.13.0 " in str(caught.value.hint)


@pytest.mark.parametrize("driver", ["580.65.06", None])
def test_a_card_that_does_not_start_is_refused_with_torchs_reason(
    tmp_path: Path, driver: str | None
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use a card here")
    state = CudaState("2.13.0", "13.0", "0", machine(tmp_path, driver))
    with pytest.raises(RecipeError, match=f"driver {driver or 'unknown'}") as caught:
        refuse_unusable_card(state)
    assert "nvidia-smi" in str(caught.value.hint)


@pytest.mark.parametrize("visible", ["", " ", "-1", "NoDevFiles"])
def test_a_hidden_card_is_not_missed(tmp_path: Path, visible: str) -> None:
    refuse_unusable_card(CudaState("2.13.0", "13.0", visible, machine(tmp_path, "470.57.02")))


def test_a_machine_without_a_card_is_not_refused(tmp_path: Path) -> None:
    assert CudaState(root=tmp_path).driver is None
    refuse_unusable_card(CudaState("2.13.0", "13.0", None, tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()  # the driver without a card
    refuse_unusable_card(CudaState("2.13.0", None, None, tmp_path))


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), CUDA_13, True),
        ((8, 0), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # by sm_86
        ((9, 0), CUDA_13, True),
        ((10, 3), CUDA_13, True),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # PTX is compiled for it
        ((13, 0), CUDA_13[:-1], False),
        ((7, 0), CUDA_13, False),
        ((6, 1), CUDA_13, False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
    ],
)
def test_code_runs_on_its_generation(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert runs_on(capability, architectures) == runs


def test_a_card_without_code_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no code for Tesla V100 \(sm_70\)"):
        refuse_unsupported_card("Tesla V100", (7, 0), CUDA_13)
    refuse_unsupported_card("NVIDIA L4", (8, 9), CUDA_13)
    refuse_unsupported_card("a card of another maker", (0, 0), [])


def test_attention_by_cudnn_is_off() -> None:
    try:
        configure_cuda()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
