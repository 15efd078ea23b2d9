"""Train each preference objective and TRL's trainer for ten steps, on the same tokens and weights.

TRL runs in a process of its own: that of `QLORA_TRL_PYTHON`, an interpreter with TRL and PEFT, or
this one. All cases share one process, because importing takes longer than training.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.distributed.world import World
from qlora_cli.loop.run_data import prepare_data
from qlora_cli.loop.setup import build_setup, stream_batches
from qlora_cli.objectives import DPO, ObjectiveConfig
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train
from qlora_cli.types import Example, Row
from tests.conftest import save_tiny_model
from tests.random_adapter import draw_adapter

STEPS, BATCH_SIZE, ROWS, MAX_LENGTH = 10, 4, 40, 128
LEARNING_RATE, EPS = 1e-3, 1e-5
"""With the usual eps of 1e-8, AdamW scales a gradient of pure rounding noise to a whole step."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
END, PAD = "<|im_end|>", "<|im_start|>"

PYTHON = os.environ.get("QLORA_TRL_PYTHON") or (
    sys.executable if importlib.util.find_spec("trl") else None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="no TRL: install it here, or name its python in QLORA_TRL_PYTHON"
    ),
]


@dataclass(frozen=True)
class Case:
    """One objective, and the settings of TRL that mean the same."""

    objective: dict[str, Any]
    trainer: str
    """A name of `trl_runs.KINDS`."""
    settings: dict[str, Any]
    rows: str = "pairs"
    """A name of `make_rows`."""
    is_fresh: bool = False
    """The adapter starts with B at zero, and the reference is the base model."""


def dpo(loss: str = "sigmoid", **settings: Any) -> dict[str, Any]:
    """Return settings of TRL's DPOTrainer."""
    return {"loss_type": [loss], "beta": 0.1, **settings}


CASES = {
    "dpo": Case({"type": "dpo", "beta": 0.1}, "dpo", dpo()),
    "dpo, fresh adapter": Case({"type": "dpo", "beta": 0.1}, "dpo", dpo(), is_fresh=True),
    "hinge": Case({"type": "dpo", "beta": 0.1, "loss": "hinge"}, "dpo", dpo("hinge")),
    "ipo": Case({"type": "dpo", "beta": 0.1, "loss": "ipo"}, "dpo", dpo("ipo")),
    # TRL has no conservative DPO. Its robust loss with -e / (1 - 2e) is conservative DPO with e.
    "conservative dpo": Case(
        {"type": "dpo", "beta": 0.1, "label_smoothing": 0.1},
        "dpo",
        dpo("robust", label_smoothing=-0.125),
    ),
    "ld-dpo": Case({"type": "dpo", "beta": 0.1, "ld_alpha": 0.4}, "dpo", dpo(ld_alpha=0.4)),
    # TRL's cross-entropy is a mean over tokens of the batch, ours one over pairs: equal here.
    "dpo and sft": Case(
        {"type": "dpo", "beta": 0.1, "sft_weight": 0.3},
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.1},
        rows="even pairs",
    ),
    # TRL's cross-entropy is a mean over tokens of prompt and answer in the batch, ours a mean over
    # pairs of that of the answer. The first token of a row is not predicted, so the two are equal
    # where a prompt has one token and all chosen answers have the same length.
    "orpo": Case({"type": "orpo", "beta": 0.1}, "orpo", {"beta": 0.1}, rows="even pairs"),
    "simpo": Case(
        {"type": "simpo", "beta": 2.0, "gamma": 1.5},
        "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.5, "cpo_alpha": 0.0},
    ),
    "kto": Case(
        {"type": "kto", "beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        "kto",
        {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        rows="feedback",
    ),
    # TRL reads the last token that is not the pad token: with the usual one, which is the
    # end-of-text token here, that is the token before it.
    "reward": Case({"type": "reward"}, "reward", {"pad_token": PAD}, is_fresh=True),
    "reward, centered, with margins": Case(
        {"type": "reward", "center_rewards": 0.1},
        "reward",
        {"pad_token": PAD, "center_rewards_coefficient": 0.1},
        rows="pairs with margins",
        is_fresh=True,
    ),
}


def make_rows(kind: str) -> list[Row]:
    """Make rows of uneven length; in `even pairs`, prompts of one token and even chosen answers.

    Answers are short: TRL adds up their log-probabilities in float32, and the rounding of a large
    sum would hide other differences.
    """
    draw = random.Random(kind)

    def text(shortest: int, longest: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(shortest, longest) - 1)) + "z"

    if kind == "feedback":
        return [
            {"prompt": text(3, 30), "completion": text(2, 10), "label": draw.random() < 0.6}
            for _ in range(ROWS)
        ]
    is_even = kind == "even pairs"
    return [
        {
            "prompt": draw.choice("abcdefgh") if is_even else text(3, 30),
            "chosen": text(6, 6) if is_even else text(2, 10),
            "rejected": text(2, 10),
            **({"margin": draw.choice((0.0, 0.5, 2.0))} if kind == "pairs with margins" else {}),
        }
        for _ in range(ROWS)
    ]


@dataclass(frozen=True)
class Job:
    """One case: the recipe, the examples of each row in the order of the steps, TRL's settings."""

    recipe: Recipe
    examples: list[list[Example]]
    trl: dict[str, Any]


