"""Which kernels a run gets."""

from __future__ import annotations

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.kernels.selection import choose_kernels


@pytest.mark.parametrize(
    ("work", "found"), [(1e6, "fused"), (2.9e13, "fused"), (3.1e13, "compiled"), (1e15, "compiled")]
)
def test_a_run_is_compiled_where_it_is_long_enough(work: float, found: str) -> None:
    assert choose_kernels("auto", "cpu", work) == found


def test_a_gpu_has_to_be_busy_for_longer() -> None:
    assert choose_kernels("auto", "cuda", 1e15) == "fused"


def test_nothing_is_compiled_for_a_device_that_nobody_measured() -> None:
    assert choose_kernels("auto", "mps", 1e30) == "fused"


def test_without_a_compiler_auto_does_without_and_a_wish_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert choose_kernels("auto", "cpu", 1e15) == "fused"
    with pytest.raises(RecipeError, match="needs a C\\+\\+ compiler") as caught:
        choose_kernels("compiled", "cpu", 1e15)
    assert caught.value.hint == "install it, or --set training.kernels=fused"
    assert choose_kernels("plain", "cpu", 1e15) == "plain"
