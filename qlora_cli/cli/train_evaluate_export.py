"""Commands that produce and evaluate models: train, bench, rerun, eval, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli.cli.options import (
    GgufOption,
    Json,
    NoCache,
    Overrides,
    Quiet,
    RecipePath,
    WeightsOption,
    path_text,
    show,
    user_path,
)
from qlora_cli.common.report import to_json
from qlora_cli.errors import EXIT_DIFFERENT
from qlora_cli.evaluate.text import harness_text
from qlora_cli.export.text import export_text
from qlora_cli.runs.evaluation_table import evaluation_table
from qlora_cli.runs.merge_report import merge_text
from qlora_cli.train.text import bench_text, rerun_text, run_text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def train(
    recipe: RecipePath,
    overrides: Overrides,
    allow: Annotated[
        list[str],
        typer.Option(
            "--allow",
            metavar="KEY",
            default_factory=list,
            show_default=False,
            help="With --resume, accept a new value for this key (repeatable). docs/runs.md lists "
            "the keys that can be allowed.",
        ),
    ],
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|STEP|PATH",
            callback=lambda text: text and path_text(text),
            help="Resume from a checkpoint in output.dir; auto is the newest intact one.",
        ),
    ] = None,
    no_cache: NoCache = False,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Train, and write the run to output.dir.

    --json prints the content of run.json.

    \b
    Example:
      qlora train recipe.yaml --set training.max_steps=100 --set output.dir=runs/short
      qlora train runs/short/recipe.yaml --resume auto
      qlora train recipe.yaml --resume auto --set optimizer.learning_rate=1e-5 \\
        --allow optimizer.learning_rate
    """
    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from qlora_cli.train.train import train

    report = train(
        loaded.recipe,
        resume=resume,
        allow=allow,
        use_cache=not no_cache,
        origins=loaded.origins,
    )
    show(report, as_json, run_text(loaded.recipe.output.dir, report))


