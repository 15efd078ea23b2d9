"""CUDA on this machine: whether torch can use its cards, and how it computes on them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_cli._compat import avoid_cudnn_attention
from qlora_cli.errors import RecipeError

_OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}
"""Oldest driver of each major version of CUDA (NVIDIA's CUDA compatibility guide)."""

_GO_ON = "`device: cpu` in the recipe (--set device=cpu) runs on the CPU"

Capability = tuple[int, int]
"""Compute capability of a card, such as (8, 9)."""


@dataclass(frozen=True)
class CudaState:
    """CUDA of a machine and of its build of torch."""

    torch_version: str = torch.__version__
    torch_cuda: str | None = torch.version.cuda
    """CUDA version that torch was built for; None for a build without CUDA."""
    visible: str | None = field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    root: Path = Path("/")
    """Root of the file system in which the driver's files are looked up."""

    @property
    def has_card(self) -> bool:
        """The driver of an NVIDIA card is loaded, and no setting hides the card."""
        is_hidden = self.visible is not None and self.visible.strip() in ("", "-1", "NoDevFiles")
        return not is_hidden and any((self.root / "dev").glob("nvidia[0-9]*"))

    @property
    def driver(self) -> str | None:
        """Version of the driver, such as 580.65.06; None if it is not known."""
        try:
            text = (self.root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
        except OSError:  # no driver, or a container that hides it
            return None
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
        return found and found[0]


def refuse_unusable_card(state: CudaState) -> None:
    """Refuse to compute on the CPU of a machine with a card. Call it where torch finds no card.

    Without this, a run with an old driver would train on the CPU without a word.

    Raises:
        RecipeError: the machine has a card, and torch cannot use it.
    """
    if not state.has_card:
        return
    here = "device: auto: this machine has an NVIDIA GPU, but torch cannot use it"
    if state.torch_cuda is None:
        raise RecipeError(
            f"{here}: torch {state.torch_version} is a build for CPUs",
            hint=f"pip install --force-reinstall torch=={state.torch_version.partition('+')[0]} "
            f"from an index with CUDA builds (pytorch.org lists them); {_GO_ON}",
        )
    needed = _OLDEST_DRIVER.get(int(state.torch_cuda.partition(".")[0]))
    driver = state.driver
    if driver is not None and needed is not None and int(driver.partition(".")[0]) < needed:
        raise RecipeError(
            f"{here}: its driver {driver} is older than {needed}, which torch "
            f"{state.torch_version} needs (built for CUDA {state.torch_cuda})",
            hint="update the driver, or install torch for an older CUDA (pytorch.org lists the "
            f"builds); {_GO_ON}",
        )
    raise RecipeError(
        f"{here} (torch {state.torch_version} for CUDA {state.torch_cuda}, driver "
        f"{driver or 'unknown'}): {_reason()}",
        hint=f"check that `nvidia-smi` works here; {_GO_ON}",
    )


def _reason() -> str:
    """Return what torch says when it starts CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        return str(error).partition("\n")[0]
    return "no device is visible to it"


def refuse_unsupported_card(name: str, capability: Capability, architectures: list[str]) -> None:
    """Refuse a card for which this build of torch has no code.

    Args:
        architectures: those of torch.cuda.get_arch_list().

    Raises:
        RecipeError: the first kernel would fail with "no kernel image is available".
    """
    if architectures and not runs_on(capability, architectures):
        major, minor = capability
        raise RecipeError(
            f"device: auto: torch {torch.__version__} has no code for {name} (sm_{major}{minor}); "
            f"it has code for {', '.join(architectures)}",
            hint="install torch for an older CUDA (pytorch.org lists the builds); " + _GO_ON,
        )


def runs_on(capability: Capability, architectures: list[str]) -> bool:
    """Tell if one of a build's architectures runs on a card.

    Machine code (sm_XY) runs on cards of the same major version that are not older; code with the
    suffix `a` on that version alone. PTX (compute_XY) is compiled for any newer card.
    """
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        built = int(found[2]), int(found[3])
        is_exact = found[4] == "a"
        if built == capability:
            return True
        is_newer = built < capability and not is_exact
        if is_newer and (found[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def configure_cuda() -> None:
    """Set how torch computes on CUDA: sums in float32, and no attention by cuDNN."""
    matmul = torch.backends.cuda.matmul
    # Split products would round their partial sums to 16 bit. An adapter's gradient is a product
    # over all tokens with a small result: the shape that cuBLAS splits.
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    avoid_cudnn_attention()
