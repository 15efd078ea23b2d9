"""Complete all prompts of a file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.progress import Progress
from qlora_cli.common.report import Report
from qlora_cli.data.prompts import read_questions
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inference.sampling import Completion, Sampling
from qlora_cli.inference.session import InferenceSession
from qlora_cli.models.context import check_prompts


@dataclass(frozen=True, slots=True)
class GenerationReport(Report):
    """Completions of all prompts of a file."""

    output: str
    """The file that was written."""
    model: str
    """Name of the model that answered: `base` or `tuned`, or the name of an adapter."""
    prompts: int
    """Number of prompts."""
    tokens: int
    """Number of generated tokens; stop tokens are not counted."""
    unfinished: int
    """Number of completions that reached `--max-new-tokens`, or filled the context, before a stop
    token."""
    seconds: float
    """Time spent generating."""


def refuse_existing(output: Path) -> None:
    """Raise RecipeError if the output file exists. Call it before loading a model."""
    if output.exists():
        raise RecipeError(f"--output: {output} exists", hint="choose another file, or remove it")


def generate(
    session: InferenceSession,
    prompts: Source,
    output: Path,
    *,
    sampling: Sampling,
    batch_size: int,
    system: str | None = None,
) -> GenerationReport:
    """Complete every row of a file and write one JSON line per row, in the order of the file.

    Args:
        system: system message for conversations without one.

    Raises:
        DataError: a row has no prompt, or a prompt does not fit into a context whose positions are
            a table.
    """
    model = session.default
    rows = read_questions(prompts, model.encoder, session.reader(system))
    check_prompts([row.prompt for row in rows], model.context)
    started = time.monotonic()
    progress = Progress("completions", len(rows))
    found: dict[int, Completion] = {}
    with session.use(model) as generator:
        for index, completion in generator.complete(
            [row.prompt for row in rows], sampling, batch_size=batch_size
        ):
            found[index] = completion
            progress.add(1)
    lines = [
        {
            "place": row.prompt.place,
            "prompt": row.prompt.text,
            "answer": found[index].text,
            "reference": row.reference,
            "num_tokens": found[index].num_tokens,
            "ended": found[index].ended,
        }
        for index, row in enumerate(rows)
    ]
    write_lines(output, lines)
    return GenerationReport(
        output=str(output),
        model=model.name,
        prompts=len(rows),
        tokens=sum(one.num_tokens for one in found.values()),
        unfinished=sum(one.ended == "length" for one in found.values()),
        seconds=round(time.monotonic() - started, 1),
    )


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line.

    Raises:
        DataError: the file cannot be written.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        replace_file(path, text)
    except OSError as error:
        raise DataError(f"--output: {path}: {error.strerror or error}") from error
