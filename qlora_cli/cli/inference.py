"""Inference commands: chat, generate and predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli.options import (
    Adapters,
    Json,
    MaxNewTokens,
    ModelPath,
    Overrides,
    Quiet,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    WeightsOption,
    decoded_text,
    show,
    user_path,
)
from qlora_cli.inference.text import generate_text, predict_text

Delimiter = Annotated[
    str | None,
    typer.Option(
        "--delimiter",
        metavar="CHARACTER",
        callback=decoded_text,
        help="Column delimiter of a csv or tsv file (default: a comma, or a tab for tsv).",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="NAME,...",
        callback=decoded_text,
        help="Column names of a csv or tsv file without a header.",
    ),
]


def chat(
    target: ModelPath,
    overrides: Overrides,
    adapters: Adapters,
    system: System = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    weights: WeightsOption = "last",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per answer, one per line.")
    ] = False,
    quiet: Quiet = None,
) -> None:
    """Chat with a model, and switch between adapters over one base.

    At a terminal, /help lists the commands: /swap, /base, /compare, /reset, /quit. Ctrl-C ends an
    answer, Ctrl-D the chat. In a pipe, each line of stdin is a message or a command, only answers
    go to stdout, and the first error ends the chat. --json prints model, message, answer,
    num_tokens and ended (stop, length).

    \b
    Example:
      qlora chat runs/mine --temperature 0.7 --top-p 0.9
      qlora chat recipe.yaml --adapter legal=runs/legal --adapter short=runs/short
      echo "What is the capital of France?" | qlora chat runs/mine -q
    """
    from qlora_cli.inference.chat import chat
    from qlora_cli.inference.sampling import Sampling
    from qlora_cli.inference.session import open_session

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    session = open_session(target, overrides, weights=weights, adapters=adapters)
    chat(session, sampling, system=system, as_json=as_json)


def generate(
    target: ModelPath,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            parser=user_path,
            metavar="FILE",
            help="Rows with messages, conversations, instruction, prompt or text; rows in the "
            "format of the run's recipe; or lines of text.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            parser=user_path,
            metavar="FILE",
            help="File for the answers, one JSON object per line.",
        ),
    ],
    overrides: Overrides,
    adapters: Adapters,
    delimiter: Delimiter = None,
    columns: Columns = None,
    system: System = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts per batch (8).")
    ] = 8,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Answer every prompt in a file.

    A line has place (of the row), prompt, answer, reference (the row's own answer), num_tokens and
    ended (stop, length). A sampled answer depends on the seed and on the place of its row, not on
    the batch. An answer ends where the model's context is full; a warning counts those that were
    cut off. --json prints output, model, prompts, tokens, unfinished and seconds.

    \b
    Example:
      qlora generate runs/mine --prompts questions.jsonl --output answers.jsonl
      qlora generate runs/mine --prompts tickets.csv --delimiter ';' --output answers.jsonl
    """
    from qlora_cli.data.prompts import check_questions, prompt_source
    from qlora_cli.inference.batch import generate, refuse_existing
    from qlora_cli.inference.sampling import Sampling
    from qlora_cli.inference.session import check_one_model, open_session

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    refuse_existing(output)
    check_one_model(target, adapters)
    names = None if columns is None else columns.split(",")
    source = prompt_source(str(prompts), delimiter=delimiter, columns=names)
    session = open_session(
        target,
        overrides,
        weights=weights,
        adapters=adapters,
        before_loading=lambda make_reader: check_questions(source, make_reader(system)),
    )
    report = generate(
        session, source, output, sampling=sampling, batch_size=batch_size, system=system
    )
    show(report.to_json(), as_json, generate_text(report))


def predict(
    target: ModelPath,
    rows: Annotated[
        Path,
        typer.Option(
            "--rows",
            parser=user_path,
            metavar="FILE",
            help="Rows in the format of the run's recipe, with or without a label; or rows with "
            "text, messages, conversations or prompt.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            parser=user_path,
            metavar="FILE",
            help="File for the predictions, one JSON object per line.",
        ),
    ],
    overrides: Overrides,
    delimiter: Delimiter = None,
    columns: Columns = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Rows per batch (8).")
    ] = 8,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Predict the label or the score of every row in a file.

    For a model with a head that scores rows: objective classify or reward. A line has place (of the
    row), text (its last message) and reference (the row's own label); label and probabilities where
    a row has one label, labels and probabilities where it has any number, and value for a number or
    a reward. A row for a reward model is a prompt with its completion, or a whole conversation in
    messages. --json prints output, model, rows, cut and seconds.

    \b
    Example:
      qlora predict runs/mine --rows reviews.jsonl --output labels.jsonl
      qlora predict models/mine --rows reviews.csv --output labels.jsonl
    """
    from qlora_cli.data.prompts import prompt_source
    from qlora_cli.inference.batch import refuse_existing
    from qlora_cli.inference.predict import predict
    from qlora_cli.inference.session import open_session

    refuse_existing(output)
    names = None if columns is None else columns.split(",")
    source = prompt_source(str(rows), delimiter=delimiter, columns=names)
    session = open_session(target, overrides, weights=weights, scores_rows=True)
    report = predict(session, source, output, batch_size=batch_size)
    show(report.to_json(), as_json, predict_text(report))
