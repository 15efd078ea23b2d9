"""Base, adapter and row length that do not go together are refused without any data."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from qlora_cli.cli import main
from qlora_cli.errors import DataError, ModelError
from qlora_cli.inspect.bad_rows import write_bad_rows
from qlora_cli.loop.run_data import read_recipe_data
from qlora_cli.models.known_configs import find_known
from qlora_cli.models.miniature import MAX_LAYERS, shrink_config
from qlora_cli.plan.compatibility import check_compatibility, check_model
from tests.conftest import exit_code

ALL = ["forward", "backward", "save", "load", "merge"]


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    ("adapter", "steps"),
    [
        ({"type": "lora"}, ALL),
        ({"type": "lora", "r": 64, "use_dora": True}, ALL),
        ({"type": "lora", "trainable_token_indices": [3, 259]}, ALL),
        ({"type": "lora", "layers_to_transform": [1]}, ALL),
        ({"type": "lora", "init": "pissa", "r": 4}, ALL),
        ({"type": "full"}, ALL),
        ({"type": "freeze"}, ALL),
        ({"type": "ia3"}, ALL),
        ({"type": "oft"}, ALL),
        ({"type": "prefix"}, ALL[:-1]),
        ({"type": "bottleneck"}, ALL[:-1]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_goes_together_passes_every_step(
    tiny_recipe: Callable[..., Any], adapter: dict[str, Any], steps: list[str]
) -> None:
    found = check_compatibility(tiny_recipe(adapter=adapter))
    assert (found.not_checked, found.steps) == ("", steps)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_base_passes_too(tiny_recipe: Callable[..., Any], quantization: str) -> None:
    found = check_model(tiny_recipe(quantization={"type": quantization}))
    assert (found.not_checked, found.steps) == ("", ALL)


def config_only(folder: Path, config: Any) -> dict[str, str]:
    config.save_pretrained(folder)
    return {"path": str(folder)}


MOE = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sections", "said"),
    [
        (GPT2Config(n_positions=64, n_layer=2), {"data": {"max_length": 65}}, r"\(65\).*wpe.* 64"),
        (
            OPTConfig(max_position_embeddings=64, num_hidden_layers=2, word_embed_proj_dim=768),
            {"data": {"max_length": 65}},
            r"\(65\).*embed_positions.* 64",
        ),
        (
            Qwen3MoeConfig(**MOE),
            {"adapter": {"type": "lora", "init": "pissa"}},
            "adapter: PEFT refuses it",
        ),
        (
            Qwen3MoeConfig(**MOE),
            {"adapter": {"type": "freeze", "last_layers": 1}},
            "can be trained, but not merged",
        ),
        (Qwen3MoeConfig(**MOE), {"quantization": {"type": "nf4"}}, "stayed unquantized"),
        (
            Qwen3MoeConfig(**MOE),
            {"adapter": {"type": "lora", "target_modules": ["qproj"]}},
            "'qproj' matches no module",
        ),
        (
            Qwen3MoeConfig(**{**MOE, "pad_token_id": 300}),
            {},
            "cannot be built",
        ),
    ],
)
def test_what_does_not_is_refused(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    config: Any,
    sections: dict[str, Any],
    said: str,
) -> None:
    model = config_only(tmp_path / "base", config)
    with pytest.raises(ModelError, match=said):
        check_model(tiny_recipe(model=model, **sections))


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows longer than the positions": (
        GPT2Config(n_positions=64, n_layer=2), {"data": {"max_length": 65}},
    ),
    "trained, but not merged": (
        Qwen3MoeConfig(**MOE), {"adapter": {"type": "freeze", "last_layers": 1}},
    ),
    "an unknown module": (
        Qwen3MoeConfig(**MOE), {"adapter": {"type": "lora", "target_modules": ["qproj"]}},
    ),
    "mostly unquantized": (Qwen3MoeConfig(**MOE), {"quantization": {"type": "nf4"}}),
    "a module of Mamba": (MambaConfig(num_hidden_layers=2), {}),
    "no such folder": (None, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_validate_plan_and_train_refuse_in_the_same_words(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """They read no data before: there is none. A refused start leaves nothing on the disk."""
    config, sections = REFUSED[name]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    model = {"path": str(tmp_path / "base")}
    if config is not None:
        config.save_pretrained(tmp_path / "base")
    data = {"train": {"path": "nowhere.jsonl"}, "evaluation": None, **sections.get("data", {})}
    recipe = write_recipe(**{**sections, "model": model, "data": data})
    before = sorted(tmp_path.rglob("*"))
    said = []
    for command in (("validate", "--deep"), ("plan", "--device", "cpu"), ("train",)):
        assert exit_code(command[0], recipe, *command[1:]) == 3
        said.append(capsys.readouterr().err.partition("error: ")[2])
    assert said[0]
    assert said == [said[0]] * 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refusal_without_another_hint_keeps_its_cause(
    tiny_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = ValueError("of transformers")

    def refuse(*arguments: object) -> None:
        raise ModelError("training fails") from cause

    monkeypatch.setattr("qlora_cli.plan.compatibility.dry_run_miniature", refuse)
    # Not in `_CHECKED`, which has the results of other tests.
    recipe = tiny_recipe(adapter={"type": "bottleneck"}, data={"max_length": 61})
    with pytest.raises(ModelError, match="training fails") as caught:
        check_model(recipe)
    assert caught.value.__cause__ is cause


def test_a_check_leaves_the_process_as_it_was(tiny_recipe: Callable[..., Any]) -> None:
    """Otherwise the losses of a run would depend on it."""

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()),
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
            torch.is_grad_enabled(), sorted(AttentionInterface().keys()), dict(os.environ),
            gc.isenabled(), logging.getLogger("qlora").disabled,
        ]  # fmt: skip

    before = state()
    for sections in ({"adapter": {"r": 3}}, {"adapter": {"r": 3}, "quantization": {"type": "nf4"}}):
        assert check_model(tiny_recipe(**sections)).steps == ALL
        assert state() == before


def test_without_room_for_the_miniature_there_is_no_refusal(
    tiny_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    found = check_model(tiny_recipe(adapter={"r": 5}))
    assert (found.steps, found.not_checked[:19]) == ([], "no temporary folder")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B"])
def test_a_miniature_is_small_and_has_the_kinds_of_layers(name: str) -> None:
    from transformers import AutoConfig

    known = find_known(name)
    assert known is not None
    config = AutoConfig.for_model(**known[1])
    small = shrink_config(config, vocab_size=512)
    assert type(small) is type(config)
    assert small.num_hidden_layers <= MAX_LAYERS
    assert (small.hidden_size, small.vocab_size) == (64, 512)
    assert config.hidden_size > 64


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
COMPLETION = {"format": {"type": "prompt_completion"}}
ASK = {"role": "user", "content": "a"}
ARGUMENTS = json.dumps({"a": 1})
CALL = {"messages": [ASK, {"role": "assistant", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
]}]}  # fmt: skip
CUT = {"messages": [ASK, {"role": "assistant", "content": "b" * 500}]}
LONG = {"messages": [{"role": "user", "content": "a" * 500}, CHAT["messages"][1]]}


@pytest.mark.parametrize("side", ["train", "evaluation"])
@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([PAIR], {}, "rows.jsonl:1: a preference row ('chosen' and 'rejected')"),
        ([CHAT, PAIR], {}, "rows.jsonl:2: a preference row"),
        ([PAIR], {"shuffle": True, "limit": 1}, "rows.jsonl:1: a preference row"),
        ([PAIR], COMPLETION, "rows.jsonl:1: a preference row"),
        (
            [PAIR],
            {"format": {"type": "preference"}},
            "format.type (preference) reads pairs",
        ),
        ([{"prompt": "a", "completion": "b", "label": False}], COMPLETION, "and 'label')"),
        ([{"text": "a"}], {}, "field 'messages': missing; found 'text'"),
        ([CALL], {}, "rows.jsonl: 1 bad row"),
        ([CALL] * 120, {}, "rows.jsonl: 120 bad rows"),
        ([CALL, {"text": "a"}], {}, "rows.jsonl: 2 bad rows"),
        ([LONG] * 3, {"format": {"type": "messages"}}, "3 of 3 answers are lost"),
        ([CALL] * 120 + [CHAT], {}, "rows.jsonl: 120 bad rows"),
        ([CHAT, {"text": "a"}], {}, "rows.jsonl: 1 bad row"),
        ([CHAT] * 99 + [{"text": "a"}], {}, "rows.jsonl: 1 bad row"),
        ([CHAT, CUT], {}, "1 of 2 answers are lost"),
        ([CHAT, CUT] * 50, {}, "50 of 100 answers are lost"),
        ([CHAT] * 19 + [CUT], {}, None),  # data.max_lost allows it
        (
            [{"prompt": "a", "chosen": "b"}],
            {"fields": {"completion": "chosen"}, **COMPLETION},
            None,
        ),
    ],
)
def test_validate_deep_refuses_the_rows_that_train_refuses(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    side: str,
    rows: list[Any],
    settings: dict[str, Any],
    said: str | None,
) -> None:
    good, path = tmp_path / "good.jsonl", tmp_path / "rows.jsonl"
    good.write_text(json.dumps(CHAT) + "\n", encoding="utf-8")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": {"path": str(good)}, "evaluation": {"path": str(good)}}
    recipe = tiny_recipe(data={**data, side: {"path": str(path), **settings}})
    if said is None:
        assert check_compatibility(recipe).steps == ALL
        return
    with pytest.raises(DataError) as deep:
        check_compatibility(recipe)
    assert said in str(deep.value)
    with pytest.raises(DataError) as training:
        read_recipe_data(recipe, use_cache=False)
    assert (str(training.value), training.value.hint) == (str(deep.value), deep.value.hint)


@pytest.mark.parametrize("labels", [["a", "c"], ["c"], ["b", "b"]])
def test_validate_deep_and_bad_rows_find_labels_that_the_objective_does_not_know(
    tiny_recipe: Callable[..., Any], tmp_path: Path, labels: list[str]
) -> None:
    path, listed = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    rows = [{"text": "Hi", "label": label} for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny_recipe(
        data={"train": {"path": str(path), "format": {"type": "labelled"}}, "evaluation": None},
        objective={"type": "classify", "labels": ["a", "b"]},
    )
    unknown = labels.count("c")
    assert write_bad_rows(recipe, listed) == unknown
    if not unknown:
        assert check_compatibility(recipe).steps == ALL
        return
    with pytest.raises(DataError, match=r"label: 'c' is not one of objective.labels") as deep:
        check_compatibility(recipe)
    with pytest.raises(DataError) as training:
        read_recipe_data(recipe, use_cache=False)
    assert (str(training.value), training.value.hint) == (str(deep.value), deep.value.hint)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([CHAT, CUT] * 60, {}, "of the first 100 rows: {path}: 50 of 100 answers are lost"),
        ([CHAT, CUT], {"shuffle": True, "limit": 2}, "answers are lost"),
        ([CHAT, {"text": "a"}], {"shuffle": True, "limit": 1}, "rows: 1 bad row\n"),
    ],
)
def test_validate_deep_warns_of_what_other_rows_may_outweigh(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rows: list[Any],
    settings: dict[str, Any],
    said: str,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(path), **settings}
    check_compatibility(tiny_recipe(data={"train": source, "evaluation": None}))
    assert said.format(path=path) in caplog.text


@pytest.mark.parametrize("number", [1, 2])
def test_validate_deep_refuses_files_that_are_not_here(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    data: dict[str, Any] = {"train": {"path": str(tmp_path / "row.jsonl")}, "evaluation": None}
    if number == 2:
        data["evaluation"] = {"path": str(tmp_path / "nothing.csv")}
    assert exit_code("validate", write_recipe(data=data), "--deep") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "hint: without --deep, qlora validate checks a recipe for another machine"
    assert f"error: {number} problems" in lines or number == 1
    [line] = [line for line in lines if "data.train.path" in line]
    assert f"did you mean {tmp_path / 'rows.jsonl'}?" in line


def test_validate_deep_says_what_was_tried(
    tiny_recipe: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_cli.recipe.load import dump_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe()), "utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(recipe), "--deep", "--json"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["compatibility"]["steps"] == ALL
    with pytest.raises(SystemExit):
        main(["validate", str(recipe), "--deep"])
    assert re.search("# dry run of one row .*merge work", capsys.readouterr().out)
