from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from qlora_cli.adapters import LoRA
from qlora_cli.recipe.field_types import key_paths
from qlora_cli.recipe.load import OTHER_NAMES, LoadedRecipe
from qlora_cli.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Unknown and misplaced keys.
        (
            "adapter:\n  type: lora\n  rank: 8\n",
            'recipe.yaml:6:3  adapter.rank: LoRA has no "rank"; it takes type, '
            'target_modules, ...; did you mean "r"?',
        ),
        ("r: 8\n", 'recipe.yaml:4:1  r: a recipe has no "r"; ...; did you mean adapter.r?'),
        ("lr: 1\n", "recipe.yaml:4:1  lr: ...; did you mean optimizer.learning_rate?"),
        ("trainig: {}\n", 'recipe.yaml:4:1  trainig: ...; did you mean "training"?'),
        (
            "training: {learning_rate: 1}\n",
            "recipe.yaml:4:12  training.learning_rate: training has no ...; "
            "did you mean optimizer.learning_rate?",
        ),
        (
            "adapter: {type: full, r: 8}\n",
            'recipe.yaml:4:23  adapter.r: FullFineTune has no "r"; ...; r belongs to type lora, '
            "adalora, ...",
        ),
        ("output_dir: x\n", "recipe.yaml:4:1  output_dir: ...; did you mean output.dir?"),
        ("zzz: 1\n", 'recipe.yaml:4:1  zzz: a recipe has no "zzz"; it takes ...output, device'),
        # Wrong types.
        (
            "training: {seed: x}\n",
            'recipe.yaml:4:18  training.seed: found "x"; it takes a whole ...',
        ),
        (
            "training: {batch_size: 1.5}\n",
            "recipe.yaml:4:24  training.batch_size: found 1.5; it takes a whole number ...; "
            "for example 16",
        ),
        (
            'training: {batch_size: "16"}\n',
            'recipe.yaml:4:24  training.batch_size: found "16"; it takes a whole number ...; '
            "the quotes make it text, so remove them",
        ),
        (
            "training: {gradient_checkpointing: 'yes'}\n",
            '...: found "yes"; it takes one of mlp, offload, or true or false; the quotes make it '
            "text, so remove them",
        ),
        ("training: {seed: }\n", "...training.seed: found nothing; it takes a whole number ..."),
        ("training: {seed: ~}\n", "...training.seed: found nothing (~); it takes a whole ..."),
        ("training: {seed: [1]}\n", "...training.seed: found a list; it takes a whole number ..."),
        ("training: {seed: {a: 1}}\n", "...training.seed: found a mapping; it takes a whole ..."),
        ("training: [seed]\n", "recipe.yaml:4:11  training: found a list; it takes a section ..."),
        ("training:\n", "...training: found nothing; ...; leave the key out for the defaults"),
        ("training: {max_grad_norm: .inf}\n", "...: found .inf; it takes a number (above 0), ..."),
        (
            "training: {precision: bf61}\n",
            'recipe.yaml:4:23  training.precision: found "bf61"; it takes one of auto, bf16, fp16, '
            'fp32; did you mean "bf16"?',
        ),
        ("schedule: cosine\n", '...schedule: found "cosine"; ...; write {type: cosine}'),
        (
            "output: {dir: x, trackers: tensorboard}\n",
            '...output.trackers: found "tensorboard"; ...; write [tensorboard]',
        ),
        (
            "evaluation: {tasks: json_match}\n",
            '...evaluation.tasks: found "json_match"; ...; write [{type: json_match}]',
        ),
        (
            "evaluation: {tasks: [json_match]}\n",
            'recipe.yaml:4:22  evaluation.tasks[0]: found "json_match"; ...; write {type: ...}',
        ),
        (
            "adapter: {type: lora, rank_pattern: {q_proj: x}}\n",
            'recipe.yaml:4:46  adapter.rank_pattern.q_proj: found "x"; it takes a whole number ...',
        ),
        (f"training: {{seed: {'x' * 100}}}\n", f'...seed: found "{"x" * 60}..."; it takes ...'),
        # Bounds.
        ("adapter: {type: lora, dropout: 1}\n", "...found 1; ...(at least 0, below 1)..."),
        ("training: {seed: -1}\n", "...found -1; ...(at least 0, below 4294967296)..."),
        # Types of variants.
        (
            "optimizer: {learning_rate: 1}\n",
            "recipe.yaml:4:1  optimizer.type: is missing; it takes one of adamw, adamw_8bit, ...",
        ),
        (
            "adapter: {type: loraa}\n",
            'recipe.yaml:4:17  adapter.type: found "loraa"; ...; did you mean "lora"?',
        ),
        ("adapter: {type: [lora]}\n", "...adapter.type: found a list; it takes one of ..."),
        ("adapter: {type: }\n", "...adapter.type: found nothing; it takes one of ..."),
    ],
)
def test_a_single_problem_is_one_message(
    problems: Callable[..., list[str]], minimal: str, text: str, expected: str
) -> None:
    # `output` is given in some of these texts.
    base = minimal.replace("output: {dir: run}", "#") if text.startswith("output:") else minimal
    (found,) = problems(base + text)
    assert _matches(found, expected), found


