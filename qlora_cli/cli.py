"""The command line: one function per command. Torch is imported by the commands that need it."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli import __version__
from qlora_cli.adapter_text import combine_text, diff_text, inspect_text, list_text
from qlora_cli.errors import QloraError
from qlora_cli.recipe_file import dump_with_origins, load_recipe
from qlora_cli.report_text import (
    cache_text,
    evaluation_table,
    export_text,
    generate_text,
    merge_text,
    run_text,
)
from qlora_cli.types import GGUF_KINDS

log = logging.getLogger("qlora")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

adapters_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="What adapters are, how they differ, and several made into one.",
)
app.add_typer(adapters_app, name="adapters")


def _set_level(quiet: bool | None) -> None:
    if quiet is not None:
        log.setLevel(logging.WARNING if quiet else logging.DEBUG)


def _decoded(overrides: list[str]) -> list[str]:
    # Under LC_ALL=C the arguments reach us as ASCII, other bytes escaped.
    return [os.fsencode(override).decode("utf-8", "replace") for override in overrides]


def _decoded_text(text: str | None) -> str | None:
    return None if text is None else _decoded([text])[0]


def _known_kinds(kinds: list[str]) -> list[str]:
    if unknown := sorted(set(kinds) - set(GGUF_KINDS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(GGUF_KINDS)}")
    return kinds


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        default_factory=list,
        show_default=False,
        callback=_decoded,
        help="Another value for a key, such as adapter.r=8 (can be given more than once).",
    ),
]
WeightsOption = Annotated[
    Literal["last", "best"],
    typer.Option(
        "--weights",
        metavar="last|best",
        help="After the last step, or at the lowest evaluation loss.",
    ),
]
GgufOption = Annotated[
    list[str],
    typer.Option(
        "--gguf",
        metavar="KIND",
        default_factory=list,
        show_default=False,
        callback=_known_kinds,
        help=f"Write a GGUF file too: {', '.join(GGUF_KINDS)} (can be given more than once).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Prepare the data anew, and keep none of it.")
]
Quiet = Annotated[
    bool | None,
    typer.Option(
        "--quiet/--verbose",
        "-q/-v",
        callback=_set_level,
        help="Say less, or more, on the way (on stderr).",
    ),
]
Version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
]

ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        callback=_decoded_text,
        help="Folder of a run, an adapter or a model; a recipe, GGUF file or hub id.",
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        default_factory=list,
        show_default=False,
        callback=_decoded,
        help="A run or adapter over the same base in memory (can be given more than once).",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        callback=_decoded_text,
        help="The system message, in place of the recipe's.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", metavar="T", min=0, help="0 (the default) takes the likeliest token."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", metavar="P", min=0, max=1, help="Draw among the likeliest of this probability."
    ),
]
TopK = Annotated[
    int, typer.Option("--top-k", metavar="K", min=0, help="Draw among so many; 0 is all.")
]
MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer (512)."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Fixes what is drawn (0).")]
AdapterPath = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Folder of a run or of an adapter.")
]


@app.callback()
def qlora(version: Version = False, quiet: Quiet = None) -> None:
    """Fine-tune language models from one YAML recipe.

    \b
    Example:
      qlora validate recipe.yaml                  # every value, and where it comes from
      qlora preview recipe.yaml                   # what the model will see
      qlora train recipe.yaml                     # the run is written to output.dir
      qlora eval runs/mine                        # base and tuned model on held-out rows
      qlora merge runs/mine --output models/mine  # a plain model folder
      qlora chat runs/mine                        # talk to it

    Results go to stdout, progress and errors to stderr.

    \b
    Exit codes:
      0    done
      1    an error of ours: please report it
      2    the command line, the recipe or the data cannot be used
      3    the model cannot be found, loaded, adapted or merged
      4    training stopped before its end, or its result cannot be trusted
      130  interrupted (Ctrl-C)
    """


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in output.dir.")
    ] = False,
    no_cache: NoCache = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Train, and write the run to output.dir.

    --json prints the record of the run, which is also its run.json.

    \b
    Example:
      qlora train recipe.yaml --set training.max_steps=100 --set output.dir=runs/short
    """
    loaded = load_recipe(recipe, overrides)
    from qlora_cli.train import train

    report = train(loaded.recipe, resume=resume, use_cache=not no_cache, origins=loaded.origins)
    _show(report, as_json, run_text(loaded.recipe.output.dir, report))


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A run, a model folder, or a recipe.")
    ],
    overrides: Overrides,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="NAME,...", help="Only these (loss, and names or types of tasks)."
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="RUN_OR_MODEL", help="Measure beside this, not the base."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="RECIPE", help="What to ask a model folder."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option("--records", metavar="FILE", help="Write prompts and answers to this file."),
    ] = None,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Measure a run beside its base model, on held-out rows and by its tasks.

    Each figure has its 95% interval, and so has the paired difference between the two models. Of a
    recipe the base model is measured alone. A run that is measured as its recipe says keeps the
    figures (run.json) and prompts, references, answers and scores (answers.jsonl). --json prints
    target, compare, weights, models (name, measure, then value, low and high), differences,
    measures, confidence, resamples and records.

    \b
    Example:
      qlora eval runs/mine
      qlora eval runs/mine --tasks loss,exact_match --records answers.jsonl
      qlora eval runs/mine --compare runs/other
      qlora eval models/mine --recipe runs/mine/recipe.yaml
      qlora eval runs/mine --set data.evaluation.path=other.jsonl
    """
    from qlora_cli.evaluate import evaluate

    report = evaluate(
        target,
        overrides,
        weights=weights,
        tasks=tasks and [name.strip() for name in tasks.split(",")],
        compare=compare,
        recipe=recipe,
        records=records,
    )
    _show(report, as_json, evaluation_table(report))


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder to make; it must not exist.")
    ],
    overrides: Overrides,
    gguf: GgufOption,
    base: Annotated[
        Literal["as-trained", "original"] | None,
        typer.Option(
            "--base",
            metavar="as-trained|original",
            help="Add the update to the weights as they were trained against, dequantized (the "
            "default where the run was quantized), or to those of the base's files.",
        ),
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Load what was written and compare its logits too, where memory allows.",
        ),
    ] = True,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Write a plain model: base plus adapter, tensor by tensor.

    What was written is proved before this says it is done: each weight by itself, then the logits
    of the loaded model. --json prints what is also written to DIR/merge.json; with --gguf
    also gguf, as `qlora export` does.

    \b
    Example:
      qlora merge runs/mine --output models/mine
      qlora merge runs/mine --output models/mine --base original
      qlora merge runs/mine --output models/mine --gguf q8_0 --gguf q4_k_m
      qlora merge runs/mine --output models/mine --set model.path=where/the/base/is/now
    """
    from qlora_cli.export import export
    from qlora_cli.export_gguf import require_gguf_tools
    from qlora_cli.merge import merge

    require_gguf_tools(gguf)  # merging may take long
    report = merge(run, output, overrides, weights=weights, base=base, with_logits=logits)
    text = merge_text(report)
    if gguf:
        exported = export(output, gguf=gguf)
        report, text = {**report, "gguf": exported["gguf"]}, f"{text}\n{export_text(exported)}"
    _show(report, as_json, text)


