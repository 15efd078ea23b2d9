"""React when the numbers of a step go wrong, or when memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.common.formatting import first_names, size_text
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.distributed.world import is_out_of_memory
from qlora_cli.errors import OutOfMemory, TrainingError
from qlora_cli.loop.setup import Setup
from qlora_cli.models.context import context_of
from qlora_cli.models.report import held_bytes
from qlora_cli.recipe.sections import SpikeDetection, Training
from qlora_cli.runs.checkpoint import random_states, set_random_states
from qlora_cli.types import Batch, TrainState

log = logging.getLogger("qlora")

_MIN_LOSSES = 5
"""Minimum number of losses for a running median."""
_MIN_LENGTH = 8
"""Smallest value of `data.max_length`."""
_MAX_NAMED = 8
"""Maximum number of rows that a message names."""


class TrainingMonitor:
    """Watch the steps of a run for bad losses, spikes and lack of memory.

    Args:
        settings: `training.spike` and `training.max_bad_steps` decide what is done.
        row_name: returns the place of an example, such as `train.jsonl:17`, for its index.
        max_length: maximum number of tokens per row.
        is_packed: rows are filled with examples up to `max_length`.
        go_back: restores the newest checkpoint, and copies its state into the given one.
    """

    def __init__(
        self,
        setup: Setup[BatchStream],
        settings: Training,
        *,
        row_name: Callable[[int], str],
        max_length: int,
        is_packed: bool,
        go_back: Callable[[TrainState], None],
    ) -> None:
        self._setup = setup
        self._settings = settings
        self._row_name = row_name
        self._max_length = max_length
        self._is_packed = is_packed
        self._go_back = go_back
        self._is_updating = False
        setup.optimizer.register_step_pre_hook(lambda *_: self._set_updating(True))
        setup.optimizer.register_step_post_hook(lambda *_: self._set_updating(False))

    def rolls_back(self, metrics: Mapping[str, float], state: TrainState) -> bool:
        """Check the step that just ended, and roll back to a checkpoint if the loss has jumped.

        Returns:
            True if the run went back to an earlier step, so that this one does not count.

        Raises:
            TrainingError: too many steps in a row could not be applied, or the loss jumps again
                and again.
        """
        if not is_finite(metrics):
            self._report_bad_step(metrics, state)
            return False
        state.bad_steps = 0
        spike = self._settings.spike
        if spike is None or not _is_spike(spike, metrics["loss"], state):
            return False
        what = (
            f"step {state.step}: the loss has been above {spike.factor:g} times its running median "
            f"({median(state.recent_losses):.4g}) for {spike.steps} steps, and is now "
            f"{metrics['loss']:.4g}; rows: {self._names(self._rows(state.position - 1))}"
        )
        state.recent_losses, state.high_steps = [], 0  # the median starts again
        if spike.action == "warn":
            log.warning("%s", what)
            return False
        if state.returns == spike.returns:
            raise TrainingError(
                f"{what}; the run has already been rolled back {state.returns} times",
                hint="try a lower optimizer.learning_rate, or look at the rows that are named",
            )
        self._roll_back(what, state)
        return True

    @contextmanager
    def out_of_memory(
        self, state: TrainState, save: Callable[[TrainState], None]
    ) -> Iterator[None]:
        """Run a step; if memory runs out, save the steps before it.

        Raises:
            OutOfMemory: with what was in memory, and what to change.
        """
        generators = random_states()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            batches = self._setup.batches.micro_batches(state.position)
            message, hint = self._describe(state, batches), self._advise(batches)
        else:
            return
        # Outside of the `except` block, the error and the tensors in its frames have been freed.
        self._setup.optimizer.zero_grad(set_to_none=True)
        set_random_states(generators)
        self._setup.world.free_memory()
        saved = "no step was completed"
        if self._is_updating or self._setup.world.size > 1:
            saved = "the steps since the last checkpoint are lost"
        elif state.step:
            save(state)
            saved = f"the {state.step} steps before it are saved"
        raise OutOfMemory(f"{message}; {saved}", hint=hint)

    def _report_bad_step(self, metrics: Mapping[str, float], state: TrainState) -> None:
        what = f"the loss is {metrics['loss']}, the gradient's norm {metrics['grad_norm']}"
        if self._setup.scaler.is_enabled() and math.isfinite(metrics["loss"]):
            scale = self._setup.scaler.get_scale()
            if scale >= 1:  # this is how fp16 finds its scale; below 1 it has found none
                log.info("step %d: overflow in fp16, not applied; loss scale %g", state.step, scale)
                return
        state.bad_steps += 1
        dtype = str(self._setup.objective.dtype).removeprefix("torch.")
        what = (
            f"step {state.step} (in {dtype}): {what}; it was not applied; "
            f"rows: {self._names(self._bad_examples(state.position - 1))}"
        )
        if state.bad_steps < self._settings.max_bad_steps:
            log.warning("%s", what)
            return
        raise TrainingError(
            f"{what}. That is {state.bad_steps} in a row (training.max_bad_steps); earlier "
            "checkpoints are untouched, and weights that are not finite are never saved",
            hint="try a lower optimizer.learning_rate, more schedule.warmup_steps, or "
            "training.precision bf16 in place of fp16",
        )

    def _roll_back(self, what: str, state: TrainState) -> None:
        failed, position, returns = state.step, state.position, state.returns
        self._go_back(state)
        state.returns = returns + 1
        state.passed_over = position - state.step
        log.warning(
            "%s. Going back to step %d and skipping the rows of %d steps",
            what,
            state.step,
            failed - state.step,
        )

    def _bad_examples(self, step: int) -> list[int]:
        """Find the examples of a step whose own loss is not finite; if there are none, all."""
        objective, world = self._setup.objective, self._setup.world
        batches = self._setup.batches.micro_batches(step)
        prepared = objective.prepare(batches, world.device, world.sum)
        with eval_mode(objective):
            found = [example for batch in prepared for example in self._bad_examples_in(batch)]
        gathered = sorted({example for each in self._setup.world.gather(found) for example in each})
        return gathered or self._rows(step)

    def _bad_examples_in(self, batch: Batch) -> list[int]:
        losses = self._setup.objective.of_rows(batch.to(self._setup.world.device)).tolist()
        if batch.documents:  # all examples share one row
            rows = [row for row in batch.examples if not math.isfinite(losses[0])]
        else:
            pairs = zip(batch.examples, losses[: len(batch.examples)], strict=True)
            rows = [row for row, loss in pairs if not math.isfinite(loss)]
        return [example for row in rows for example in row]

    def _rows(self, step: int) -> list[int]:
        return [example for row in self._setup.batches.rows(step) for example in row]

    def _names(self, examples: list[int]) -> str:
        return first_names([self._row_name(example) for example in examples], _MAX_NAMED)

    def _set_updating(self, value: bool) -> None:
        self._is_updating = value

    def _describe(self, state: TrainState, batches: list[Batch]) -> str:
        sizes = [f"{batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}" for batch in batches]
        shapes = first_names(sizes, _MAX_NAMED)
        held = held_bytes(self._setup.objective.model, self._setup.optimizer)
        rest = max(0, self._setup.world.peak_memory_bytes() - sum(held.values()))
        parts = ", ".join(
            f"{name} {size_text(size)}"
            for name, size in {**held, "activations, logits and the rest": rest}.items()
        )
        return (
            f"out of memory in step {state.step + 1}, whose micro-batches are {shapes} tokens. "
            f"In memory at the peak: {parts}"
        )

    def _advise(self, batches: list[Batch]) -> str:
        settings, advice = self._settings, []
        if settings.fixed_micro_batch_size > 1:
            advice.append(
                f"--set training.micro_batch_size={_half(settings)} (the batch, and so the result, "
                "stays the same)"
            )
        if not settings.gradient_checkpointing:
            advice.append("--set training.gradient_checkpointing=true")
        length = halved_max_length(batches, max_length=self._max_length, is_packed=self._is_packed)
        context = context_of(self._setup.model)
        if length is not None:
            length = min(length, context.length) if context else length
            advice.append(f"--set data.max_length={length}")
        if not advice:
            return "qlora plan RECIPE --fit finds the least harmful changes that make it fit"
        return " and ".join(advice[:2])


def halved_max_length(batches: Sequence[Batch], *, max_length: int, is_packed: bool) -> int | None:
    """Return a `data.max_length` that halves the largest of these micro-batches; None if too small.

    Args:
        batches: padding-free ones hold all their examples in one row, longer than `max_length`.
        is_packed: rows are filled up to `max_length`.
    """
    # Padded rows are all as long as the longest.
    longest = max(max(batch.documents, default=batch.input_ids.shape[1]) for batch in batches)
    length = (max_length if is_packed else min(longest, max_length)) // 2
    return length if length >= _MIN_LENGTH else None


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Tell if a step can be applied: its loss and its gradient are finite."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def _is_spike(spike: SpikeDetection, loss: float, state: TrainState) -> bool:
    known = state.recent_losses
    if len(known) < min(spike.window, _MIN_LOSSES) or loss <= spike.factor * median(known):
        state.recent_losses, state.high_steps = [*known, loss][-spike.window :], 0
        return False
    state.high_steps += 1
    return state.high_steps == spike.steps


def _half(settings: Training) -> int:
    """Return the largest divisor of the batch that is at most half the micro-batch."""
    sizes = range(settings.fixed_micro_batch_size // 2, 0, -1)
    return next(size for size in sizes if settings.batch_size % size == 0)
