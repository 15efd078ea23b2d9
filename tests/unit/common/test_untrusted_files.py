"""Nothing that is read in a folder lies outside of it, has no end, or is other than it says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.adapters.files import read_adapter
from qlora_cli.common.untrusted_files import MAX_JSON_DEPTH, object_of, read_object, refuse_foreign
from qlora_cli.errors import ModelError, QloraError, RecipeError
from qlora_cli.models.base import BaseModelConfig, load_model
from qlora_cli.models.shards import INDEX, Shards
from qlora_cli.models.tokenizer import load_tokenizer, stop_token_ids
from qlora_cli.recipe.schema import Recipe


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


def each_reader(model: Path) -> list[Callable[[], object]]:
    return [
        BaseModelConfig(path=str(model)).locate,
        lambda: load_model(model),
        lambda: load_tokenizer(model),
        lambda: Shards(model),
    ]


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:x.safetensors", 5]
)
def test_an_index_names_files_of_its_own_folder_alone(model: Path, name: object) -> None:
    weights = model / "model.safetensors"
    shutil.copy(weights, model.parent / "model.safetensors")
    weights.rename(model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / INDEX).write_text(json.dumps(index), encoding="utf-8")
    for read in each_reader(model):
        with pytest.raises(ModelError, match="only files of its own folder"):
            read()


@pytest.mark.parametrize("listed", [["../tokenizer.4.0.0.json"], ["/x/tokenizer.json"], "x"])
def test_a_tokenizer_names_files_of_its_own_folder_alone(model: Path, listed: object) -> None:
    change(model / "tokenizer_config.json", fast_tokenizer_files=listed)
    for read in each_reader(model):
        with pytest.raises(ModelError, match="only files of its own folder"):
            read()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "chat_template.jinja", "README.md"]
)
def test_a_link_out_is_refused_by_every_reader(model: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (model / name).exists():
        (model / name).rename(outside)
    else:
        outside.write_text("x", encoding="utf-8")
    (model / name).symlink_to(outside)
    for read in each_reader(model):
        with pytest.raises(ModelError, match="is a link out of its folder"):
            read()


def test_a_folder_of_templates_that_is_a_link_out_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        load_tokenizer(model)
    (model / "additional_chat_templates").unlink()
    (model / "additional_chat_templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("x", encoding="utf-8")
    (model / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "templates" / "x.jinja")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        load_tokenizer(model)


def test_links_within_a_folder_and_in_the_cache_of_the_hub_are_followed(
    model: Path, tmp_path: Path
) -> None:
    (model / "config.json").rename(model / "real.json")
    (model / "config.json").symlink_to("real.json")
    refuse_foreign(model)

    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    for read in each_reader(snapshot):
        assert read() is not None
    # Also from a link to the snapshot, as people make them.
    (tmp_path / "short").symlink_to(snapshot)
    for read in each_reader(tmp_path / "short"):
        assert read() is not None
    (snapshot / "LICENSE").symlink_to(tmp_path / "hub")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        refuse_foreign(snapshot)


def test_json_is_an_object_of_bounded_depth() -> None:
    assert object_of(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    deep = b'{"a":' * (MAX_JSON_DEPTH - 1) + b"1" + b"}" * (MAX_JSON_DEPTH - 1)
    assert object_of(deep)
    for depth in (MAX_JSON_DEPTH + 1, 100_000):
        with pytest.raises(ValueError, match="nested"):
            object_of(b'{"a":' * depth + b"1" + b"}" * depth)
        with pytest.raises(ValueError, match="nested"):
            object_of(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    for other in (b"[]", b"1", b"null", b"", b"{", b"\xff\xfe\x00"):
        with pytest.raises(ValueError):  # noqa: PT011  the messages are those of json
            object_of(other)


def test_pipes_and_huge_files_are_refused_as_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_object(tmp_path / "config.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(ValueError, match="larger than"):
        read_object(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", load_model),
        ("tokenizer_config.json", load_tokenizer),
        ("tokenizer.json", load_tokenizer),
        ("generation_config.json", stop_token_ids),
    ],
)
def test_endlessly_nested_settings_are_an_error(
    model: Path, name: str, read: Callable[[Path], object]
) -> None:
    (model / name).write_text('{"a":' * 100_000, encoding="utf-8")
    with pytest.raises(ModelError, match=r"nested|recursion|tokenizer"):
        read(model)


def test_a_pipe_among_the_weights_is_not_waited_for(model: Path) -> None:
    os.mkfifo(model / "more.safetensors")
    (model / "model.safetensors").rename(model / "other.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        Shards(model)


ELSEWHERE: list[dict[str, Any]] = [
    {"megatron_config": {"hidden_size": 1}, "megatron_core": "named_by_an_adapter"},
    {"peft_type": "XLORA", "adapters": {"a": "../other"}},
    {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "x/y"},
]
HOSTILE: list[dict[str, Any]] = [
    {"r": 0}, {"r": "16"}, {"r": 1.5}, {"r": True}, {"lora_alpha": "x"}, {"lora_alpha": None},
    {"lora_alpha": 10**400}, {"target_modules": 5}, {"target_modules": [["x"]]},
    {"rank_pattern": {"x": -1}}, {"alpha_pattern": ["x"]}, {"peft_type": None},
    {"peft_type": "NONE"}, {"runtime_config": 5, "layers_to_transform": {}},
]  # fmt: skip


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    from qlora_cli.adapters import LoRA

    model = load_model(tiny_model)
    LoRA(r=4).save(LoRA(r=4).attach(model), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("settings", ELSEWHERE, ids=str)
def test_settings_of_an_adapter_that_name_code_or_files_are_an_error(
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    from qlora_cli.adapters import LoRA

    (tmp_path / "named_by_an_adapter.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    change(adapter / "adapter_config.json", **settings)
    with pytest.raises(ModelError, match="names code or files outside of the folder"):
        LoRA().load(load_model(tiny_model), adapter)


@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_impossible_adapter_settings_are_an_error(
    adapter: Path, tiny_model: Path, settings: dict[str, Any]
) -> None:
    from qlora_cli.adapters import LoRA

    change(adapter / "adapter_config.json", **settings)
    with pytest.raises(ModelError):
        LoRA().load(load_model(tiny_model), adapter)


def test_a_rank_that_no_tensor_has_takes_no_memory(adapter: Path, tiny_model: Path) -> None:
    from qlora_cli.adapters import LoRA

    change(adapter / "adapter_config.json", r=10**12, rank_pattern={"q_proj": 4, "x": 10**12})
    config, _ = read_adapter(adapter)
    assert config.r <= 64
    with pytest.raises(ModelError, match="does not fit"):
        LoRA().load(load_model(tiny_model), adapter)


def test_an_endless_expression_is_stopped(adapter: Path, tiny_model: Path) -> None:
    from qlora_cli.adapters import LoRA

    change(adapter / "adapter_config.json", target_modules="(([a-z._0-9]+)+)+!")
    with pytest.raises(ModelError, match="not finished after"):
        LoRA().load(load_model(tiny_model), adapter)


def test_an_adapter_without_settings_is_not_looked_for_on_the_hub(
    adapter: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.watch import watching

    monkeypatch.chdir(adapter.parent.parent)
    (adapter / "adapter_config.json").unlink()
    # Of the form of a name on the hub.
    name = adapter.relative_to(adapter.parent.parent)
    with watching() as watch, pytest.raises(ModelError, match="adapter_config"):
        read_adapter(name)
    assert watch.sockets == []


HEADERS: list[dict[str, Any]] = [
    {"x": 5},
    {"x": {}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 4]}},
    {"x": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": "04"}},
    {"__metadata__": 5},
    {"__metadata__": {"a": {}}},
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_an_implausible_header_is_an_error(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ModelError, match="is not a safetensors file"):
        Shards(path)


def test_every_kind_of_number_has_its_size() -> None:
    import torch

    from qlora_cli.common.safetensors_writer import DTYPES, item_bytes

    for name, torch_name in DTYPES.items():
        assert item_bytes(name) == getattr(torch, torch_name).itemsize


PINNED = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "revision", "is_refused"),
    [
        ("a/b", None, True), ("a/b", "main", True), ("a/b", "v1.0", True),
        ("a/b", PINNED[:12], True), ("a/b", PINNED, False), ("HERE", None, False),
    ],
)  # fmt: skip
def test_code_of_a_model_is_pinned_or_here(
    tmp_path: Path, path: str, revision: str | None, is_refused: bool
) -> None:
    assert not BaseModelConfig(path="a/b").trust_remote_code
    path = str(tmp_path) if path == "HERE" else path
    settings = {"path": path, "revision": revision, "trust_remote_code": True}
    if is_refused:
        with pytest.raises(ValueError, match="full commit"):
            BaseModelConfig.model_validate(settings)
    else:
        assert BaseModelConfig.model_validate(settings).trust_remote_code


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path("{mark}").touch()
class Own(LlamaForCausalLM):
    pass
"""