def _matches(found: str, expected: str) -> bool:
    """Match `found` with `expected`, in which three dots stand for any text."""
    return bool(re.fullmatch(".*".join(map(re.escape, expected.split("..."))), found))


def test_missing_keys_are_named_with_their_meaning(problems: Callable[..., list[str]]) -> None:
    model, output, path = problems("data:\n  train: {split: x}\n")
    assert model.startswith("recipe.yaml:1:1  model: is missing; it takes a section with the keys ")
    assert model.endswith(": The base model")
    assert output.startswith("recipe.yaml:1:1  output: is missing; ")
    assert path.startswith("recipe.yaml:2:3  data.train.path: is missing; it takes text ")
    assert "jsonl" in path


def test_all_problems_at_once_sorted_by_place(problems: Callable[..., list[str]]) -> None:
    found = problems(
        "training: {seed: x, batch_size: 0}\n"
        "adapter: {type: lora, rank: 1, r: 0}\n"
        "model: {path: [x], pth: 1}\n"
        "output: {dir: x}\n"
        "output: {dir: y}\n"
        "data: {train: {path: x, format: {type: txt}}}\n"
    )
    places = [line.split(":", 3)[1:3] for line in found]
    assert places == sorted(places, key=lambda place: [int(number[:2]) for number in place])
    keys = [line.split("  ")[1].split(":")[0] for line in found]
    assert keys == [
        "training.seed", "training.batch_size", "adapter.rank", "adapter.r", "model.path",
        "model.pth", "output", "data.train.format.type",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training:\n  epochs: 2\n  batch_size: 5\n  max_steps: 10\n",
            [
                "recipe.yaml:5:3  training.epochs (2) and training.max_steps (10) are both given; "
                "remove one of them, e.g. --set training.epochs=null",
                "recipe.yaml:6:3  training.batch_size (5) must be a multiple of "
                "training.micro_batch_size (4)",
            ],
        ),
        (
            "training: {micro_batch_size: 5}\n",
            [
                "recipe.yaml:4:12  training.batch_size (16) must be a multiple of "
                "training.micro_batch_size (5)",
            ],
        ),
        (
            "quantization: {type: nf4}\nadapter: {type: full}\n"
            "evaluation: {tasks: [{type: json_match}]}\n",
            [
                "recipe.yaml:5:11  adapter.type (full) cannot train quantization.type (nf4): "
                "quantized weights have no gradient; use quantization.type none, or "
                "adapter.type lora",
                "recipe.yaml:6:14  evaluation.tasks needs data.evaluation: rows to answer",
            ],
        ),
        (
            "training: {precision: fp32}\nquantization: {type: none, dtype: bfloat16}\n",
            [
                "recipe.yaml:4:12  training.precision (fp32) and quantization.dtype (bfloat16) "
                "cannot be combined: 16-bit weights are multiplied in 16 bit; use "
                "training.precision auto, or quantization.dtype auto",
            ],
        ),
    ],
)
def test_checks_across_fields_name_both_and_stand_where_one_is_given(
    problems: Callable[..., list[str]], minimal: str, text: str, expected: list[str]
) -> None:
    assert problems(minimal + text) == expected


def test_checks_inside_a_variant_are_named_by_their_path(
    problems: Callable[..., list[str]],
) -> None:
    (found,) = problems(
        "model: {path: base}\noutput: {dir: run}\n"
        "data:\n  train:\n    path: x\n"
        "    format: {type: prompt_completion, as_chat: no, system: Hi}\n"
    )
    assert found.startswith("recipe.yaml:6:52  data.train.format: system ('Hi') needs as_chat")


