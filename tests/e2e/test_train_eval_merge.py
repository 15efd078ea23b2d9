"""Train, evaluate and merge a tiny model from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.cli import main
from qlora_cli.inference.sampling import Sampling, TextGenerator
from qlora_cli.models.tokenizer import as_ids
from qlora_cli.recipe.load import load_recipe
from qlora_cli.types import Prompt
from tests.conftest import exit_code, mostly_slow, output_of, save_tiny_model


def qlora(*arguments: object) -> None:
    """Run a command in this process; a non-zero exit code is an error."""
    assert exit_code(*arguments) == 0


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("precision", mostly_slow(["bf16", "fp32"], "bf16"))
def test_train_eval_merge(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quantization: str,
    precision: str,
) -> None:
    recipe = write_recipe(
        quantization={"type": quantization},
        training={"max_steps": 6, "precision": precision, "eval_every": 3},
        evaluation={"tasks": [{"type": "exact_match"}], "max_new_tokens": 16},
    )
    run = tmp_path / "run"
    record = output_of(capsys, "train", recipe)
    assert record["status"] == "finished"
    logged = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]
    assert len(logged) == 3
    assert logged[-1] < logged[0]
    assert record["best"]["eval_loss"] == min(logged[1:])

    report = output_of(capsys, "eval", run)
    assert set(report["models"]) == {"base", "tuned"}
    # The same rows in the same batches: what training logged, but for the order of a sum.
    for model, expected in (("base", logged[0]), ("tuned", logged[-1])):
        assert report["models"][model]["loss"]["value"] == pytest.approx(expected, rel=1e-12)
    assert report["measures"]["exact_match"]["n"] == 6

    proof = output_of(capsys, "merge", run, "--output", tmp_path / "merged")
    assert proof["kl"] < 0.02
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in merged.config.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    assert as_ids(merged.generation_config.eos_token_id) == [tokenizer.eos_token_id]

    alone = output_of(capsys, "eval", tmp_path / "merged", "--recipe", recipe, "--tasks", "loss")
    assert set(alone["models"]) == {"merged"}
    assert alone["models"]["merged"]["loss"]["value"] == pytest.approx(logged[-1], abs=0.02)


def test_a_run_folder_explains_itself(
    write_recipe: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    qlora("train", write_recipe())
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "README.md", "best", "checkpoints", "last", "metrics.jsonl", "recipe.yaml", "run.json",
    }  # fmt: skip
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["packages"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert len(record["data"]["training"]["digest"]) == 64
    assert "qlora merge" in (run / "README.md").read_text(encoding="utf-8")

    # Plain PEFT loads the adapter, plain transformers the tokenizer in the same folder.
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, run / "last")
    tokenizer = AutoTokenizer.from_pretrained(run / "last")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say ab 2"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        with_adapter = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            without = adapted(input_ids=ids).logits
    assert not torch.allclose(with_adapter, without)


def test_the_saved_recipe_repeats_the_run(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    qlora("train", write_recipe())
    again = tmp_path / "again"
    qlora("train", tmp_path / "run" / "recipe.yaml", "--set", f"output.dir={again}")
    name = "last/adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.slow
def test_two_fresh_processes_give_byte_identical_adapters_and_another_seed_does_not(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        quantization={"type": "nf4"}, adapter={"dropout": 0.1}, training={"max_steps": 3}
    )
    adapters = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command = [
            sys.executable, "-m", "qlora_cli", "train", str(recipe),
            "--set", f"output.dir={tmp_path / name}", "--set", f"training.seed={seed}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # A clean run prints no library warnings.
        assert "warning" not in done.stderr.lower()
        assert "warning" not in done.stdout.lower()
        adapters.append((tmp_path / name / "last" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert adapters[0] != adapters[2]


def test_the_gradient_does_not_depend_on_micro_batching(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    curves = []
    for micro_batch_size in (8, 2, 1):
        run = tmp_path / f"run-{micro_batch_size}"
        recipe = write_recipe(
            training={"batch_size": 8, "micro_batch_size": micro_batch_size},
            output={"dir": str(run)},
        )
        qlora("train", recipe)
        curves.append([row["loss"] for row in metrics(run) if "loss" in row])
    # Float32 sums in another order.
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


def test_full_fine_tuning_trains_evaluates_and_exports(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        adapter={"type": "full"}, optimizer={"type": "adamw", "learning_rate": 1e-3}
    )
    record = output_of(capsys, "train", recipe)
    assert record["trained_weights"] == record["total_weights"]
    report = output_of(capsys, "eval", tmp_path / "run")
    last = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row][-1]
    assert report["models"]["tuned"]["loss"]["value"] == pytest.approx(last, rel=1e-12)
    qlora("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


def test_a_folder_with_a_run_is_not_overwritten(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    qlora("train", recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert exit_code("train", recipe) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    qlora("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert exit_code("merge", tmp_path / "run", "--output", tmp_path / "merged") == 2


@pytest.mark.parametrize(
    ("sections", "code", "message"),
    [
        ({"model": {"path": "./no/such/folder"}}, 3, "no such folder: ./no/such/folder"),
        ({"adapter": {"target_modules": ["q_porj"]}}, 3, "did you mean q_proj"),
        ({"data": {"train": {"path": "./nothing.jsonl"}}}, 2, "nothing.jsonl"),
        ({"optimizer": {"learning_rate": 1e30}}, 4, "the loss is nan"),
    ],
    ids=["model", "adapter", "data", "nan"],
)
def test_each_failure_has_its_own_exit_code(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    code: int,
    message: str,
) -> None:
    assert exit_code("train", write_recipe(**sections)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_local_paths_open_no_socket(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    qlora("train", write_recipe(quantization={"type": "nf4"}))
    qlora("eval", tmp_path / "run")
    qlora("merge", tmp_path / "run", "--output", tmp_path / "merged")


@pytest.mark.slow
def test_two_ranks_equal_one_rank(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        quantization={"type": "nf4"},
        # 16 rows in steps of 6: the last step is short, and one rank has fewer rows in it.
        training={
            "batch_size": 6, "micro_batch_size": 1, "max_steps": None, "epochs": 1,
            "tasks_every": 2,
        },
        # 6 held-out rows in batches of 2: one rank has a batch without rows.
        evaluation={
            "tasks": [{"type": "chrf"}], "limit": 3, "max_new_tokens": 4, "batch_size": 2,
        },
    )  # fmt: skip
    qlora("train", recipe)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_addr", "127.0.0.1", "--master_port", "0", "--standalone",
        "-m", "qlora_cli", "train", str(recipe), "--set", f"output.dir={tmp_path / 'two'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, together = metrics(tmp_path / "run"), metrics(tmp_path / "two")
    for name in ("loss", "eval_loss", "eval_chrf", "grad_norm"):
        expected = [row[name] for row in alone if name in row]
        assert expected
        # Float32 sums in another order.
        assert [row[name] for row in together if name in row] == pytest.approx(expected, abs=1e-4)
    assert [row.get("tokens") for row in together] == [row.get("tokens") for row in alone]


_SHARES = """
import torch
from qlora_cli.distributed.world import World

