from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from benchmarks.merge_memory import make_base, make_run
from benchmarks.merge_memory import merge as merge_within
from qlora_cli.common.digests import DIGESTS
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.evaluate.evaluate import evaluate
from qlora_cli.export.merge import merge
from qlora_cli.models.shards import Shards
from qlora_cli.train.train import train
from tests.conftest import save_tiny_model


@pytest.fixture
def run(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Train a little on a sharded base; the folder of the run."""

    def make(**sections: Any) -> Path:
        base = tmp_path / "base"
        save_tiny_model(base, dtype="bfloat16", hidden_size=64)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="60KB")
        train(tiny_recipe(model={"path": str(base)}, **sections))
        return tmp_path / "run"

    return make


def change(run: Path, change_one: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = run / "last" / "adapter_model.safetensors"
    tensors = load_file(path)
    change_one(tensors)
    save_file(tensors, path)
    path.with_name(DIGESTS).unlink()


def test_files_names_and_dtypes_match_the_base(run: Callable[..., Path], tmp_path: Path) -> None:
    merge(run(quantization={"type": "nf4"}), tmp_path / "merged", weights="last")
    base, merged = Shards(tmp_path / "base"), Shards(tmp_path / "merged")
    assert len(base.files) > 2
    assert [file.name for file in merged.files] == [file.name for file in base.files]
    for name, stored in base.tensors.items():
        found = merged.tensors[name]
        assert (found.file.name, found.dtype, found.shape) == (
            stored.file.name, stored.dtype, stored.shape,
        )  # fmt: skip
        is_linear = "proj" in name
        assert (merged.digest(name) != base.digest(name)) is is_linear
    others = {path.name for path in (tmp_path / "base").iterdir() if path.suffix == ".json"}
    assert others <= {path.name for path in (tmp_path / "merged").iterdir()}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_the_report_has_figures_for_both_bases(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run(quantization={"type": "nf4"}, training={"max_steps": 8})
    reports = {
        base: merge(folder, tmp_path / base, weights="last", base=base)
        for base in ("as-trained", "original")
    }
    as_trained, original = reports["as-trained"], reports["original"]
    assert (
        json.loads((tmp_path / "original" / "merge.json").read_text("utf-8")) == original.to_json()
    )
    for report in reports.values():
        choices = report.comparison.choices
        assert choices["as-trained"].kl < choices["original"].kl / 3
        assert all((choice.loss or 0) > 0 for choice in choices.values())
        assert report.comparison.held_out
        assert 0 < report.update.rounding_error < 0.1
        assert report.update.quantization_error > report.update.rounding_error
        assert report.kl < 1e-3
    assert as_trained.update.norm == pytest.approx(original.update.norm, rel=1e-5)
    # The default for a quantized run.
    assert merge(folder, tmp_path / "default", weights="last").base == "as-trained"


def test_without_quantization_the_base_is_the_original(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    report = merge(run(), tmp_path / "merged", weights="last")
    assert report.base == "original"
    assert list(report.comparison.choices) == ["original"]
    assert report.update.quantization_error is None


def test_in_float32_a_merge_changes_no_logit(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    train(tiny_recipe())
    report = merge(tmp_path / "run", tmp_path / "merged", weights="last")
    assert report.logit_error < 1e-5


@pytest.mark.parametrize(
    "adapter", [{"type": "full"}, {"type": "freeze", "last_layers": 0, "patterns": ["embed"]}]
)
def test_a_head_that_is_the_embedding_is_changed_with_it(
    tiny_recipe: Callable[..., Any], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    base = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    train(tiny_recipe(model={"path": str(base)}, adapter=adapter))
    report = merge(tmp_path / "run", tmp_path / "merged", weights="last")
    assert report.logit_error < 1e-5
    assert list(Shards(tmp_path / "merged").tensors) == list(Shards(base).tensors)


EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **EXPERTS, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
GLM: dict[str, Any] = {**EXPERTS, "head_dim": 8}


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    ("family", "config", "adapter"),
    [
        ("DeepseekV3", DEEPSEEK, {}),
        ("DeepseekV3", DEEPSEEK, {"type": "loha", "r": 4, "target_modules": ["kv_b_proj"]}),
        ("DeepseekV3", DEEPSEEK, {"type": "freeze", "patterns": [r"\.gate\."], "last_layers": 0}),
        ("Glm4Moe", GLM, {}),
        ("Glm4Moe", GLM, {"target_modules": ["mlp.gate", "q_proj"]}),
        ("Dots1", GLM, {}),
    ],
)
def test_the_buffer_of_a_router_is_copied(
    tiny_recipe: Callable[..., Any],
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    adapter: dict[str, Any],
) -> None:
    base = save_tiny_model(tmp_path / "base", family=family, **config)
    tensors = load_file(base / "model.safetensors")
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        torch.nn.init.normal_(tensors[name])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    method = adapter if "type" in adapter else {"type": "lora", "r": 4, "alpha": 8, **adapter}
    train(tiny_recipe(model={"path": str(base)}, adapter=method))
    assert merge(tmp_path / "run", tmp_path / "merged", weights="last").logit_error < 1e-5
    before, after = Shards(base), Shards(tmp_path / "merged")
    assert list(after.tensors) == list(before.tensors)
    assert all(after.digest(name) == before.digest(name) for name in biases)


def test_lora_on_an_embedding_with_a_computed_scale_is_merged(
    tiny_recipe: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Gemma 3 scales its embedding by a buffer that is not in the files."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    settings = json.loads((base / "config.json").read_text("utf-8"))
    config = Gemma3TextConfig(**{**settings, "model_type": "gemma3_text", "head_dim": 8})
    Gemma3ForCausalLM(config).save_pretrained(base)
    adapter = {"type": "lora", "r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    train(tiny_recipe(model={"path": str(base)}, adapter=adapter))
    assert merge(tmp_path / "run", tmp_path / "merged", weights="last").logit_error < 1e-5


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_experts_that_the_files_hold_apart_are_merged_one_by_one(
    tiny_recipe: Callable[..., Any], tiny_model: Path, tmp_path: Path, adapter: str
) -> None:
    """All linear layers of a Mixtral are trained by default, and its experts among them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    settings = json.loads((base / "config.json").read_text("utf-8"))
    config = MixtralConfig(**{**settings, "model_type": "mixtral"}, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(base)
    train(tiny_recipe(model={"path": str(base)}, adapter={"type": adapter}))
    report = merge(tmp_path / "run", tmp_path / "merged", weights="last")
    assert report.logit_error < 1e-5
    before, after = Shards(base), Shards(tmp_path / "merged")
    assert list(after.tensors) == list(before.tensors)
    experts = [name for name in before.tensors if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(before.digest(name) != after.digest(name) for name in experts)


@pytest.mark.quick_every(2)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items()}), "nothing to merge"),
        (lambda t: t.update({k: v * 1e-5 for k, v in t.items()}), "did not change"),
        (lambda t: t[sorted(t)[0]].fill_(float("nan")), "not finite"),
        (lambda t: t.pop(sorted(t)[0]), "missing:"),
        (lambda t: t.update({"base_model.model.odd.lora_A.weight": torch.ones(2, 2)}), "odd"),
    ],
    ids=["zero", "below the grid", "nan", "missing", "too much"],
)
def test_a_wrong_adapter_leaves_no_merged_folder(
    run: Callable[..., Path], tmp_path: Path, damage: Callable[[Any], None], message: str
) -> None:
    folder = run()
    change(folder, damage)
    with pytest.raises(ModelError, match=message):
        merge(folder, tmp_path / "merged", weights="last", with_logits=False)
    assert not list(tmp_path.glob("*merged*"))