def test_a_wrong_value_causes_no_further_errors(
    problems: Callable[..., list[str]], minimal: str
) -> None:
    """With its own default, a misspelt batch size would not fit; that would be a false lead."""
    found = problems(minimal + "training: {micro_batchsize: 5, batch_size: 5}\n")
    assert len(found) == 1
    assert "training.micro_batchsize" in found[0]


def test_messages_do_not_use_pydantics_wording(
    problems: Callable[..., list[str]],
) -> None:
    text = "\n".join(
        problems(
            "model: 1\nadapter: {type: lora, r: x, dropout: 2, alpha: }\ntraining: {seed: -1}\n"
            "data: {train: {}}\noutput: {dir: '', keep_checkpoints: 0}\n"
        )
    )
    for word in ("Input should", "pydantic", "https://errors", "validation error", "dict", "int "):
        assert word not in text


def test_key_names_of_other_tools_lead_to_ours(load: Callable[..., LoadedRecipe]) -> None:
    paths = set(key_paths(Recipe))
    names = {path.rpartition(".")[2] for path in paths}
    assert OTHER_NAMES
    for other, ours in OTHER_NAMES.items():
        assert other not in names, f"{other} is a key of ours"
        assert ours in (paths if "." in ours else names), ours


def test_key_paths_hold_every_variant() -> None:
    paths = list(key_paths(Recipe))
    assert {f"adapter.{name}" for name in LoRA.model_fields} <= set(paths)
    assert "data.train.format.completion_field" in paths


SOURCES = "model: {path: base}\noutput: {dir: run}\ndata:\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "  train:\n    - {path: a.jsonl}\n    - {path: b.jsonl, weight: 0}\n",
            ["recipe.yaml:6:31  data.train[1].weight: found 0; it takes a number (above 0); ..."],
        ),
        (
            "  train:\n    - {path: a.jsonl, format: {type: txt}}\n    - {limit: 1}\n",
            [
                'recipe.yaml:5:38  data.train[0].format.type: found "txt"; ...text...',
                "recipe.yaml:6:7  data.train[1].path: is missing; ...",
            ],
        ),
        (
            "  train: [a.jsonl]\n",
            ['recipe.yaml:4:11  data.train[0]: found "a.jsonl"; it takes a section ...'],
        ),
        (
            "  train: a.jsonl\n",
            [
                'recipe.yaml:4:10  data.train: found "a.jsonl"; it takes a list (of a section with '
                "the keys path, ...), or a section with the keys path, ..."
            ],
        ),
        (
            "  train: {path: a}\n  evaluation: []\n",
            ["recipe.yaml:5:3  data: evaluation: the list is empty"],
        ),
        (
            "  train: {path: a}\n  evaluation: {path: b}\n  evaluation_share: 0.1\n",
            ["recipe.yaml:6:3  data: evaluation_share (0.1) and evaluation are both given; ..."],
        ),
        (
            "  train: {path: a, weight: 2}\n  evaluation: {path: b, weight: 0.5}\n",
            ["recipe.yaml:5:25  data.evaluation.weight (0.5) would change nothing: ..."],
        ),
        (
            "  train: {path: a}\n  evaluation:\n    - {path: b, weight: 1}\n"
            "    - path: c\n      weight: 3\n"
            "evaluation:\n"
            "  forgetting: {path: d, weight: 2}\n"
            "  tasks:\n    - {type: perplexity, data: {path: e, weight: 4}}\n",
            [
                "recipe.yaml:8:7  data.evaluation[1].weight (3) would change nothing: ...",
                "recipe.yaml:10:25  evaluation.forgetting.weight (2) would change nothing: ...",
                "recipe.yaml:12:42  evaluation.tasks[0].data.weight (4) would change nothing: ...",
            ],
        ),
        (
            "  train:\n    - {path: a, columns: [x, x]}\n    - path: b\n"
            "      format: {type: template, user: '{{ x'}\n",
            [
                "recipe.yaml:5:17  data.train[0]: columns names a column twice: x, x",
                "recipe.yaml:7:32  data.train[1].format: user: line 1 of the template: ...",
            ],
        ),
    ],
)
def test_errors_in_sources_name_the_source_and_the_line(
    problems: Callable[..., list[str]], text: str, expected: list[str]
) -> None:
    found = problems(SOURCES + text)
    assert len(found) == len(expected), found
    assert all(map(_matches, found, expected)), found
