"""Keys of other tools, YAML merge keys, and numbers of thousands of digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_cli.common.config import Config
from qlora_cli.recipe.field_types import FieldType, key_paths
from qlora_cli.recipe.other_tools import INSTEAD, OTHER_NAMES, OTHER_VALUES, TAKES
from qlora_cli.recipe.schema import Recipe

KEYS = {key.rpartition(".")[2] for key in key_paths(Recipe)}

DATA = "data: {train: {path: rows.jsonl}}\noutput: {dir: run}\n"
LONG = "9" * 5000


@pytest.mark.parametrize("section", ["", "training."])
@pytest.mark.parametrize(
    "key", ["wandb_project", "reward_model", "hub_model_id", "deepspeed", "run_name"]
)
def test_a_key_without_a_counterpart_says_what_to_do(
    problems: Callable[..., list[str]], minimal: str, section: str, key: str
) -> None:
    [line] = problems(minimal, f"{section}{key}=x")
    assert line.endswith(f"; instead: {INSTEAD[key]}")


FREQUENT = (
    "lora_model_dir plugins gradient_checkpointing_kwargs message_property_mappings "
    "liger_glu_activation liger_rms_norm liger_layer_norm eot_tokens processor_type "
    "skip_prepare_dataset fsdp_version lora_mlp_kernel lora_qkv_kernel lora_o_kernel liger_rope "
    "quantize_moe_experts use_kernels activation_offloading tokenizer_use_mistral_common "
    "liger_fused_linear_cross_entropy train_on_eos sdp_attention flash_attention eval_batch_size"
)
"""Frequent keys of axolotl's examples."""


@pytest.mark.parametrize("key", FREQUENT.split())
def test_a_frequent_key_of_axolotl_has_a_hint_by_meaning(key: str) -> None:
    assert (key in OTHER_NAMES) != (key in INSTEAD)


@pytest.mark.parametrize("value", ["true", "True", "yes", "false", "off", "[true]", "[q_proj, no]"])
@pytest.mark.parametrize(
    "key",
    ["target_modules", "exclude_modules", "bottleneck: target_modules", "ia3: feedforward_modules"],
)
def test_a_truth_value_is_not_a_module(
    problems: Callable[..., list[str]], minimal: str, key: str, value: str
) -> None:
    kind, _, name = key.rpartition(": ")
    [line] = problems(minimal, f"adapter.type={kind or 'lora'}", f"adapter.{name}={value}")
    assert f"adapter.{name}: found " in line
    assert "names no module; it takes" in line


@pytest.mark.parametrize("value", ["all-linear", "null", "[on_proj]", "'.*(on|off)_proj'"])
def test_names_of_modules_are_accepted(
    load: Callable[..., object], minimal: str, value: str
) -> None:
    assert load(minimal, f"adapter.target_modules={value}")


def test_no_key_is_in_both_tables_or_ours() -> None:
    assert not set(INSTEAD) & (set(OTHER_NAMES) | KEYS)
    assert not set(OTHER_NAMES) & KEYS
    assert {name.rpartition(".")[2] for name in OTHER_NAMES.values()} <= KEYS | {"type"}


@pytest.mark.parametrize(
    "text",
    [
        f"defaults: &d {{path: base}}\nmodel: {{<<: *d}}\n{DATA}",
        f"model: {{<<: {{path: base}}}}\n{DATA}",
        f"<<: {{model: {{path: base}}}}\n{DATA}",
        f"model: {{path: base}}\nadapter: {{<<: {{type: lora}}, r: 8}}\n{DATA}",
        "model: {path: base}\ndata: {train: [{<<: {path: r.jsonl}}]}\noutput: {dir: run}\n",
        f"model: &m {{path: base}}\nadapter:\n  <<: [*m]\n{DATA}",
    ],
)
def test_a_merge_key_is_one_problem(problems: Callable[..., list[str]], text: str) -> None:
    [line] = problems(text)
    assert 'merge keys ("<<") are not supported; write the keys out' in line


def test_other_problems_beside_a_merge_key_are_reported(
    problems: Callable[..., list[str]],
) -> None:
    lines = problems(f"model: {{<<: {{path: base}}}}\nadapter: {{type: lora, rank: 8}}\n{DATA}")
    assert len(lines) == 2
    assert 'did you mean "r"?' in lines[1]


@pytest.mark.parametrize("number", [LONG, f"-{LONG}", f"1_{LONG}", f"{LONG}.5", f"0x{LONG}"])
@pytest.mark.parametrize("key", ["training.max_steps", "training.seed", "training.epochs"])
def test_a_number_of_thousands_of_digits_names_its_field(
    problems: Callable[..., list[str]], minimal: str, key: str, number: str
) -> None:
    [line] = problems(minimal, f"{key}={number}")
    assert f"  {key}: found " in line
    assert len(line) < 600


def test_zeros_in_front_are_not_counted(load: Callable[..., object], minimal: str) -> None:
    loaded = load(minimal, f"training.max_steps={'0' * 5000}12")
    # The fixture is typed as returning an object.
    assert loaded.recipe.training.max_steps == 12  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("training.steps", '"max_steps" or "max_bad_steps" or training.spike.steps?'),
        ("training.size", '"batch_size" or "micro_batch_size" or adapter.size?'),
        ("training.norm", '"max_grad_norm"?'),
        ("optimizer.rate", '"learning_rate"?'),
        ("data.length", '"max_length"?'),
        ("adapter.modules", '"target_modules" or "exclude_modules"?'),
    ],
)
def test_the_end_of_a_key_names_the_whole_keys_of_its_section(
    problems: Callable[..., list[str]], minimal: str, key: str, said: str
) -> None:
    [line] = problems(minimal, f"{key}=1")
    assert line.rpartition("did you mean ")[2] == said