def make_recipe(folder: Path, base: Path, adapter: Path, case: Case, data: Path) -> Recipe:
    template = folder.parent / "template.jinja"
    # No text but that of the turns, so that TRL gets the same tokens from plain text.
    template.write_text(
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    start = {} if case.is_fresh else {"init_from": str(adapter)}
    kind = "feedback" if case.rows == "feedback" else "preference"
    return Recipe.model_validate(
        {
            "model": {"path": str(base)},
            "adapter": {"type": "lora", "r": 4, "alpha": 2, "target_modules": TARGETS, **start},
            "objective": case.objective,
            "data": {
                "train": {"path": str(data), "format": {"type": kind}},
                "max_length": MAX_LENGTH,
                "chat_template": str(template),
            },
            "training": {
                "max_steps": STEPS,
                "batch_size": BATCH_SIZE,
                "micro_batch_size": BATCH_SIZE,
                "max_grad_norm": None,
                "precision": "fp32",
                "gradient_checkpointing": False,
            },
            "optimizer": {"type": "adamw", "learning_rate": LEARNING_RATE, "eps": EPS},
            "schedule": {"type": "constant"},
            "output": {"dir": str(folder / "run")},
        }
    )


def make_job(folder: Path, base: Path, adapter: Path, case: Case) -> Job:
    """Prepare the rows of a case, and write them as text for TRL, in the order of our steps."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    write_rows(data, make_rows(case.rows))
    recipe = make_recipe(folder, base, adapter, case, data)
    prepared = prepare_data(recipe)
    stream = stream_batches(recipe, prepared.training, prepared.tokenizer, padding_free=True)
    examples = [
        [prepared.training.examples[i] for i in row]
        for step in range(STEPS)
        for row in stream.rows(step)
    ]
    if case.is_fresh:
        adapter = folder / "start"
        adapter.mkdir()
        setup = build_setup(recipe, prepared, World("cpu"))
        recipe.adapter.save(setup.model, adapter)
    rows = [as_text(prepared.tokenizer, row) for row in examples]
    write_rows(folder / "trl.jsonl", rows)
    settings = {
        "trainer": case.trainer,
        "rows": str(folder / "trl.jsonl"),
        "adapter": str(adapter),
        "reference": "base" if case.is_fresh else "adapter",
        "settings": case.settings,
    }
    return Job(recipe, examples, settings)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_text(tokenizer: Any, examples: list[Example]) -> Row:
    """Return the text of a row: TRL makes the same tokens of it (bytes, without merges)."""
    texts = []
    for example in examples:
        start = first_supervised(example)
        ids = example.input_ids
        assert example.labels[start:] == ids[start:], "all tokens of an answer are supervised"
        parts = [str(tokenizer.decode(part)) for part in (ids[:start], ids[start:])]
        assert tokenizer("".join(parts))["input_ids"] == ids
        assert parts[1].endswith(END)
        texts.append(parts)
    if len(examples) == 1:
        [(prompt, completion)] = texts
        return {"prompt": prompt, "completion": completion, "label": examples[0].values[0] > 0}
    (prompt, chosen), (same_prompt, rejected) = texts
    assert prompt == same_prompt
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row | ({"margin": examples[0].values[0]} if examples[0].values else {})


def first_supervised(example: Example) -> int:
    return next(i for i, label in enumerate(example.labels) if label >= 0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Prepare all cases, and run TRL's trainers."""
    folder = tmp_path_factory.mktemp("trl")
    base = save_tiny_model(folder / "base")
    adapter = draw_adapter(base, folder / "adapter", seed=1, alpha=2, target_modules=TARGETS)
    made = {
        name: make_job(folder / f"case {number}", base, adapter, case)
        for number, (name, case) in enumerate(CASES.items())
    }
    job = {
        "model": str(base),
        "folder": str(folder / "trl"),
        "batch_size": BATCH_SIZE,
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "eps": EPS,
        "max_length": MAX_LENGTH,
        "cases": {name: one.trl for name, one in made.items()},
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        [str(PYTHON), Path(__file__).with_name("trl_runs.py"), folder / "job.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def test_each_preference_objective_and_each_loss_of_dpo_is_compared() -> None:
    types = {one.model_fields["type"].default for one in get_args(get_args(ObjectiveConfig)[0])}
    # Supervised training and classification are compared with transformers, not with TRL.
    assert {case.objective["type"] for case in CASES.values()} == types - {"supervised", "classify"}
    losses = get_args(DPO.model_fields["loss"].annotation)
    assert {case.objective.get("loss", "sigmoid") for case in CASES.values()} == set(losses)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_equal_those_of_trl(name: str, jobs: dict[str, Job]) -> None:
    job = jobs[name]
    run = Path(job.recipe.output.dir)
    theirs = run.parents[1] / "trl" / name
    result = json.loads((theirs / "result.json").read_text(encoding="utf-8"))
    for row, examples in zip(result["rows"], job.examples, strict=bool(result["rows"])):
        assert_same_tokens(row, examples)

    train(job.recipe)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == STEPS
    assert losses == pytest.approx(result["losses"], rel=1e-6, abs=0)
    saved = load_file(run / "last" / "adapter_model.safetensors")
    weights = load_file(theirs / "weights.safetensors")
    assert len(saved) == len(weights) == 28 + (job.trl["trainer"] == "reward")
    for key, weight in weights.items():
        ours = saved[key.replace(".modules_to_save.default", "").replace(".default", "")]
        torch.testing.assert_close(ours, weight, rtol=0, atol=5e-6)


def assert_same_tokens(row: dict[str, list[int]], examples: list[Example]) -> None:
    """Compare the tokens of a row that TRL prepared with ours; a reward model has no prompt."""
    answers = ("completion_ids",) if len(examples) == 1 else ("chosen_ids", "rejected_ids")
    for column, example in zip(answers, examples, strict=True):
        assert row.get("prompt_ids", []) + row[column] == example.input_ids
        if "prompt_ids" in row:
            assert len(row["prompt_ids"]) == first_supervised(example)
