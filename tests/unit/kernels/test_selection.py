"""Test which kernels a run gets."""

from __future__ import annotations

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.kernels.selection import choose_kernels


@pytest.mark.parametrize(
    ("work", "found"), [(1e6, "fused"), (2.9e13, "fused"), (3.1e13, "compiled"), (1e15, "compiled")]
)
def test_long_run_gets_compiled_kernels(work: float, found: str) -> None:
    assert choose_kernels("auto", "cpu", work) == found


def test_compiling_pays_off_later_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_cli.kernels.selection.has_compiler", lambda device: True)
    assert choose_kernels("auto", "cuda", 2.9e15) == "fused"
    assert choose_kernels("auto", "cuda", 3.1e15) == "compiled"


def test_unmeasured_device_gets_fused_kernels() -> None:
    assert choose_kernels("auto", "mps", 1e30) == "fused"


def test_missing_compiler_is_an_error_only_when_set_explicitly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert choose_kernels("auto", "cpu", 1e15) == "fused"
    with pytest.raises(RecipeError, match="needs a C\\+\\+ compiler") as caught:
        choose_kernels("compiled", "cpu", 1e15)
    assert caught.value.hint == "install it, or --set training.kernels=fused"
    assert choose_kernels("plain", "cpu", 1e15) == "plain"
