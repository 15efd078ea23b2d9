"""Prompts with the answers of other rows, with which KTO estimates a divergence."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_cli.types import IGNORE_INDEX, Example


def rotated(numbers: Sequence[int], num_examples: int) -> list[int]:
    """Return another example for each example of a step: the one before it, around the step.

    Args:
        numbers: the examples of a step, in order, over all ranks.
        num_examples: size of the dataset: a step of one example takes another one from there.
    """
    if len(numbers) == 1:
        return [(numbers[0] - 1) % num_examples]
    return [numbers[at - 1] for at in range(len(numbers))]


def mismatched(example: Example, other: Example) -> Example:
    """Return the prompt of an example with the answer of another one, linked to the example."""
    start, begin = _start(example), _start(other)
    return Example(
        example.input_ids[:start] + other.input_ids[begin:],
        [IGNORE_INDEX] * start + other.labels[begin:],
        is_linked=True,
    )


def _start(example: Example) -> int:
    """Return the number of tokens before the first supervised one."""
    return next(at for at, label in enumerate(example.labels) if label != IGNORE_INDEX)