world = World()
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
shared = world.share(module)
for _ in range(3):  # what is exchanged is put in order after the first
    for i in range(2):
        with world.no_sync(shared, last=i == 1):
            shared(torch.full((1, 3), 1.0 + world.rank)).sum().backward()
    gradients = [weight.grad for weight in module.parameters()]
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    # Two micro-batches of 1 on the one, of 2 on the other: the mean over the ranks.
    expected = 2 * 1.5 * (module[1].weight.detach().T @ torch.ones(1, 3))
    torch.testing.assert_close(module[0].weight.grad, expected)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    module.zero_grad(set_to_none=True)
world.close()
"""


@pytest.mark.slow
def test_gradients_are_views_of_the_exchanged_buffer(tmp_path: Path) -> None:
    """Gradients are views of the exchanged buffer after the last micro-batch of a step."""
    script = tmp_path / "shares.py"
    script.write_text(_SHARES, encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "--master_addr", "127.0.0.1", "--master_port", "0", str(script),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.quick_every(2)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1e-6", "optimizer.learning_rate: 0.01 -> 1e-06"),
        ("optimizer.type=adamw_8bit", "optimizer.type: adamw -> adamw_8bit"),
        ("training.seed=5", "training.seed: 0 -> 5"),
        ("training.precision=fp16", "training.precision: fp32 -> fp16"),
    ],
)
def test_a_run_is_not_resumed_with_another_recipe(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    recipe = write_recipe(training={"max_steps": 2})
    qlora("train", recipe)
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert exit_code("train", recipe, "--resume", "auto", "--set", override) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_a_run_is_not_resumed_on_a_base_that_has_changed(
    write_recipe: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    recipe = write_recipe(model={"path": str(base)}, training={"save_every": 2})
    qlora("train", recipe)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    more = ["--resume", "auto", "--set", "training.max_steps=8"]
    assert exit_code("train", recipe, *more) == 2
    assert "the weights of model.path" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_rows(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(training={"max_steps": 2})
    qlora("train", recipe)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace("ab", "xy"), encoding="utf-8")
    assert exit_code("train", recipe, "--resume", "auto") == 2
    assert "the rows of data.train" in capsys.readouterr().err


def test_a_finished_run_can_be_made_longer_and_not_shorter(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(training={"max_steps": 2})
    qlora("train", recipe)
    qlora("train", recipe, "--resume", "auto", "--set", "training.max_steps=4")
    steps = [row["step"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert exit_code("train", recipe, "--resume", "auto", "--set", "training.max_steps=3") == 4
    assert "beyond the last step, 3" in capsys.readouterr().err


def test_a_run_stopped_in_its_last_evaluation_evaluates_on_resume(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(training={"max_steps": 2})
    qlora("train", recipe)
    run = tmp_path / "run"
    expected = metrics(run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    # As after a kill between the last checkpoint and the end of the evaluation after it.
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in expected[:-1]), encoding="utf-8"
    )
    (run / "best").rename(tmp_path / "lost-best")
    (run / "last").rename(tmp_path / "lost-last")
    del record["best"]
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    # And in that checkpoint's save, which had an older one still to remove.
    (run / "checkpoints" / ".step-00000001.removed").mkdir()
    qlora("train", recipe, "--resume", "auto")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert metrics(run)[-1] == expected[-1]
    assert (run / "best").is_dir()
    assert (run / "last").is_dir()


def test_weights_that_are_not_finite_are_never_saved(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        optimizer={"learning_rate": 1e30},
        training={"max_steps": 6, "log_every": 100, "save_every": 1, "max_grad_norm": None},
    )
    assert exit_code("train", recipe) == 4
    assert "not finite" in capsys.readouterr().err
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        saved = load_file(path / "trained.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not (tmp_path / "run" / "last").exists()


def test_fp16_trains_with_a_scaler_and_its_metrics_are_json(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    qlora("train", write_recipe(training={"max_steps": 8, "precision": "fp16"}))
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "Infinity" not in text
    assert "NaN" not in text
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]
    states = (tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json").read_text(
        encoding="utf-8"
    )
    assert '"scale"' in states


def test_generation_stops_at_every_token_that_ends_an_answer(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    qlora("train", write_recipe(training={"max_steps": 1}))
    saved = json.loads(
        (tmp_path / "run" / "last" / "generation_config.json").read_text(encoding="utf-8")
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "last")
    assert as_ids(saved["eos_token_id"]) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_only_the_newest_checkpoints_are_kept(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(
        training={"max_steps": 5, "save_every": 1},
        output={"dir": str(tmp_path / "run"), "keep_checkpoints": 3},
    )
    qlora("train", recipe)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"]


def test_merge_finds_a_base_that_was_moved(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_model(tmp_path / "base")
    qlora("train", write_recipe(model={"path": str(base)}, training={"max_steps": 1}))
    base.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")])
    assert caught.value.code == 3
    moved = f"model.path={tmp_path / 'moved'}"
    report = output_of(
        capsys, "merge", tmp_path / "run", "--output", tmp_path / "merged", "--set", moved
    )
    assert report["kl"] < 1e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_merge_that_differs_from_the_trained_model_is_refused_and_leaves_nothing(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qlora("train", write_recipe())
    monkeypatch.setattr("qlora_cli.export.verify.MAX_KL", -1.0)
    assert exit_code("merge", tmp_path / "run", "--output", tmp_path / "merged") == 3
    assert "not the trained one" in capsys.readouterr().err
    assert not list(tmp_path.glob("*merged*"))


def test_a_base_that_lacks_a_weight_is_refused_by_name(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = save_tiny_model(tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(model={"path": str(damaged)})
    assert exit_code("train", recipe) == 3
    assert "layers.0.mlp.up_proj.weight" in capsys.readouterr().err


def test_an_update_of_a_tied_head_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    recipe = write_recipe(
        model={"path": str(tied)}, adapter={"target_modules": ["lm_head", "q_proj"]}
    )
    assert exit_code("train", recipe) == 3
    assert "lm_head shares its weights" in capsys.readouterr().err


def test_the_bases_generation_config_does_not_affect_greedy_decoding(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name, penalty in (("plain", 1.0), ("penalised", 50.0)):
        folder = save_tiny_model(tmp_path / name)
        settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        settings["repetition_penalty"] = penalty
        (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
        loaded = load_recipe(write_recipe(model={"path": str(folder)})).recipe
        model = loaded.model.load(
            loaded.quantization.load_options(torch.float32), torch.device("cpu")
        )
        tokenizer = loaded.model.load_tokenizer()
        generator = TextGenerator(model, tokenizer, [259], torch.float32, torch.device("cpu"))
        prompts = [Prompt([5, 6, 7], ""), Prompt([9, 8], "")]
        found = generator.complete(prompts, Sampling(max_new_tokens=12), batch_size=2)
        written.append(dict(found))
    assert written[0] == written[1]


@pytest.mark.parametrize("where", ["a-file/run", "a-file"])
def test_a_folder_that_cannot_be_made_is_the_users_error(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    (tmp_path / "a-file").write_text("", encoding="utf-8")
    recipe = write_recipe(output={"dir": str(tmp_path / where)})
    assert exit_code("train", recipe) == 2
    assert "output.dir" in capsys.readouterr().err


def test_references_that_a_task_cannot_score_are_found_before_training(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(evaluation={"tasks": [{"type": "json_match"}]})
    assert exit_code("train", recipe) == 2
    assert "json_match needs JSON references" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("quantization", mostly_slow(["nf4", "int8", "none"], "nf4"))
def test_packed_rows_train_like_padded_ones(
    write_recipe: Callable[..., Path], tmp_path: Path, quantization: str
) -> None:
    """One step sees all of the data either way, so that the steps are the same."""
    found = {}
    for packing, batch in ((True, 1), (False, 16)):
        run = tmp_path / f"run-{packing}"
        qlora(
            "train",
            write_recipe(
                data={"packing": packing, "max_length": 1024},
                quantization={"type": quantization},
                training={
                    "max_steps": 4, "batch_size": batch, "micro_batch_size": batch,
                    "precision": "fp32",
                },
                output={"dir": str(run)},
            ),
        )  # fmt: skip
        found[packing] = metrics(run)
    # LLM.int8() quantizes the rows of a batch together, with the padding.
    tolerance = 2e-2 if quantization == "int8" else 1e-5
    for packed, padded in zip(found[True], found[False], strict=True):
        for name in {"loss", "eval_loss"} & set(packed):
            assert packed[name] == pytest.approx(padded[name], abs=tolerance)
        for name in {"tokens", "supervised_tokens"} & set(packed):
            assert packed[name] == padded[name]


def test_a_model_trained_on_packed_rows_is_an_ordinary_one(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(
        data={"packing": True}, adapter={"type": "full"}, training={"micro_batch_size": 4}
    )
    qlora("train", recipe)
    assert "qlora_documents" not in (run / "last" / "config.json").read_text(encoding="utf-8")
    logged = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row][-1]
    report = output_of(capsys, "eval", run)
    assert report["models"]["tuned"]["loss"]["value"] == pytest.approx(logged, rel=1e-12)


def test_a_sources_weight_sets_how_often_it_is_trained_on(
    write_recipe: Callable[..., Path], tmp_path: Path, tiny_rows: list[dict[str, Any]]
) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in ("much", "little")]
    for path, rows in zip(paths, (tiny_rows[:4], tiny_rows[4:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = [{"path": str(path), "weight": w} for path, w in zip(paths, (3, 0.5), strict=True)]
    settings = {"epochs": 1, "max_steps": None, "batch_size": 1, "micro_batch_size": 1}
    qlora("train", write_recipe(data={"train": sources}, training=settings))
    assert len([row for row in metrics(tmp_path / "run") if "loss" in row]) == 3 * 4 + 6


def test_packed_training_resumes_where_it_stopped(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"batch_size": 2, "micro_batch_size": 1, "save_every": 1, "precision": "fp32"}

    def recipe(run: str, max_steps: int) -> Path:
        return write_recipe(
            data={"packing": True},
            adapter={"type": "lora", "r": 4, "dropout": 0.1},
            training={**settings, "max_steps": max_steps},
            output={"dir": str(tmp_path / run)},
        )

    qlora("train", recipe("whole", 9))
    qlora("train", recipe("parts", 4))
    qlora("train", recipe("parts", 9), "--resume", "auto")
    losses = [
        [row["loss"] for row in metrics(tmp_path / run) if "loss" in row]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    whole, parts = (
        load_file(tmp_path / run / "last" / "adapter_model.safetensors")
        for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_packing_is_refused_for_models_with_recurrent_state(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from tests.conftest import make_tokenizer

    folder = tmp_path / "mamba"
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=260, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    recipe = write_recipe(
        model={"path": str(folder)},
        data={"packing": True},
        adapter={"exclude_modules": ["out_proj"]},
    )
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe)])
    assert caught.value.code == 3
    shown = capsys.readouterr().err
    assert "data.packing: mamba" in shown
    assert "--set data.packing=false" in shown


def test_a_run_is_not_written_into_a_folder_with_other_files(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe()
    before = recipe.read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe), "--set", f"output.dir={tmp_path}"])
    assert caught.value.code == 2
    assert "is not a run folder and holds files" in capsys.readouterr().err
    assert recipe.read_bytes() == before


def test_leftovers_of_a_killed_record_write_do_not_matter(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = write_recipe(training={"max_steps": 2, "save_every": 1}), tmp_path / "run"
    replace = os.replace

    def kill_at(name: str) -> None:
        def replace_or_end(unfinished: Path, path: Path) -> None:
            if path == run / name:
                raise KeyboardInterrupt  # nothing of ours catches it
            replace(unfinished, path)

        monkeypatch.setattr(os, "replace", replace_or_end)

    kill_at("run.json")
    assert exit_code("train", recipe) == 130
    assert not run.exists()
    run.mkdir()
    (run / ".run.json.unfinished").write_text("{", encoding="utf-8")  # what SIGKILL would leave
    monkeypatch.setattr(os, "replace", replace)
    qlora("train", recipe)

    written = (run / "recipe.yaml").read_bytes()
    kill_at("recipe.yaml")
    longer = ["--resume", "auto", "--set", "training.max_steps=3"]
    assert exit_code("train", run / "recipe.yaml", *longer) == 130
    assert (run / "recipe.yaml").read_bytes() == written
    monkeypatch.setattr(os, "replace", replace)
    qlora("train", run / "recipe.yaml", *longer)
    assert not list(run.glob("*.unfinished")) + list(run.glob(".*.unfinished"))


def send(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, step: int, key: str) -> None:
    """Send this process a signal when a step (or its evaluation) is on the console."""
    from qlora_cli.loop.trackers import Console

    log = Console.log

    def log_and_send(self: Any, metrics: Any, at: int) -> None:
        log(self, metrics, at)
        if at == step and key in metrics:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Console, "log", log_and_send)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_and_nothing_is_lost(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    sections = {"training": {"max_steps": 6}, "adapter": {"dropout": 0.1}}
    recipe = write_recipe(**sections)
    qlora("train", recipe)
    expected = losses(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    send(monkeypatch, number, step=3, key="loss")
    assert exit_code("train", recipe) == 128 + number
    told = capsys.readouterr().err
    assert f"{number.name}: the run ends after this step, and is saved" in told
    assert f"stopped after step 3 ({number.name})" in told
    monkeypatch.undo()
    qlora("train", recipe, "--resume", "auto")
    assert losses(tmp_path / "run") == expected
    weights = [
        (tmp_path / run / "last" / "adapter_model.safetensors").read_bytes()
        for run in ("run", "whole")
    ]
    assert weights[0] == weights[1]


def test_a_signal_in_an_evaluation_ends_it_at_once_and_the_step_before_is_saved(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_cli.train.evaluation

    recipe = write_recipe(training={"max_steps": 4, "eval_every": 2})
    qlora("train", recipe)
    expected = metrics(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    evaluate_objective, times = qlora_cli.train.evaluation.evaluate_objective, []

    def evaluate_and_send(*arguments: Any) -> Any:
        times.append(1)
        if len(times) == 2:  # after step 2
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the evaluation was not interrupted")
        return evaluate_objective(*arguments)

    monkeypatch.setattr(qlora_cli.train.evaluation, "evaluate_objective", evaluate_and_send)
    assert exit_code("train", recipe) == 143
    monkeypatch.undo()
    steps = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps == ["step-00000002"]
    qlora("train", recipe, "--resume", "auto")
    for name in ("step", "loss", "eval_loss"):
        assert [r.get(name) for r in metrics(tmp_path / "run")] == [r.get(name) for r in expected]


def test_a_second_signal_ends_a_run_at_once(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_cli.loop.fit

    step = qlora_cli.loop.fit.train_step

    def send_twice(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(qlora_cli.loop.fit, "train_step", send_twice)
    assert exit_code("train", write_recipe()) == 130
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_before_the_first_step_ends_a_run_at_once(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_cli.loop.setup

    def load(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("loading was not interrupted")

    monkeypatch.setattr(qlora_cli.loop.setup, "load_base", load)
    assert exit_code("train", write_recipe()) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_saves_and_stops_at_its_time_limit(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import qlora_cli.common.signals
    from qlora_cli.loop.trackers import Console

    recipe = write_recipe(training={"max_steps": 3})
    qlora("train", recipe)
    expected = losses(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")

    log, clock = Console.log, [0.0]

    def wait_a_minute(self: Any, metrics: Any, step: int) -> None:
        log(self, metrics, step)
        clock[0] += 60 * ("loss" in metrics)

    monkeypatch.setattr(Console, "log", wait_a_minute)
    monkeypatch.setattr(
        qlora_cli.common.signals, "time", types.SimpleNamespace(monotonic=lambda: clock[0])
    )
    assert exit_code("train", recipe, "--set", "training.stop_after=1m30s") == 5
    assert "stopped after step 2 (training.stop_after is over)" in capsys.readouterr().err
    monkeypatch.undo()
    qlora("train", recipe, "--resume", "auto")
    assert losses(tmp_path / "run") == expected


def test_a_run_resumes_from_the_named_checkpoint(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        training={"max_steps": 4, "save_every": 1}, output={"keep_checkpoints": 4}
    )
    qlora("train", recipe)
    expected = losses(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for which in ("2", checkpoints / "step-00000001"):
        qlora("train", recipe, "--resume", which)
        assert losses(tmp_path / "run") == expected
    for which, message in (
        ("7", "step-00000007 does not exist"),
        (tmp_path, "is not a checkpoint of this run"),
    ):
        assert exit_code("train", recipe, "--resume", which) == 4
        told = capsys.readouterr().err
        assert message in told
        assert "intact checkpoints: steps 1, 2, 3, 4" in told


def test_two_processes_do_not_train_in_one_folder(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import filelock

    recipe = write_recipe(training={"max_steps": 1})
    qlora("train", recipe)
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        assert exit_code("train", recipe, "--resume", "auto") == 2
    assert "another process is training in" in capsys.readouterr().err
    qlora("train", recipe, "--resume", "auto")  # released with the process, or the run


def test_a_run_that_only_got_worse_is_reported(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsure = save_tiny_model(tmp_path / "unsure", initializer_range=0.02)
    sections = {"model": {"path": str(unsure)}, "training": {"max_steps": 2}}
    qlora("train", write_recipe(**sections, optimizer={"learning_rate": 1.0}))
    assert "was never better than that of the untrained model" in capsys.readouterr().err


def test_adapter_files_inherit_the_folders_permissions(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    qlora("train", write_recipe(training={"max_steps": 1}))
    qlora("merge", tmp_path / "run", "--output", tmp_path / "merged")
    for folder in (tmp_path / "run" / "last", tmp_path / "merged"):
        modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
        assert modes == {folder.stat().st_mode & 0o666}
