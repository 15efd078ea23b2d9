"""Check that the disk has room for what a run will keep, before it trains for hours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.common.formatting import size_text
from qlora_cli.errors import TrainingError


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """Bytes that a run writes. Tokenizers, cards and logs are small and not counted."""

    weights: int
    """Bytes of the trained weights, as `last` and `best` hold them."""
    state: int
    """Bytes of the optimizer's states."""
    keep: int
    """Number of checkpoints kept (`output.keep_checkpoints`)."""
    saves: int
    """Number of checkpoints written in all."""
    has_best: bool
    """The best weights are kept too."""

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return self.weights + self.state

    def peak(self, keep: int) -> int:
        """Return the most bytes in use: a checkpoint is written before an old one is removed."""
        return self.checkpoint * min(keep + 1, self.saves) + self.weights * (1 + self.has_best)

    def require(self, free: int, folder: Path) -> None:
        """Raise TrainingError if more than `free` bytes are needed on the disk of `folder`.

        Args:
            free: bytes, including those that the run already uses.
        """
        if self.peak(self.keep) <= free:
            return
        copies = "last and best" if self.has_best else "last"
        hint = "free some space, or write to another disk (--set output.dir=...)"
        if self.peak(1) <= free:
            hint += f"; --set output.keep_checkpoints=1 needs only {size_text(self.peak(1))}"
        raise TrainingError(
            f"output.dir: {folder} has room for {size_text(free)}, and the run needs "
            f"{size_text(self.peak(self.keep))}: {min(self.keep + 1, self.saves):,} checkpoints of "
            f"{size_text(self.checkpoint)} (output.keep_checkpoints is {self.keep:,}, and "
            f"one more while it is written), and {copies} weights of "
            f"{size_text(self.weights)} each",
            hint=hint,
        )


def count_saves(max_steps: int, save_every: int | None) -> int:
    """Count the checkpoints of a run: one every `save_every` steps, and one after the last."""
    return 1 if save_every is None else math.ceil(max_steps / save_every)