def test_code_of_a_model_runs_only_where_it_is_trusted(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model / "own.py").write_text(CODE.format(mark=mark), encoding="utf-8")
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    load_model(BaseModelConfig(path=str(model)).locate(), trust_remote_code=False)
    assert not mark.exists()
    trusted = BaseModelConfig(path=str(model), trust_remote_code=True)
    assert type(load_model(trusted.locate(), trust_remote_code=True)).__name__ == "Own"
    assert mark.exists()


def test_code_from_another_repository_is_refused(model: Path) -> None:
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "other/code--own.Own"})
    with pytest.raises(ModelError, match=r"takes code from other/code"):
        BaseModelConfig(path=str(model), trust_remote_code=True).locate()
    assert BaseModelConfig(path=str(model)).locate() == model


def test_a_run_with_a_link_out_is_not_written_to(
    tmp_path: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    from qlora_cli.runs.run_folder import RunFolder

    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    root = tmp_path / "run"
    root.mkdir()
    (root / "run.json").write_text("{}", encoding="utf-8")
    (root / "recipe.yaml").symlink_to(tmp_path / "mine")
    with pytest.raises(QloraError, match="is a link out of its folder"):
        RunFolder(root).start(resume=True)
    with pytest.raises(QloraError, match="is a link out of its folder"):
        RunFolder(root).weights("last")
    (root / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match="does not exist"):
        RunFolder(root).weights("last")
