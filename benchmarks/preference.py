"""Compare preference training with TRL's DPOTrainer: speed, memory and held-out accuracy.

    python -m benchmarks.preference --model MODEL --train train.jsonl --held-out held_out.jsonl

The files have the columns `prompt`, `chosen` and `rejected`; `scripts/make_gsm8k_pairs.py` writes
such files. All sides train the same LoRA by DPO on the same pairs in the same order, as many per
step and per forward pass. Each run is a process of its own, and the runs take turns (A B A B), each
turn with a seed of its own. Time and peak memory are read from outside of the process at each step;
the first step and loading do not count. Afterwards one function evaluates all adapters on the
held-out pairs. Writes preference.json and, from it, preference.md.

QLORA_TRL_PYTHON names an interpreter with TRL and PEFT; without it, this one is used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quantization_curves import processor
from benchmarks.race.contestants import HERE as RACE
from benchmarks.race.contestants import IMPORTS, Contestant, Kind
from benchmarks.race.figures import Figures, of_run
from benchmarks.race.machine import MOST_BY_OTHERS
from benchmarks.race.process import environment, interpreter_mb, watch

ROOT = Path(__file__).resolve().parent.parent
TRL = os.environ.get("QLORA_TRL_PYTHON") or sys.executable
PACKAGES = ("torch", "transformers", "peft")

Pair = dict[str, Any]


@dataclass(frozen=True)
class Side(Contestant):
    """A trainer of pairs, with its settings."""

    dpo: Mapping[str, Any] = field(default_factory=dict)
    """Settings of TRL's DPOConfig."""

    def step(self, line: str) -> dict[str, float] | None:
        """Return loss and number of the step in a line; None for other lines."""
        told = json.loads(line)
        if "loss" not in told:
            return None
        # The same pairs on all sides, so their tokens are counted once, in `Work`.
        return {"loss": told["loss"], "tokens_so_far": 0, "supervised": 0}


SIDES = {
    one.name: one
    for one in [
        Side("ours", "ours", "activations kept"),
        Side("ours-lean", "ours", "activations recomputed", {"gradient_checkpointing": True}),
        Side("trl", "trl", "its default: activations recomputed"),
        Side("trl-keep", "trl", "activations kept", dpo={"gradient_checkpointing": False}),
        Side(
            "trl-precomputed",
            "trl",
            "activations kept, reference precomputed",
            dpo={"gradient_checkpointing": False, "precompute_ref_log_probs": True},
        ),
    ]
}


@dataclass(frozen=True)
class Work:
    """The pairs of one turn, in training order."""

    recipe: dict[str, Any]
    """The recipe of ours, without the settings of a side."""
    rows: Path
    """The pairs as conversations, for TRL."""
    tokens: list[int]
    """Tokens of each step: those of both answers, each with its prompt, without padding."""