def test_a_folder_has_its_name_when_its_files_are_on_the_disk(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flushed, flush = run(), set(), os.fsync

    def note(place: int) -> None:
        if not (tmp_path / "merged").exists():
            flushed.add(os.fstat(place).st_ino)
        flush(place)

    monkeypatch.setattr(os, "fsync", note)
    merge(folder, tmp_path / "merged", weights="last", with_logits=False)
    assert {path.stat().st_ino for path in (tmp_path / "merged").iterdir()} <= flushed


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_merging_uses_the_precision_of_the_training(
    run: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    """`auto` takes one on the machine that trains, and maybe another on the one that merges."""
    folder = run(quantization={"type": "nf4"}, training={"precision": precision})
    merge(folder, tmp_path / "named", weights="last", with_logits=False)
    recipe = folder / "recipe.yaml"
    text = recipe.read_text("utf-8")
    assert f"precision: {precision}" in text
    recipe.write_text(text.replace(f"precision: {precision}", "precision: auto"), "utf-8")
    merge(folder, tmp_path / "auto", weights="last", with_logits=False)
    named, auto = Shards(tmp_path / "named"), Shards(tmp_path / "auto")
    assert all(named.digest(name) == auto.digest(name) for name in named.tensors)


def test_a_disk_that_is_full_after_all_leaves_no_folder(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        with pytest.raises(RecipeError, match="could not be written, and nothing is left of it"):
            merge(folder, tmp_path / "merged", weights="last", with_logits=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*merged*"))


def test_another_base_of_equal_shapes_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    """Every tensor would fit, and every proof would hold: of a model that nobody trained."""
    folder = run()
    other = save_tiny_model(tmp_path / "other", dtype="bfloat16", hidden_size=64)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"trained on .*base, but the base is now .*other, which"):
        merge(folder, tmp_path / "merged", [f"model.path={other}"], weights="last")
    with pytest.raises(ModelError, match="which has other weights"):
        evaluate(folder, [f"model.path={other}"])
    assert not list(tmp_path.glob("*merged*"))
    # The same weights in another place are the same base.
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    moved = [f"model.path={tmp_path / 'moved'}"]
    merge(folder, tmp_path / "merged", moved, weights="last", with_logits=False)


def test_a_full_disk_is_noticed_before_anything_is_written(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run()
    monkeypatch.setattr("qlora_cli.export.merge.free_bytes", lambda path: 1000)
    with pytest.raises(RecipeError, match="MiB are needed"):
        merge(folder, tmp_path / "merged", weights="last")
    assert not list(tmp_path.glob("*merged*"))


def test_where_memory_is_short_only_the_weights_are_compared(
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = run()
    monkeypatch.setattr("qlora_cli.export.verify.free_memory", lambda: 1000)
    report = merge(folder, tmp_path / "merged", weights="last")
    assert report.kl is None
    assert "logits are not compared" in caplog.text


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 330 MB in shards of 64 MB, with a run in each kind."""
    place = tmp_path_factory.mktemp("large")
    make_base(place / "base", hidden=1024, layers=12, shard=2**26, vocabulary=512)
    for quantization in ("none", "nf4"):
        make_run(place / quantization, place / "base", quantization=quantization, r=4)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merging_needs_the_memory_of_one_shard(
    large: Path, tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Freed tensors go back to the system at once. Otherwise glibc keeps up to 50 MiB of them,
    # differently in each run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")

    def peak(base: Path, run: Path, name: str) -> int:
        text = merge_within(run, tmp_path / name, limit=0)
        return int(text.split()[-2]) * 1024

    small = tmp_path / "small"
    make_base(small / "base", hidden=64, layers=1, shard=2**24, vocabulary=512)
    make_run(small / "run", small / "base", quantization=quantization, r=4)
    shards = Shards(large / "base")
    largest = max(file.stat().st_size for file in shards.files)
    total = sum(file.stat().st_size for file in shards.files)
    adapter = (large / quantization / "last" / "adapter_model.safetensors").stat().st_size
    bound = largest + adapter
    assert total > 4 * bound
    alone = peak(small / "base", small / "run", "without")
    assert peak(large / "base", large / quantization, "merged") - alone <= bound


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_loads(large: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "qlora_cli", "merge", str(large / "none"),
        "--output", str(tmp_path / "merged"), "--no-logits",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / ".merged.unfinished"
    while not list(unfinished.glob("model-00003*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [unfinished.name]
    assert not (unfinished / "config.json").exists()
    merge_within(large / "none", tmp_path / "merged", limit=0)
    assert not unfinished.exists()