@pytest.mark.parametrize("value", ["tool_call", "tool_calls", "function_call", "function_calling"])
def test_a_task_for_tool_calls_is_exact_match(
    problems: Callable[..., list[str]], minimal: str, value: str
) -> None:
    [line] = problems(minimal, f"evaluation.tasks=[{{type: {value}}}]")
    assert line.endswith('; did you mean "exact_match"?')


@pytest.mark.parametrize("key", OTHER_NAMES)
def test_a_key_of_another_tool_names_ours_at_the_top_and_in_its_section(
    problems: Callable[..., list[str]], minimal: str, key: str
) -> None:
    ours = OTHER_NAMES[key]
    [path] = {p for p in key_paths(Recipe) if f".{p}".endswith(f".{ours}")}
    takes = f" It takes {TAKES[key]}." if key in TAKES else ""
    [line] = problems(minimal, f"{key}=1")
    assert path in line.rpartition("did you mean ")[2]
    assert line.endswith(f"?{takes}")


ROLES = f" It takes {TAKES['roles_to_train']}."


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.type=alpaca", "data.train.format.type?"),
        ("data.train=[{path: a, type: alpaca}]", "data.train.format.type?"),
        ("data.evaluation={path: a, type: alpaca}", "data.evaluation.format.type?"),
        ("data.train.field=text", "data.train.format.field?"),
        ("data.train.max_length=8", "data.max_length?"),
        ("data.train.format.path=a", "data.train.path?"),
        ("data.train.roles_to_train=[user]", f'"learn_roles"?{ROLES}'),
        ("data.train.train_on_inputs=true", '"learn_prompt"?'),
        ("data.train=[{path: a, train_on_inputs: false}]", '"learn_prompt"?'),
        ("adapter.lora_alpha=8", '"alpha"?'),
        ("lora_alpha=8", "adapter.alpha?"),
        ("train_on_inputs=true", "data.train.learn_prompt?"),
        ("evals_per_epoch=4", f"training.eval_every? It takes {TAKES['evals_per_epoch']}."),
        ("saves_per_epoch=1", f"training.save_every? It takes {TAKES['saves_per_epoch']}."),
        ("training.warmup_ratio=0.1", f"schedule.warmup_steps? It takes {TAKES['warmup_ratio']}."),
        ("type=lora", "quantization.type or adapter.type or data.train.format.type?"),
    ],
)  # fmt: skip
def test_the_key_that_is_meant_is_named_alone(
    problems: Callable[..., list[str]], minimal: str, override: str, expected: str
) -> None:
    [line] = problems(minimal, override)
    assert line.rpartition("did you mean ")[2] == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.format.type=completion", 'did you mean "text"?'),
        ("data.train.format.type=chat_template", 'did you mean "messages"?'),
        ("data.train.format=completion", "write {type: text}"),
        ("optimizer.type=adamw_bnb_8bit", 'did you mean "adamw_8bit"?'),
        ("optimizer=adamw_torch", "write {type: adamw}"),
        ("adapter=qlora", "write {type: lora}"),
        ("adapter.type=qlora", 'did you mean "lora"?'),
        ("quantization=bitsandbytes", "write {type: nf4}"),
        ("training.precision=bfloat16", 'did you mean "bf16"?'),
        ("training.gradient_checkpointing=unsloth", 'did you mean "offload"?'),
        ("schedule.type=constant_with_warmup", 'did you mean "constant"?'),
    ],
)
def test_a_value_of_another_tool_names_ours(
    problems: Callable[..., list[str]], minimal: str, override: str, expected: str
) -> None:
    [line] = problems(minimal, override)
    assert line.endswith(f"; {expected}")


def options(section: type[Config]) -> Iterator[set[str]]:
    """The values to choose from, of each key below a section."""
    for info in section.model_fields.values():
        field_type = FieldType.of(info)
        yield {*field_type.choices, *field_type.variants}
        for below in field_type.all_sections:
            yield from options(below)


@pytest.mark.parametrize("value", OTHER_VALUES)
def test_a_value_of_another_tool_is_not_ours(value: str) -> None:
    of_this = [some for some in options(Recipe) if OTHER_VALUES[value] in some]
    assert of_this
    assert not any(value in some for some in of_this)


def test_the_notes_are_about_keys_of_other_tools() -> None:
    assert TAKES.keys() <= OTHER_NAMES.keys()


def test_the_keys_of_a_section_are_listed_once_in_each_file(
    problems: Callable[..., list[str]], minimal: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(
        "zzz: 1\nlora_r: 8\ntraining: {zzz: 1, lr: 2}\n", encoding="utf-8"
    )
    train = "data: {train: [{path: a, type: x}, {path: b, type: x, zzz: 1}]}\n"
    text = minimal.replace("data: {train: {path: rows.jsonl}}\n", train)
    lines = problems(f"extends: base.yaml\n{text}base_model: x\ndatasets: []\nzzz2: 1\n", "lr=1")
    top, training, rows = "it takes model, ", "it takes seed, ", "it takes path, "
    assert [[part in line for part in (top, training, rows)] for line in lines] == [
        *([False, False, True], [False] * 3, [False] * 3),  # data.train[..].type, .type, .zzz
        *([True, False, False], [False] * 3, [False] * 3),  # base_model, datasets, zzz2
        *([True, False, False], [False] * 3),  # base.yaml: zzz, lora_r
        *([False, True, False], [False] * 3),  # base.yaml: training.zzz, training.lr
        [True, False, False],  # --set lr
    ]
    assert lines[5].endswith('zzz2: a recipe has no "zzz2"')