def main() -> None:
    options = parse()
    runs: dict[str, list[Figures]] = {name: [] for name in options.sides}
    scores: dict[str, list[list[Pair]]] = {name: [] for name in options.sides}
    with tempfile.TemporaryDirectory(prefix="preference-") as folder:
        for seed in range(options.repetitions):
            work = make_work(options, Path(folder), seed)
            adapters: dict[str, Path] = {}
            for name in options.sides:
                place = Path(folder) / f"{seed}-{name}"
                figures, adapters[name] = run(SIDES[name], work, place, options, seed)
                runs[name].append(figures)
                say(f"seed {seed}  {name:<16} {line_of(figures)}")
            for name, found in score(work, adapters).items():
                scores[name].append(found)
    report = {
        "command": "python -m benchmarks.preference --model MODEL --train train.jsonl "
        "--held-out held_out.jsonl " + told(options),
        "machine": f"{processor()}, {options.threads} threads",
        "note": options.note,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"trl": version_of_trl()},
        "model": options.model.name,
        "sides": {
            name: {
                "about": SIDES[name].about,
                "runs": runs[name],
                "pairs": scores[name],
            }
            for name in options.sides
        },
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = as_markdown(report)
    options.output.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preference",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the base")
    add("--train", type=Path, required=True, help="pairs to train on")
    add("--held-out", type=Path, required=True, help="pairs to evaluate on")
    add("--sides", nargs="+", choices=SIDES, default=["ours", "trl", "trl-keep"], help="who runs")
    add("--repetitions", type=int, default=3, help="turns, each with a seed of its own")
    add("--steps", type=int, default=60, help="optimizer steps of a run")
    add("--batch-size", type=int, default=16, help="pairs per step")
    add("--micro-batch", type=int, default=4, help="pairs per forward")
    add("--max-length", type=int, default=512, help="tokens of a prompt with an answer")
    add("--rank", type=int, default=16, help="of the adapter; alpha is twice as much")
    add("--learning-rate", type=float, default=1e-4, help="at the start; it falls to 0")
    add("--beta", type=float, default=0.1, help="of the loss")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of all sides")
    add("--threads", type=int, default=2, help="of a run")
    add("--limit", type=float, default=3600.0, help="seconds after which a run is stopped")
    add("--note", default="nothing else ran.", help="other load on the machine")
    add("--output", type=Path, default=ROOT / "benchmarks/preference.json", help="the report")
    return parser.parse_args()


def version_of_trl() -> str:
    """Return the version of TRL in its interpreter."""
    script = "import importlib.metadata; print(importlib.metadata.version('trl'))"
    return subprocess.check_output([TRL, "-c", script], text=True).strip()


def told(options: argparse.Namespace) -> str:
    """Return the options that determine the work."""
    names = ("repetitions", "steps", "batch_size", "micro_batch", "max_length", "learning_rate")
    values = {name: getattr(options, name) for name in (*names, "precision", "threads")}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def make_work(options: argparse.Namespace, folder: Path, seed: int) -> Work:
    """Prepare the pairs, and write them for TRL in the order of our steps."""
    from qlora_cli._compat import quiet_libraries
    from qlora_cli.loop.run_data import read_recipe_data
    from qlora_cli.loop.setup import stream_batches
    from qlora_cli.recipe.schema import Recipe

    quiet_libraries()
    pairs = {"type": "preference"}
    recipe = {
        "model": {"path": str(options.model.resolve())},
        "adapter": {
            "type": "lora",
            "r": options.rank,
            "alpha": 2 * options.rank,
            "target_modules": "all-linear",
        },
        "objective": {"type": "dpo", "beta": options.beta},
        "data": {
            "train": {"path": str(options.train.resolve()), "format": pairs},
            "evaluation": {"path": str(options.held_out.resolve()), "format": pairs},
            "max_length": options.max_length,
        },
        "training": {
            "seed": seed,
            "max_steps": options.steps,
            "batch_size": options.batch_size,
            "micro_batch_size": options.micro_batch,
            "gradient_checkpointing": False,
            "precision": options.precision,
        },
        "optimizer": {"type": "adamw", "learning_rate": options.learning_rate},
        "schedule": {"type": "linear"},
    }
    parsed = Recipe.model_validate({**recipe, "output": {"dir": str(folder / "unused")}})
    data = read_recipe_data(parsed)
    stream = stream_batches(parsed, data.training, data.tokenizer, padding_free=True)
    examples, lines = data.training.examples, options.train.read_text("utf-8").splitlines()
    steps = [stream.rows(step) for step in range(options.steps)]
    rows = folder / f"{seed}-rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for pair in (pair for step in steps for pair in step):
            line = int(examples.place(pair[0]).rpartition(":")[2])
            file.write(json.dumps(as_conversation(json.loads(lines[line - 1]))) + "\n")
    tokens = [sum(len(examples[i].input_ids) for pair in step for i in pair) for step in steps]
    return Work(recipe, rows, tokens)


