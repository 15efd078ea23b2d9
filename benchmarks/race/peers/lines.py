"""Shared by the peers' scripts. Runs in the peer's environment, so it imports nothing of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    """Read the job of the race from the file named on the command line."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def read_rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Read tokens and labels of each row, in training order."""
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def packs_per_step(rows: list[dict[str, list[int]]], rows_per_step: int, length: int) -> int:
    """Return how many packs of `length` have about as many tokens as `rows_per_step` rows."""
    tokens = sum(len(row["input_ids"]) for row in rows) / len(rows)
    return max(1, round(tokens * rows_per_step / length))


class Lines:
    """Write one JSON object per line, unbuffered: the race measures when it reads a line."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._path = Path(job["lines"])
        self._tokens = 0

    def loaded(self, model: Any) -> None:
        """Record that the model is ready for training."""
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._write(
            event="loaded",
            trained_weights=sum(p.numel() for _, p in trained),
            trained_dtypes=sorted({str(p.dtype).removeprefix("torch.") for _, p in trained}),
            # Equal where the adapters began equal.
            sum_of_a=sum(p.double().abs().sum().item() for n, p in trained if "lora_A" in n),
        )

    def step(self, loss: float, rows: list[dict[str, list[int]]]) -> None:
        """Record the end of a step that trained on these rows."""
        self._tokens += sum(len(row["input_ids"]) for row in rows)
        supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
        self._write(event="step", loss=loss, tokens_so_far=self._tokens, supervised=supervised)

    def _write(self, **facts: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def trainer_callback(lines: Lines, rows: list[dict[str, list[int]]], rows_per_step: int) -> Any:
    """Make a callback for a transformers Trainer that logs every step and takes rows in order.

    Args:
        rows: in the order of the forward passes; packed rows if the trainer packs.
    """
    from transformers import TrainerCallback

    class Tell(TrainerCallback):  # type: ignore[misc]  # untyped where transformers is absent
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lines.loaded(kwargs["model"])

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The last line summarises the training and does not report a step's loss.
            if "loss" in kwargs["logs"]:
                first = (state.global_step - 1) * rows_per_step
                lines.step(kwargs["logs"]["loss"], rows[first : first + rows_per_step])

    return Tell()
