"""Every key of the recipe: a plausible value without effect and its warning, or why there is none.

A new key fails the first test until it has an entry in one of the four tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_cli.common.config import Config
from qlora_cli.data.sources import Source
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.load import LoadedRecipe, load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.without_effect import settings_without_effect

STEPS = 100
"""Steps of the run in all cases."""

HELD_OUT = "data.evaluation={path: held_out.jsonl}"
TEXT = "data.train={path: rows.jsonl, format: {type: text}}"
TASK = "evaluation.tasks=[{type: exact_match, data: {path: x.jsonl}}]"

WARNED: dict[str, tuple[list[str], str]] = {
    "model.revision": (["model={path: ., revision: main}"], "only the Hub has revisions"),
    "adapter.allocate_every": (
        ["adapter={type: adalora, allocate_every: 60}"],
        "all ranks are removed in one step",
    ),
    "data.audit.max_equal_answers": (
        ["data.audit.max_equal_answers=0.1"],
        "objective.type (supervised) does not learn from pairs",
    ),
    "data.audit.max_overlap": (["data.audit.max_overlap=0.1"], "there are no evaluation rows"),
    "data.chat_template": ([TEXT, "data.chat_template=chatml.jinja"], "text without roles"),
    "data.seed": (["data.seed=7"], "training.seed orders the training rows"),
    "data.train.learn_roles": (
        [TEXT, "data.train.learn_roles=[user]"],
        "data.train.learn_roles (['user']) has no effect on rows.jsonl",
    ),
    "data.train.learn_turns": (
        [TEXT, "data.train.learn_turns=last"],
        "data.train.learn_turns (last) has no effect on rows.jsonl",
    ),
    "data.truncate": (["data.truncate=split"], "only text without roles is split"),
    "evaluation.batch_size": (["evaluation.batch_size=2"], "there are no evaluation rows"),
    "evaluation.generation_batch_size": (
        [HELD_OUT, "evaluation={tasks: [{type: classification}], generation_batch_size: 2}"],
        "no task of evaluation.tasks generates",
    ),
    "evaluation.limit": ([HELD_OUT, "evaluation.limit=50"], "evaluation.tasks is empty"),
    "evaluation.max_new_tokens": (["evaluation.max_new_tokens=64"], "generates"),
    "evaluation.tasks.separator": (
        ["evaluation.tasks=[{type: multiple_choice, separator: ': ', data: {path: x.jsonl}}]"],
        "the chat template separates question and option",
    ),
    "optimizer.slow_warmup_steps": (
        ["optimizer={type: ademamix, slow_warmup_steps: 1000}"],
        "never reach their values",
    ),
    "optimizer.weight_decay": (
        ["adapter={type: bitfit}", "optimizer.weight_decay=0.1"],
        "biases, which are never decayed",
    ),
    "output.keep_checkpoints": (["output.keep_checkpoints=5"], "only the last step is saved"),
    "schedule.timescale": (
        ["schedule={type: inverse_root, timescale: 10000}"],
        "the learning rate only falls to 99.5% of its peak",
    ),
    "schedule.warmup_steps": (["schedule={type: linear, warmup_steps: 200}"], "ends at 50%"),
    "training.eval_every": ([HELD_OUT, "training.eval_every=500"], "before the first and only"),
    "training.log_every": (["training.log_every=500"], "only after the last step is a line"),
    "training.patience": (
        [HELD_OUT, "training.eval_every=25", "training.patience=3"],
        "at most 2 can follow the best one",
    ),
    "training.save_every": (["training.save_every=500"], "only after the last step is a check"),
    "training.spike": (["training.spike={steps: 100}"], "so no spike is found"),
    "training.spike.steps": (["training.spike={steps: 200}"], "so no spike is found"),
    "training.tasks_every": ([TASK, "training.tasks_every=500"], "only after the last step are"),
}
"""Key -> overrides with a plausible value without effect; part of the one warning."""

MORE = {
    "eval_every without rows": (["training.eval_every=5"], "there are no evaluation rows"),
    "tasks_every without tasks": (["training.tasks_every=5"], "evaluation.tasks is empty"),
    "chat template for verbatim completions": (
        [
            "data.train={path: r.jsonl, format: {type: prompt_completion, as_chat: false}}",
            "data.chat_template=chatml.jinja",
        ],
        "text without roles",
    ),
    "patience of tasks": (
        [TASK, "training={tasks_every: 50, patience: 1}", "evaluation.best_by=exact_match"],
        "at most 0 can follow",
    ),
}
"""Further values without effect, of keys above."""

REFUSED: dict[str, tuple[list[str], str]] = {
    "objective.label_smoothing": (
        ["objective={type: dpo, loss: hinge, label_smoothing: 0.1}"],
        "label_smoothing (0.1) is defined for loss sigmoid",
    ),
    "adapter.begin_at": (["adapter={type: adalora, begin_at: 0.8}"], "must be before end_at"),
    "adapter.end_at": (["adapter={type: adalora, end_at: 0.05}"], "must be before end_at"),
    "adapter.freeze_a": (["adapter={type: lora, freeze_a: true, init: pissa}"], "does not work"),
    "adapter.init": (["adapter={type: lora, init: olora, init_from: run}"], "does not work with"),
    "adapter.init_from": (["adapter={type: lora, init_from: x, freeze_a: true}"], "does not work"),
    "adapter.target_r": (["adapter={type: adalora, r: 8, target_r: 8}"], "must be less than r"),
    "adapter.use_dora": (["adapter={type: lora, init: pissa, use_dora: true}"], "does not work"),
    "data.evaluation_share": ([HELD_OUT, "data.evaluation_share=0.1"], "are both given"),
    "data.packing": (["data.packing=true", "adapter={type: prompt}"], "cannot train on"),
    "data.train.learn_prompt": (
        ["data.train.learn_prompt=true", "data.train.learn_turns=last"],
        "trains on everything",
    ),
    "evaluation.best_by": (["evaluation.best_by=rouge"], "is not a measure of any task"),
    "evaluation.tasks": (["evaluation.tasks=[{type: exact_match}]"], "needs data.evaluation"),
    "evaluation.tasks.name": (
        ["evaluation.tasks=[{type: loss, data: {path: x.jsonl}}]"],
        "duplicate",
    ),
    "evaluation.tasks.stride": (
        ["evaluation.tasks=[{type: perplexity, stride: 600, data: {path: x.jsonl}}]"],
        "must be less than window",
    ),
    "evaluation.tasks.system": (
        [
            "evaluation.tasks=[{type: multiple_choice, system: s, as_chat: false, "
            "data: {path: x.jsonl}}]"
        ],
        "system needs as_chat",
    ),
    "model.trust_remote_code": (["model.trust_remote_code=true"], "needs model.revision"),
    "optimizer.nesterov": (["optimizer={type: sgd, nesterov: true, momentum: 0}"], "momentum"),
    "schedule": (
        ["optimizer={type: schedule_free_adamw}", "schedule={type: cosine}"],
        "averages the weights instead of",
    ),
    "training.epochs": (["training={epochs: 2, max_steps: 100}"], "are both given"),
    "training.precision": (
        ["training.precision=fp32", "quantization={type: nf4, compute_dtype: bfloat16}"],
        "cannot be combined",
    ),
    "training.spike.action": (["training.spike={action: go_back}"], "restores a checkpoint"),
    "training.stop_after": (["training.stop_after=3x"], "is not a duration"),
}
"""Key -> overrides with a plausible value that the recipe refuses; part of the problem."""

AT_SETUP = {
    "adapter.alpha_pattern": "a name that matches no module is refused (check_patterns)",
    "adapter.config": "a setting that PEFT does not have is refused (OtherPeft.peft_config)",
    "adapter.exclude_modules": "a name that matches no module is refused (check_targets)",
    "adapter.feedforward_modules": "a name that matches no module is refused (check_targets)",
    "adapter.last_layers": "more layers than the model has, and nothing to train, are refused",
    "adapter.layers_to_transform": "a layer that the model does not have is refused",
    "adapter.modules_to_save": "a name that matches no module is refused (check_targets)",
    "adapter.patterns": "a pattern that matches no weight is refused (Freeze)",
    "adapter.r": "PiSSA and OLoRA refuse more than the rank of a weight",
    "adapter.rank_pattern": "a name that matches no module is refused (check_patterns)",
    "adapter.target_modules": "a name that matches no module is refused (check_targets)",
    "adapter.target_parameters": "a name that matches no parameter is refused",
    "adapter.trainable_token_indices": "a token that the model does not have is refused",
    "data.max_length": "rows beyond the model's context are named (test_long_rows.py)",
    "data.train.columns": "refused for files that are not tables (read_file)",
    "data.train.delimiter": "refused for files that are not tables (read_file)",
    "data.train.fields": "a column that a row does not have makes the row bad",
    "data.train.name": "refused for local files (Source)",
    "data.train.revision": "refused for local files (Source)",
    "data.train.split": "refused for local files (Source)",
    "data.train.streaming": "refused for local files (Source)",
    "data.train.weight": "refused for rows that are only measured (test_rules.py)",
    "optimizer.groups": "a group without a parameter is refused (Optimizer.build)",
    "optimizer.lora_plus_ratio": "refused where there are no factors B (Optimizer.build)",
    "training.batch_size": "more than the rows of an epoch is a warning (test_setup_warnings.py)",
    "training.gradient_checkpointing": "offload without CUDA is a warning (prepare_layers)",
    "training.kernels": "layers that stay plain are a warning (test_setup_warnings.py)",
    "training.micro_batch_size": "no divisor of the batch is refused (test_rules.py)",
}
"""Key -> what happens where the model, its files or the rows are known."""

_VALUE = "every value does what it says"
_SECTION = "a section: its keys are listed by themselves"
_NUMBER = "a number of the algorithm: every allowed value changes the result"
_NAME = "a column or text: a row that lacks it is bad"
_TASK = "changes how answers are scored; qlora eval shows the result"

NONE = {
    "model": _SECTION, "quantization": _SECTION, "adapter": _SECTION, "data": _SECTION,
    "objective": _SECTION, "training": _SECTION, "optimizer": _SECTION, "evaluation": _SECTION,
    "output": _SECTION, "data.train": _SECTION, "data.audit": _SECTION, "data.evaluation": _SECTION,
    "data.train.format": _SECTION, "evaluation.forgetting": _SECTION,
    "evaluation.tasks.data": _SECTION,
    "model.path": _VALUE, "model.attention": _VALUE,
    "quantization.double_quant": _VALUE, "quantization.compute_dtype": _VALUE,
    "quantization.quant_storage": "only sharded training needs another one; the weights are equal",
    "quantization.outlier_threshold": _NUMBER, "quantization.dtype": _VALUE,
    "adapter.alpha": _NUMBER, "adapter.dropout": _NUMBER, "adapter.use_rslora": _VALUE,
    "adapter.beta1": _NUMBER, "adapter.beta2": _NUMBER, "adapter.orthogonality": _NUMBER,
    "adapter.decompose_both": _VALUE, "adapter.decompose_factor": _NUMBER,
    "adapter.oft_block_size": "PEFT takes the nearest size that divides the width",
    "adapter.size": _NUMBER, "adapter.activation": _VALUE, "adapter.after": _VALUE,
    "adapter.num_virtual_tokens": _NUMBER, "adapter.peft_type": _VALUE,
    "data.train.path": _VALUE, "data.train.shuffle": _VALUE,
    "data.train.limit": "a limit above the number of rows takes all of them, as it says",
    "data.train.format.field": _NAME, "data.train.format.prompt_field": _NAME,
    "data.train.format.completion_field": _NAME, "data.train.format.as_chat": _VALUE,
    "data.train.format.system": _NAME, "data.train.format.chosen_field": _NAME,
    "data.train.format.rejected_field": _NAME, "data.train.format.user": _NAME,
    "data.train.format.assistant": _NAME, "data.train.format.label_field": _NAME,
    "data.train.format.score_chosen_field": "a pair without scores has no margin",
    "data.train.format.score_rejected_field": "a pair without scores has no margin",
    "data.train.format.margin_field": "a pair without a margin has none",
    "data.train.format.text": _NAME,
    "objective.beta": _NUMBER, "objective.gamma": _NUMBER, "objective.loss": _VALUE,
    "objective.sft_weight": _NUMBER, "objective.ld_alpha": _NUMBER, "objective.reference": _VALUE,
    "objective.desirable_weight": _NUMBER, "objective.undesirable_weight": _NUMBER,
    "objective.labels": _VALUE, "objective.problem": _VALUE, "objective.class_weights": _NUMBER,
    "objective.center_rewards": _NUMBER, "objective.max_fall": "only a warning depends on it",
    "data.on_bad_row": _VALUE, "data.max_lost": _VALUE, "data.workers": "only the time changes",
    "data.audit.max_duplicates": _VALUE, "data.audit.max_truncated": _VALUE,
    "data.audit.min_learnt": _VALUE,
    "data.repair": "preview counts the rows that each repair changed",
    "training.seed": "orders the rows and starts the adapter, always",
    "training.max_steps": _VALUE, "training.max_grad_norm": _NUMBER,
    "training.max_bad_steps": "a run without an applied step fails whatever it says",
    "training.spike.factor": _NUMBER, "training.spike.window": _NUMBER,
    "training.spike.returns": "counts only with action go_back; warn never goes back",
    "optimizer.learning_rate": _NUMBER, "optimizer.beta1": _NUMBER, "optimizer.beta2": _NUMBER,
    "optimizer.beta3": _NUMBER, "optimizer.alpha": _NUMBER, "optimizer.eps": _NUMBER,
    "optimizer.beta2_decay": _NUMBER, "optimizer.clip_threshold": _NUMBER,
    "optimizer.momentum": _NUMBER, "optimizer.groups.match": _VALUE,
    "optimizer.groups.learning_rate": _NUMBER, "optimizer.groups.weight_decay": _NUMBER,
    "schedule.final_scale": "1 ends at the peak, as it says", "schedule.decay_share": _NUMBER,
    "schedule.decay": _VALUE, "schedule.power": _NUMBER,
    "evaluation.tasks.pattern": _TASK, "evaluation.tasks.ignore_case": _TASK,
    "evaluation.tasks.ignore_punctuation": _TASK, "evaluation.tasks.ignore_space": _TASK,
    "evaluation.tasks.anywhere": _TASK, "evaluation.tasks.tolerance": _TASK,
    "evaluation.tasks.variant": _TASK, "evaluation.tasks.stem": _TASK,
    "evaluation.tasks.question": _NAME, "evaluation.tasks.options": _NAME,
    "evaluation.tasks.answer": _NAME, "evaluation.tasks.as_chat": _VALUE,
    "evaluation.tasks.labels": _VALUE, "evaluation.tasks.window": _NUMBER,
    "evaluation.tasks.join": _VALUE, "evaluation.tasks.word_order": _TASK,
    "evaluation.forgetting.window": _NUMBER, "evaluation.forgetting.max_windows": _VALUE,
    "device": _VALUE, "output.dir": _VALUE,
    "output.trackers": "a package that is missing is refused",
}  # fmt: skip
"""Key -> why no plausible value is without effect."""


def keys_of(section: type[Config], prefix: str = "") -> Iterator[str]:
    """All keys, those of list items included; of sources, those of `data.train` stand for all."""
    for name, info in section.model_fields.items():
        is_again = issubclass(section, Source) and name in Source.model_fields
        if name == "type" or (is_again and prefix != "data.train."):
            continue
        yield f"{prefix}{name}"
        for below in FieldType.of(info).all_sections:
            yield from keys_of(below, f"{prefix}{name}.")


@pytest.fixture
def warnings(load: Callable[..., LoadedRecipe], minimal: str) -> Callable[..., list[str]]:
    return lambda *overrides: settings_without_effect(load(minimal, *overrides).recipe, STEPS)


def test_each_key_is_in_one_table() -> None:
    tables = [WARNED, REFUSED, AT_SETUP, NONE]
    listed = [key for table in tables for key in table]
    assert len(listed) == len(set(listed))
    new = sorted(set(keys_of(Recipe)) - set(listed))
    assert not new, (
        f"list in one of WARNED, REFUSED, AT_SETUP and NONE: {', '.join(new)}. A key that is "
        "always used goes into NONE, with `_VALUE` or the reason"
    )
    gone = sorted(set(listed) - set(keys_of(Recipe)))
    assert not gone, f"not keys of the recipe any more, so remove them here: {', '.join(gone)}"


@pytest.mark.parametrize(("overrides", "part"), [*WARNED.values(), *MORE.values()])
def test_a_value_without_effect_is_one_warning(
    warnings: Callable[..., list[str]], overrides: list[str], part: str
) -> None:
    [line] = warnings(*overrides)
    assert part in line


@pytest.mark.parametrize("key", WARNED)
def test_a_warning_begins_with_its_key(warnings: Callable[..., list[str]], key: str) -> None:
    [line] = warnings(*WARNED[key][0])
    known = key.replace("evaluation.tasks.", "evaluation.tasks[0].")
    assert line.startswith(known)


@pytest.mark.parametrize(("overrides", "part"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_cannot_be_meant_is_refused(
    problems: Callable[..., list[str]], minimal: str, overrides: list[str], part: str
) -> None:
    [line] = problems(minimal, *overrides)
    assert part in line


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule={type: cosine, warmup_steps: 100}"],
        ["schedule={type: inverse_root, warmup_steps: 10}"],
        [HELD_OUT, "training.eval_every=25", "training.patience=2"],
        [HELD_OUT, "training={eval_every: 100, save_every: 100, log_every: 100}"],
        [HELD_OUT, "data.audit.max_overlap=0.1", "evaluation.batch_size=2"],
        [TASK, "training.tasks_every=50", "evaluation={limit: 5, max_new_tokens: 8}"],
        [TEXT, "data.truncate=split"],
        ["data.seed=7", "data.train.shuffle=true"],
        ["data.seed=7", "data.evaluation_share=0.1"],
        ["data.chat_template=chatml.jinja", "data.train.learn_turns=last"],
        ["output.keep_checkpoints=5", "training.save_every=10"],
        ["adapter={type: adalora}", "optimizer={type: ademamix, slow_warmup_steps: 100}"],
        ["model={path: owner/model, revision: main}"],
        ["training.spike={}"],
    ],
    ids=str,
)
def test_settings_with_an_effect_are_not_warned_of(
    warnings: Callable[..., list[str]], overrides: list[str]
) -> None:
    assert not warnings(*overrides)


def test_without_a_length_only_what_is_sure_is_said(
    load: Callable[..., LoadedRecipe], minimal: str
) -> None:
    recipe = load(minimal, "schedule={type: linear, warmup_steps: 200}", "data.seed=7").recipe
    [line] = settings_without_effect(recipe, None)
    assert line.startswith("data.seed")


CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_own_recipes_have_no_setting_without_effect(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert not settings_without_effect(recipe, recipe.training.max_steps)
