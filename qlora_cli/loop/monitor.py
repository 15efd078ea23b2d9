"""What is done when numbers say that training goes wrong, or when memory ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

from torch.amp import GradScaler
from torch.optim import Optimizer

from qlora_cli.common.formatting import size_text
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.distributed.world import World, is_out_of_memory
from qlora_cli.errors import OutOfMemory, TrainingError
from qlora_cli.models.report import held_bytes
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.recipe.schema import SpikeDetection, Training
from qlora_cli.runs.checkpoint import random_states, set_random_states
from qlora_cli.types import Batch, TrainState

log = logging.getLogger("qlora")

_FEWEST = 5
"""Losses of which a median says something."""
_SHORTEST = 8
"""The least that `data.max_length` may be."""
_NAMED = 8
"""Rows that a message names."""


class TrainingMonitor:
    """Watches the steps of a run.

    Args:
        objective: the loss, as it is before ranks share it: to find out which rows are at fault.
        place: where the row of an example stands, by its index: `train.jsonl:17`.
        max_length: tokens that a row has at most.
        is_packed: whether rows are filled with examples up to that.
        go_back: puts the last checkpoint in place, and its state into the one that is given.
    """

    def __init__(
        self,
        settings: Training,
        *,
        objective: TokenLoss,
        optimizer: Optimizer,
        scaler: GradScaler,
        batches: BatchStream,
        world: World,
        place: Callable[[int], str],
        max_length: int,
        is_packed: bool,
        go_back: Callable[[TrainState], None],
    ) -> None:
        self._settings = settings
        self._objective = objective
        self._optimizer = optimizer
        self._scaler = scaler
        self._batches = batches
        self._world = world
        self._place = place
        self._max_length = max_length
        self._is_packed = is_packed
        self._go_back = go_back
        self._is_updating = False
        optimizer.register_step_pre_hook(lambda *_: self._set_updating(True))
        optimizer.register_step_post_hook(lambda *_: self._set_updating(False))

    def goes_back(self, metrics: Mapping[str, float], state: TrainState) -> bool:
        """Look at the step that was just done.

        Returns:
            Whether the run was put back to an earlier step, so that this one is of no account.

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
        state.recent_losses, state.high_steps = [], 0  # what comes next is judged by itself
        if spike.action == "warn":
            log.warning("%s", what)
            return False
        if state.returns == spike.returns:
            raise TrainingError(
                f"{what}; the run went back {state.returns} times before",
                hint="try a lower optimizer.learning_rate, or look at the rows that are named",
            )
        self._pass_over(what, state)
        return True

    @contextmanager
    def out_of_memory(
        self, state: TrainState, save: Callable[[TrainState], None]
    ) -> Iterator[None]:
        """Save what was learnt before the step in here, should memory end in it.

        Raises:
            OutOfMemory: with what was in memory, and what to change.
        """
        generators = random_states()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            batches = self._batches.micro_batches(state.position)
            message, hint = self._describe(state, batches), self._advise(batches)
        else:
            return
        # The error is gone by now, and with it the tensors that its frames held.
        self._optimizer.zero_grad(set_to_none=True)
        set_random_states(generators)
        self._world.free_memory()
        saved = "nothing had been learnt yet"
        if self._is_updating or self._world.size > 1:
            saved = "what was learnt since the last checkpoint is lost"
        elif state.step:
            save(state)
            saved = f"the {state.step} steps before it are saved"
        raise OutOfMemory(f"{message}; {saved}", hint=hint)

    def _report_bad_step(self, metrics: Mapping[str, float], state: TrainState) -> None:
        what = f"the loss is {metrics['loss']}, the gradient's norm {metrics['grad_norm']}"
        if self._scaler.is_enabled() and math.isfinite(metrics["loss"]):
            scale = self._scaler.get_scale()
            if scale >= 1:  # fp16 looks for its scale in this way; below 1 it has found none
                log.info("step %d: too large for fp16, not applied; scale %g", state.step, scale)
                return
        state.bad_steps += 1
        dtype = str(self._objective.dtype).removeprefix("torch.")
        what = (
            f"step {state.step} (in {dtype}): {what}; it was not applied; "
            f"rows: {self._names(self._culprits(state.position - 1))}"
        )
        if state.bad_steps < self._settings.max_bad_steps:
            log.warning("%s", what)
            return
        raise TrainingError(
            f"{what}. That is {state.bad_steps} in a row (training.max_bad_steps); what was saved "
            "before is untouched, and weights or losses that are not finite are never saved",
            hint="try a lower optimizer.learning_rate, more schedule.warmup_steps, or "
            "training.precision bf16 in place of fp16",
        )

    def _pass_over(self, what: str, state: TrainState) -> None:
        failed, position, returns = state.step, state.position, state.returns
        self._go_back(state)
        state.returns = returns + 1
        state.passed_over = position - state.step
        log.warning(
            "%s. Back to step %d; the rows of %d steps are passed over",
            what,
            state.step,
            failed - state.step,
        )

    def _culprits(self, step: int) -> list[int]:
        """The examples whose own loss is not finite; all of the step if each of them has one."""
        was_training = self._objective.training
        self._objective.eval()
        found = [
            example
            for batch in self._batches.micro_batches(step)
            for example in self._damaging(batch)
        ]
        self._objective.train(was_training)
        gathered = sorted({example for each in self._world.gather(found) for example in each})
        return gathered or self._rows(step)

    def _damaging(self, batch: Batch) -> list[int]:
        losses = self._objective.of_rows(batch.to(self._world.device)).tolist()
        if batch.documents:  # all examples are in one row
            rows = [row for row in batch.examples if not math.isfinite(losses[0])]
        else:
            pairs = zip(batch.examples, losses[: len(batch.examples)], strict=True)
            rows = [row for row, loss in pairs if not math.isfinite(loss)]
        return [example for row in rows for example in row]

    def _rows(self, step: int) -> list[int]:
        return [example for row in self._batches.rows(step) for example in row]

    def _names(self, examples: list[int]) -> str:
        named = ", ".join(self._place(example) for example in examples[:_NAMED])
        more = len(examples) - _NAMED
        return f"{named} and {more} more" if more > 0 else named

    def _set_updating(self, value: bool) -> None:
        self._is_updating = value

    def _describe(self, state: TrainState, batches: list[Batch]) -> str:
        shapes = ", ".join(
            f"{batch.input_ids.shape[0]} x {batch.input_ids.shape[1]}" for batch in batches[:_NAMED]
        )
        held = held_bytes(self._objective.model, self._optimizer)
        rest = max(0, self._world.peak_memory_bytes() - sum(held.values()))
        parts = ", ".join(
            f"{name} {size_text(size)}"
            for name, size in {**held, "activations, logits and the rest": rest}.items()
        )
        return (
            f"out of memory in step {state.step + 1}, of micro-batches with {shapes} tokens. At "
            f"the peak it held: {parts}"
        )

    def _advise(self, batches: list[Batch]) -> str:
        settings, advice = self._settings, []
        if settings.rows_per_forward > 1:
            advice.append(
                f"--set training.micro_batch_size={_half(settings)} (the batch, and so the result, "
                "stays the same)"
            )
        if not settings.gradient_checkpointing:
            advice.append("--set training.gradient_checkpointing=true")
        length = shorter(batches, max_length=self._max_length, is_packed=self._is_packed)
        if length is not None:
            advice.append(f"--set data.max_length={length}")
        if not advice:
            return "qlora plan RECIPE --fit looks for the least harmful changes with which it fits"
        return " and ".join(advice[:2])


def shorter(batches: Sequence[Batch], *, max_length: int, is_packed: bool) -> int | None:
    """A `data.max_length` with which the largest of these micro-batches would be about half as
    large; None if there is none.

    Args:
        batches: examples that lie end to end make one row of them, longer than `max_length`.
        is_packed: rows are as long as `max_length` lets them be.
    """
    # Padded rows are as long as the longest of them.
    longest = max(max(batch.documents, default=batch.input_ids.shape[1]) for batch in batches)
    length = (max_length if is_packed else min(longest, max_length)) // 2
    return length if length >= _SHORTEST else None


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Whether a step can be applied: its loss and its gradient are numbers."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def _is_spike(spike: SpikeDetection, loss: float, state: TrainState) -> bool:
    known = state.recent_losses
    if len(known) < min(spike.window, _FEWEST) or loss <= spike.factor * median(known):
        state.recent_losses, state.high_steps = [*known, loss][-spike.window :], 0
        return False
    state.high_steps += 1
    return state.high_steps == spike.steps


def _half(settings: Training) -> int:
    """The largest smaller micro-batch of which the batch is a multiple."""
    sizes = range(settings.rows_per_forward // 2, 0, -1)
    return next(size for size in sizes if settings.batch_size % size == 0)