@app.command("export")
def export_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that merge wrote.")],
    gguf: GgufOption,
    bnb_4bit: Annotated[
        Path | None,
        typer.Option(
            "--bnb-4bit", metavar="DIR", help="Folder to make, with the weights packed into NF4."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="RUN", help="Compare the 4-bit model with this run's, as trained."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Write other forms of a model: GGUF files, 4-bit weights of bitsandbytes.

    GGUF files are written into the folder of the model by llama.cpp's converter, which must be on
    the PATH, and are loaded and compared by llama-cpp-python where that is installed. --json prints
    model, gguf (for each file path, kind, bytes, seconds and check) and bnb_4bit (path, bytes, kl,
    top1_agreement and trained).

    \b
    Example:
      qlora export models/mine --gguf q8_0 --gguf q4_k_m
      qlora export models/mine --bnb-4bit models/mine-4bit --run runs/mine
    """
    from qlora_cli.export import export

    report = export(model, gguf=gguf, bnb_4bit=bnb_4bit, run=run)
    _show(report, as_json, export_text(report))


@app.command()
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
        bool, typer.Option("--json", help="Print one JSON object a line for each answer.")
    ] = False,
    quiet: Quiet = None,
) -> None:
    """Talk to a model, and let adapters over one base take turns.

    At a terminal, /help lists the commands: /swap, /base, /compare, /reset, /quit. Ctrl-C ends an
    answer, Ctrl-D the chat. In a pipe each line of standard input is a message (or a command), and
    answers alone go to stdout; what is wrong ends it. --json prints model, message, answer,
    num_tokens and ended (stop, length).

    \b
    Example:
      qlora chat runs/mine --temperature 0.7 --top-p 0.9
      qlora chat recipe.yaml --adapter legal=runs/legal --adapter short=runs/short
      echo "What is the capital of France?" | qlora chat runs/mine -q
    """
    from qlora_cli.chat import chat
    from qlora_cli.generate import Sampling

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    chat(
        target,
        overrides,
        weights=weights,
        adapters=adapters,
        system=system,
        sampling=sampling,
        as_json=as_json,
    )


@app.command()
def generate(
    target: ModelPath,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Rows with messages, conversations, instruction, prompt or text, or in the "
            "format of the run's recipe; or lines of text.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="The answers, one JSON object a line.")
    ],
    overrides: Overrides,
    adapters: Adapters,
    system: System = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts at once (8).")
    ] = 8,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Answer all prompts of a file.

    A line has place, prompt (what was asked), answer, reference (the row's own answer), num_tokens
    and ended (stop, length). An answer that is drawn depends on the seed and on the place of its
    row, and not on the batch. --json prints output, model, prompts, tokens, unfinished and seconds.

    \b
    Example:
      qlora generate runs/mine --prompts questions.jsonl --output answers.jsonl
    """
    from qlora_cli.generate import Sampling, generate

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    report = generate(
        target,
        prompts,
        output,
        overrides,
        weights=weights,
        adapters=adapters,
        system=system,
        sampling=sampling,
        batch_size=batch_size,
    )
    _show(report, as_json, generate_text(report))


@app.command()
def validate(
    recipe: RecipePath, overrides: Overrides, as_json: Json = False, quiet: Quiet = None
) -> None:
    """Check a recipe, and print all its values.

    Beside each value stands where it comes from: a line of the recipe, of a recipe that it extends,
    --set, or the default. No model or data is opened. --json prints recipe (the values) and
    origins (the place of each dotted key).

    \b
    Example:
      qlora validate recipe.yaml --set adapter.r=8
    """
    loaded = load_recipe(recipe, overrides)
    values = loaded.recipe.model_dump(mode="json")
    _show({"recipe": values, "origins": loaded.origins}, as_json, dump_with_origins(loaded))


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", metavar="N", min=1, help="Rows to show of each source (3; with --json all)."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Only rows of train, evaluation, train.0 ..."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one HTML page, and print no text."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each row.")
    ] = False,
    no_cache: NoCache = False,
    quiet: Quiet = None,
) -> None:
    """Show what the model will see, and what in the data is often a mistake.

    Rows are prepared as for training; no weights are opened. Learnt tokens are told from the others
    by colour, or by marks where there is none (NO_COLOR is heeded). A limit of data.audit that is
    crossed is an error here too, after the report. --json prints source, row (its place),
    input_ids, labels and text of each row.

    \b
    Example:
      qlora preview recipe.yaml --rows 1
      qlora preview recipe.yaml --html preview.html
      qlora preview recipe.yaml --json --source train > rows.jsonl
    """
    loaded = load_recipe(recipe, overrides)
    from qlora_cli.preview import preview

    found = preview(loaded.recipe, source=source, use_cache=not no_cache)
    if as_json:
        for row in found.rows(rows):
            typer.echo(json.dumps(row, ensure_ascii=False))
    if html is not None:
        found.write_page(html, rows or 3, title=f"Preview of {recipe.name}")
    if html is None and not as_json:
        typer.echo(found.text(rows or 3, colour=_is_coloured()))
    found.check()