def bench(
    recipe: RecipePath,
    overrides: Overrides,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps to train (6).")] = 6,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Measure the speed and memory of a few training steps. Nothing is kept.

    By default, only long runs compile kernels; training.kernels=compiled measures compiled ones.
    --json prints tokens_per_second (median, least, most), seconds_to_first_step, peak_memory_bytes,
    processor_seconds_per_1000_tokens, losses, kernels and the environment.

    \b
    Example:
      qlora bench recipe.yaml
      qlora bench recipe.yaml --set training.kernels=compiled --set training.micro_batch_size=8
    """
    from qlora_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from qlora_cli.train.benchmark import bench

    report = bench(loaded.recipe, steps=steps)
    show(report, as_json, bench_text(report))


def rerun(
    run: Annotated[
        Path, typer.Argument(parser=user_path, metavar="RUN", help="Folder of a finished run.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            parser=user_path,
            metavar="DIR",
            help="Folder of the new run (default: RUN-again).",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Repeat a run and compare the results bit for bit.

    The recipe is that of the run's record. First, changes since the run are listed: versions,
    hardware, base model, rows, and the git commit of the working directory. Then weights and
    metrics are compared: exit code 0 if all are equal, 7 if not. --json prints run, again, is_same,
    different (name: old, new), weights (is_same, largest_difference) and metrics (is_same, rows,
    first).

    \b
    Example:
      qlora rerun runs/mine
      qlora rerun runs/mine --output runs/once-more --json
    """
    from qlora_cli.train.reproduce import rerun

    report = rerun(run, output)
    show(report, as_json, rerun_text(report))
    if not report["is_same"]:
        raise typer.Exit(EXIT_DIFFERENT)


def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            parser=user_path, metavar="TARGET", help="A run, a model folder or a recipe."
        ),
    ],
    overrides: Overrides,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Evaluate only these: loss, and names or types of tasks.",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            parser=user_path,
            metavar="RUN_OR_MODEL",
            help="Compare with this instead of the base.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            parser=user_path,
            metavar="RECIPE",
            help="Recipe with the data and tasks, for a model folder.",
        ),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            parser=user_path,
            metavar="FILE",
            help="Write prompts and answers to this file.",
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="NAME,...",
            help="Run these tasks of lm-evaluation-harness instead of the recipe's.",
        ),
    ] = None,
    harness_path: Annotated[
        Path | None,
        typer.Option(
            "--harness-path",
            parser=user_path,
            metavar="DIR",
            help="Folder with more tasks for --harness (YAML files).",
        ),
    ] = None,
    harness_plain: Annotated[
        bool,
        typer.Option(
            "--harness-plain", help="Use the prompts of --harness without a chat template."
        ),
    ] = False,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Evaluate a run and its base model on held-out rows.

    Both answer the same rows and tasks. Each figure has a 95% interval, and so does the paired
    difference between the two models. For a recipe, only the base model is evaluated. If a run is
    evaluated as its recipe says, the figures are added to its run.json, and prompts, references,
    answers and scores to its answers.jsonl. --json prints target, compare, weights, models (name,
    measure, then value, low and high), differences, measures, confidence, resamples and records.

    With --harness, lm-evaluation-harness evaluates the tuned model only, with its tokenizer and
    chat template; evaluation.limit applies too. --json then prints target, weights, as_chat,
    harness (its version) and tasks (name, metric, value).

    \b
    Example:
      qlora eval runs/mine
      qlora eval runs/mine --tasks loss,exact_match --records answers.jsonl
      qlora eval runs/mine --compare runs/other
      qlora eval models/mine --recipe runs/mine/recipe.yaml
      qlora eval runs/mine --set data.evaluation.path=other.jsonl
      qlora eval runs/mine --harness hellaswag,arc_easy --set evaluation.limit=200
    """
    if harness is not None:
        if tasks or compare or records:
            raise typer.BadParameter("--harness excludes --tasks, --compare and --records")
        from qlora_cli.evaluate.lm_eval import evaluate_by_harness

        found = evaluate_by_harness(
            target, overrides, tasks=_names(harness), task_folder=harness_path,
            as_chat=not harness_plain, weights=weights, recipe=recipe,
        ).to_json()  # fmt: skip
        show(found, as_json, harness_text(found))
        return
    from qlora_cli.evaluate.evaluate import evaluate

    report = evaluate(
        target,
        overrides,
        weights=weights,
        tasks=tasks and _names(tasks),
        compare=compare,
        recipe=recipe,
        records=records,
    ).to_json()
    show(report, as_json, evaluation_table(report))


def merge(
    run: Annotated[Path, typer.Argument(parser=user_path, metavar="RUN", help="Folder of a run.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", parser=user_path, metavar="DIR", help="Folder to create; it must not exist."
        ),
    ],
    overrides: Overrides,
    gguf: GgufOption,
    base: Annotated[
        Literal["as-trained", "original"] | None,
        typer.Option(
            "--base",
            metavar="as-trained|original",
            help="Add the update to the dequantized weights that it was trained on (default for a "
            "quantized run), or to the original weights of the base.",
        ),
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits/--no-logits",
            help="Load the merged model and compare its logits, if memory allows.",
        ),
    ] = True,
    weights: WeightsOption = "last",
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Merge a run's adapter into its base model.

    The merge goes tensor by tensor and writes a plain model folder. The result is verified: first
    each weight, then the logits of the loaded model. --json prints the content of DIR/merge.json;
    with --gguf also gguf, as `qlora export` does.

    \b
    Example:
      qlora merge runs/mine --output models/mine
      qlora merge runs/mine --output models/mine --base original
      qlora merge runs/mine --output models/mine --gguf q8_0 --gguf q4_k_m
      qlora merge runs/mine --output models/mine --set model.path=where/the/base/is/now
    """
    from qlora_cli.export.export import export, require_gguf
    from qlora_cli.export.merge import merge

    require_gguf(run, gguf)  # before a merge, which may take long
    report = merge(run, output, overrides, weights=weights, base=base, with_logits=logits)
    found, text = report.to_json(), merge_text(report)
    if gguf:
        exported = export(output, gguf=gguf)
        found, text = {**found, "gguf": to_json(exported.gguf)}, f"{text}\n{export_text(exported)}"
    show(found, as_json, text)


def export_model(
    model: Annotated[
        Path,
        typer.Argument(parser=user_path, metavar="MODEL", help="A model folder written by merge."),
    ],
    gguf: GgufOption,
    bnb_4bit: Annotated[
        Path | None,
        typer.Option(
            "--bnb-4bit",
            parser=user_path,
            metavar="DIR",
            help="Folder to create, with weights packed into NF4.",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            parser=user_path,
            metavar="RUN",
            help="Compare the 4-bit model with this run's model.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = None,
) -> None:
    """Export a model to GGUF or 4-bit bitsandbytes weights.

    llama.cpp's converter, which must be on the PATH, writes GGUF files into the model folder. If
    llama-cpp-python is installed, they are loaded and compared. --json prints
    model, gguf (for each file path, kind, bytes, seconds and check) and bnb_4bit (path, bytes, kl,
    top1_agreement and trained).

    \b
    Example:
      qlora export models/mine --gguf q8_0 --gguf q4_k_m
      qlora export models/mine --bnb-4bit models/mine-4bit --run runs/mine
    """
    from qlora_cli.export.export import export

    report = export(model, gguf=gguf, bnb_4bit=bnb_4bit, run=run)
    show(report.to_json(), as_json, export_text(report))
