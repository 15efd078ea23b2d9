"""Test how `--device` is read and cards are recognised."""

from __future__ import annotations

import pytest

from qlora_cli.distributed.devices import find_target, known_card
from qlora_cli.errors import RecipeError


@pytest.mark.parametrize(
    ("name", "gibibytes"),
    [("24GiB", 24), ("80 GB", 74.5), ("nvidia rtx 4090", 23.5), ("h100", 79.1)],
)
def test_device_is_a_card_or_a_memory_size(name: str, gibibytes: float) -> None:
    memory = find_target(name).memory_bytes
    assert memory is not None
    assert memory / 2**30 == pytest.approx(gibibytes, abs=0.1)


@pytest.mark.parametrize(
    "name",
    ["V100", "v100 32GB", "Tesla P100", "P40", "GTX 1080 Ti", "TITAN V", "K80", "M40"],
)
def test_a_card_without_code_in_torch_is_not_planned(name: str) -> None:
    with pytest.raises(RecipeError, match="older than Turing"):
        find_target(name)


def test_unknown_device_is_refused() -> None:
    with pytest.raises(RecipeError, match="--device: abacus is unknown"):
        find_target("abacus")


@pytest.mark.parametrize(
    ("name", "gibibytes", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "A100"),
        ("NVIDIA A100-PCIE-40GB", 39, "A100 40GB"),
        ("Tesla V100-SXM2-16GB", 16, None),
        ("NVIDIA A10", 22, "A10"),
        ("NVIDIA A10G", 22, "A10G"),
        ("NVIDIA L4", 22, "L4"),
        ("NVIDIA L40S", 44, "L40S"),
        ("NVIDIA A40", 44, "A40"),
        ("NVIDIA RTX A4000", 16, None),
        ("NVIDIA RTX A6000", 47, "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47, "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", 23, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA GeForce RTX 3090 Ti", 23, None),
        ("NVIDIA H100 80GB HBM3", 79, "H100"),
    ],
)
def test_card_is_recognised_by_the_words_of_its_name(
    name: str, gibibytes: int, card: str | None
) -> None:
    found = known_card(name, gibibytes * 2**30)
    assert (found and found.name) == card


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("2x RTX 4090", "--device 'RTX 4090' --gpus 2"),
        ("4 H100", "--device H100 --gpus 4"),
        ("8xA100", "--device A100 --gpus 8"),
        ("H100 x 8", "--device H100 --gpus 8"),
        ("2 * 24GiB", "--device 24GiB --gpus 2"),
        ("A100,A100,A100", "--device A100 --gpus 3"),
        ("A100 + H100", "name the smallest, and give --gpus for their number"),
    ],
)
def test_several_devices_point_to_the_option_for_their_number(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=r"several devices|different devices") as caught:
        find_target(name)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "card"),
    [("RTX 4080 Supper", "RTX 4080"), ("rtx408", "RTX 4080"), ("H10", "H100"), ("A10O", "A10")],
)
def test_an_unknown_card_is_answered_with_a_similar_one(name: str, card: str) -> None:
    with pytest.raises(RecipeError, match=rf"is unknown \(did you mean {card}"):
        find_target(name)


@pytest.mark.parametrize("name", ["RTX 9090", "x", "4090x", "cuda:0", "24 parsecs"])
def test_an_unknown_device_is_not_several(name: str) -> None:
    with pytest.raises(RecipeError, match="is unknown"):
        find_target(name)