@app.command("cache")
def show_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """List the prepared data that is kept for later runs.

    It is found by its content: what other data, another tokenizer or other settings would make is
    never taken for it. It lies in $QLORA_CACHE, else ~/.cache/qlora. --json prints folder, paths,
    num_rows, size (bytes) and used (seconds since 1970) of each set.

    \b
    Example:
      qlora cache --clear
    """
    from qlora_cli.data import cache

    report = {"cleared": clear, "sets": [one.record() for one in cache.list_sets(clear=clear)]}
    _show(report, as_json, cache_text(report))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes.

    \b
    Example:
      qlora schema > recipe.schema.json

    \b
    Editors with a YAML language server use it when a recipe begins with this line:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from qlora_cli.recipe_schema import recipe_schema

    _show(recipe_schema(), True, "")


@adapters_app.command("list")
def list_adapters(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to look in.")],
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """List the adapters under a folder, those of runs among them.

    --json prints folder and adapters: path, base, type, r, alpha, target_modules, bytes, steps and
    best of each.

    \b
    Example:
      qlora adapters list runs
    """
    from qlora_cli.adapter_tools import list_adapters

    report = list_adapters(folder)
    _show(report, as_json, list_text(report))


@adapters_app.command("inspect")
def inspect_adapter(adapter: AdapterPath, as_json: Json = False, quiet: Quiet = None) -> None:
    """Say what an adapter is, and how much it changes which weights.

    For each kind of module and each layer: the norm of the updates (scale B A), the largest of
    their singular values, and the mean of their effective ranks. --json has all modules.

    \b
    Example:
      qlora adapters inspect runs/mine
    """
    from qlora_cli.adapter_tools import inspect

    report = inspect(adapter)
    _show(report, as_json, inspect_text(report))


@adapters_app.command("diff")
def diff_adapters(
    first: AdapterPath, second: AdapterPath, as_json: Json = False, quiet: Quiet = None
) -> None:
    """Say how two adapters of one base differ, weight by weight.

    Cosine of the updates; the second norm over the first; norm of the difference over the first
    norm. --json prints first, second, settings (those that differ), cosine, norm_ratio, distance,
    modules, only_first and only_second.

    \b
    Example:
      qlora adapters diff runs/mine runs/other
    """
    from qlora_cli.adapter_tools import diff

    report = diff(first, second)
    _show(report, as_json, diff_text(report))


@adapters_app.command("combine")
def combine_adapters(
    paths: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of runs or adapters.")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder to make; it must not exist.")
    ],
    overrides: Overrides,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Of PEFT's: cat, linear, svd, ties, dare_linear, dare_ties, magnitude_prune, or "
            "the last four with _svd.",
        ),
    ] = "cat",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One for each; else equal, 1 in all."),
    ] = None,
    density: Annotated[
        float,
        typer.Option(
            "--density",
            metavar="D",
            min=0,
            max=1,
            help="Share of values kept by ties, dare ... (0.5).",
        ),
    ] = 0.5,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", min=1, help="Of the outcome, for svd methods."),
    ] = None,
    seed: Seed = 0,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Leave out the evaluation beside the parents.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Make one adapter of several.

    cat is the weighted sum itself, with the ranks added up; svd is the nearest to it of a given
    rank; the others are approximations. How far the outcome is from the weighted sum is printed.
    It is written as an adapter folder with the recipe of the first run among the parents, which
    chat, eval and merge take as they take a run. If that recipe has something to evaluate on
    (--set data.evaluation.path=...), the outcome is measured beside each parent. --json prints
    output, adapters, weights, method, density, rank, seed, norm, error and evaluations.

    \b
    Example:
      qlora adapters combine runs/a runs/b --weights 0.7,0.3 --output runs/a-and-b
    """
    from qlora_cli.adapter_tools import combine, read_weights

    report = combine(
        paths,
        output,
        overrides,
        method=method,
        weights=read_weights(weights),
        density=density,
        rank=rank,
        seed=seed,
        measure=not no_eval,
    )
    _show(report, as_json, combine_text(report))


def _is_coloured() -> bool:
    # https://no-color.org
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _show(report: Mapping[str, object], as_json: bool, text: str) -> None:
    # Of several processes that train together, one speaks.
    if os.environ.get("RANK", "0") == "0":
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else text.rstrip())


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line (by default the one of this process) and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        app(args=args, prog_name="qlora")
    except QloraError as error:
        typer.echo(f"error: {error}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    finally:
        log.removeHandler(handler)