def as_conversation(pair: Pair) -> Pair:
    """Return a pair as messages, for the chat template of the model."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": pair[name]}] for name, role in roles.items()}


def run(
    one: Side, work: Work, folder: Path, options: argparse.Namespace, seed: int
) -> tuple[Figures, Path]:
    """Train once; return the figures, and the folder of the adapter."""
    folder.mkdir()
    is_ours = one.kind == "ours"
    python = sys.executable if is_ours else TRL
    command = (
        our_command(one, work, folder) if is_ours else trl_command(one, work, folder, options, seed)
    )
    variables = environment(options.threads, project=ROOT if is_ours else None)
    seen = watch(one, [python, *command], folder, variables, limit=options.limit)
    for (_, step), so_far in zip(seen.steps, running(work.tokens), strict=False):
        step["tokens_so_far"] = so_far
    figures = of_run(
        seen,
        warmup=1,
        threads=options.threads,
        num_processors=os.cpu_count() or 1,
        interpreter_mb=interpreter_of(one.kind, python, variables),
    )
    if "failed" in figures:
        sys.exit(f"{one.name} failed:\n{figures['failed']}")
    return figures, folder / ("run/last" if is_ours else "adapter")


def running(numbers: Sequence[int]) -> list[int]:
    """Return the running sums."""
    return [sum(numbers[: at + 1]) for at in range(len(numbers))]


def our_command(one: Side, work: Work, folder: Path) -> list[str]:
    recipe = {
        # Without its evaluation: all sides are evaluated alike, afterwards.
        **{name: section for name, section in work.recipe.items() if name != "data"},
        "data": {k: v for k, v in work.recipe["data"].items() if k != "evaluation"},
        "training": {**work.recipe["training"], **one.options},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["-m", "qlora_cli", "train", str(path), "--no-cache"]


def trl_command(
    one: Side, work: Work, folder: Path, options: argparse.Namespace, seed: int
) -> list[str]:
    job = {
        "model": work.recipe["model"]["path"],
        "rows": str(work.rows),
        "lines": str(one.lines(folder)),
        "folder": str(folder / "trainer"),
        "adapter": str(folder / "adapter"),
        "precision": options.precision,
        "rows_per_step": options.batch_size,
        "micro_batch": options.micro_batch,
        "steps": options.steps,
        "max_length": options.max_length,
        "learning_rate": options.learning_rate,
        "beta": options.beta,
        "r": options.rank,
        "alpha": 2 * options.rank,
        "seed": seed,
        "dpo": dict(one.dpo),
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return [str(RACE / "peers/with_trl_dpo.py"), str(folder / "job.json")]


_INTERPRETERS: dict[Kind, float] = {}


def interpreter_of(kind: Kind, python: str, variables: dict[str, str]) -> float:
    """Measure the memory of an interpreter that is ready to train, once."""
    if kind not in _INTERPRETERS:
        imports = IMPORTS[kind].replace("SFTConfig, SFTTrainer", "DPOConfig, DPOTrainer")
        _INTERPRETERS[kind] = interpreter_mb(python, imports, variables)
    return _INTERPRETERS[kind]


def score(work: Work, adapters: Mapping[str, Path]) -> dict[str, list[Pair]]:
    """Evaluate adapters on the held-out pairs: accuracy and margin of each pair.

    The reference is the base model. A pair is right if its implicit reward is larger for the chosen
    answer, half right if both are equal.
    """
    import torch
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    from qlora_cli.common.eval_mode import eval_mode
    from qlora_cli.data.batching.sampler import eval_batches
    from qlora_cli.distributed.world import World
    from qlora_cli.loop.run_data import prepare_data
    from qlora_cli.loop.setup import build_setup
    from qlora_cli.objectives.base import same
    from qlora_cli.recipe.schema import Recipe

    folder = next(iter(adapters.values())).parent
    recipe = Recipe.model_validate(
        {
            **work.recipe,
            # Rounding would decide the pairs whose answers are about equally likely.
            "training": {**work.recipe["training"], "precision": "fp32"},
            "output": {"dir": str(folder / "unused")},
        }
    )
    data = prepare_data(recipe)
    assert data.evaluation is not None
    setup = build_setup(recipe, data, World("cpu"))
    objective, device = setup.objective, torch.device("cpu")
    # A fresh adapter changes nothing: this is the base model.
    batches = list(
        eval_batches(
            data.evaluation.examples, batch_size=1, pad_token_id=data.tokenizer.pad_token_id
        )
    )
    known = objective.prepare(batches, device, same)
    found: dict[str, list[Pair]] = {}
    for name, adapter in adapters.items():
        set_peft_model_state_dict(setup.model, load_peft_weights(str(adapter), device="cpu"))
        with eval_mode(objective), torch.no_grad():
            measured = [objective.measured(batch) for batch in known]
        keys = ("accuracy", "margin")
        found[name] = [{key: float(one[key]) for key in keys} for one in measured]
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """Write the page."""
    rows = []
    first = next(iter(report["sides"].values()))
    for name, side in report["sides"].items():
        speed, peak = (median(side["runs"], key) for key in ("tokens_per_second", "peak_mb"))
        to_speed = speed / median(first["runs"], "tokens_per_second")
        to_peak = peak / median(first["runs"], "peak_mb")
        accuracies = [mean(pairs, "accuracy") for pairs in side["pairs"]]
        shown = ", ".join(f"{value:.1%}" for value in accuracies)
        rows.append(
            f"| {name}: {side['about']} | {speed:,.0f} | {to_speed:.2f} | {peak:,.0f} | "
            f"{to_peak:.2f} | {median(side['runs'], 'above_interpreter_mb'):,.0f} | "
            f"{shown} | {statistics.mean(accuracies) - 0.5:+.1%} | "
            f"{interval_text(report, name)} |"
        )
    runs = [run for side in report["sides"].values() for run in side["runs"]]
    note = report["note"]
    if (others := max(run["others_share_most"] for run in runs)) > MOST_BY_OTHERS:
        note += f" **Other processes took up to {others:.0%} of the CPU.**"
    versions = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    return "\n".join(
        [
            "# Preference training beside TRL",
            "",
            f"{report['model']}, {report['machine']}; {note} Speed and memory are "
            "medians over the seeds. Tokens are those of both answers with their prompts, without "
            "padding. Memory is the peak of the process since its model was loaded, and what of it "
            "is more than an interpreter with the same imports takes. Accuracy is the share of "
            "held-out pairs whose chosen answer has the larger implicit reward; the base has 50 % "
            "by definition. The interval is a paired bootstrap of 95 % over pairs.",
            "",
            "| side | tokens/s | to the first | peak MB | to the first | above interpreter | "
            "held-out accuracy | above base | minus the first |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Versions: {versions}. Command: `{report['command']}`.",
            "",
        ]
    )


def interval_text(report: dict[str, Any], name: str) -> str:
    """Return the mean difference in accuracy from the first side, with its interval."""
    import numpy as np

    sides = list(report["sides"])
    if name == sides[0]:
        return ""
    ours, theirs = (
        np.array([[pair["accuracy"] for pair in pairs] for pairs in report["sides"][one]["pairs"]])
        for one in (sides[0], name)
    )
    differences = (theirs - ours).mean(axis=0)  # (pairs,), over the seeds
    draw = np.random.default_rng(0).integers(0, len(differences), (2000, len(differences)))
    low, high = np.quantile(differences[draw].mean(axis=1), [0.025, 0.975])
    return f"{differences.mean():+.1%} ({low:+.1%} to {high:+.1%})"


def median(runs: Sequence[Figures], key: str) -> float:
    """Return the median of a figure over the runs."""
    return statistics.median(run[key] for run in runs)


def mean(pairs: Sequence[Pair], key: str) -> float:
    """Return the mean of a figure over the pairs."""
    return statistics.mean(pair[key] for pair in pairs)


def line_of(figures: Figures) -> str:
    """Return the speed and memory of a run in one line."""
    return f"{figures['tokens_per_second']:8,.0f} tokens/s  {figures['peak_mb']:8,.0f} MB"


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
