"""Answers to prompts: greedy or drawn, in batches or as they come; and those to a whole file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_cli.common.atomic_files import replace_file
from qlora_cli.common.progress import Progress
from qlora_cli.data.prompts import read_questions
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inference.sampling import Answer, Sampling, answers
from qlora_cli.inference.session import open_session

if TYPE_CHECKING:
    pass


def generate(
    target: str,
    prompts: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    weights: Literal["last", "best"],
    adapters: Sequence[str] = (),
    system: str | None = None,
    sampling: Sampling,
    batch_size: int,
) -> dict[str, Any]:
    """Answer every row of a file, and write a line of JSON for each, in their order.

    Returns:
        {"output", "model", "prompts", "tokens", "unfinished", "seconds"}: `unfinished` answers did
        not end before `max_new_tokens`.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    if output.exists():
        raise RecipeError(f"--output: {output} exists", hint="choose another file, or remove it")
    session = open_session(target, overrides, weights=weights, adapters=adapters)
    voice = session.first
    questions = read_questions(
        prompts, voice.encoder, formats=session.formats, is_plain=session.is_plain, system=system
    )
    for question in questions:
        session.refuse_longer(question.prompt)
    started = time.monotonic()
    progress = Progress("answers", len(questions))
    found: dict[int, Answer] = {}
    with session.speaking(voice) as model:
        for index, one in answers(
            model,
            [question.prompt for question in questions],
            voice.tokenizer,
            stop_token_ids=voice.stop_token_ids,
            sampling=sampling,
            batch_size=batch_size,
            dtype=session.dtype,
            device=session.device,
        ):
            found[index] = one
            progress.add(1)
    lines = [
        {
            "place": question.prompt.place,
            "prompt": question.prompt.text,
            "answer": found[index].text,
            "reference": question.reference,
            "num_tokens": found[index].num_tokens,
            "ended": found[index].ended,
        }
        for index, question in enumerate(questions)
    ]
    _write_lines(output, lines)
    return {
        "output": str(output),
        "model": voice.name,
        "prompts": len(questions),
        "tokens": sum(one.num_tokens for one in found.values()),
        "unfinished": sum(one.ended == "length" for one in found.values()),
        "seconds": round(time.monotonic() - started, 1),
    }


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        replace_file(path, text)
    except OSError as error:
        raise DataError(f"--output: {path}: {error.strerror or error}") from error
