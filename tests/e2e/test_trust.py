"""Files of others, through the command line: nothing is unpickled, nothing leaks, no socket."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.common.digests import DIGESTS
from tests.conftest import ROOT, exit_code
from tests.watch import Watch, watching

Break = Callable[[Path], None]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class Trap:
    """A pickle to plant, and whether anybody fell into it."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "unpickled"
        self.data = pickle.dumps(Payload(self.mark))
        self.planted: list[Path] = []

    def plant(self, path: Path) -> None:
        path.write_bytes(self.data)
        self.planted.append(path)

    def opened(self, watch: Watch) -> list[str]:
        """The planted files that were opened."""
        seen = {str(Path(path).absolute()) for path in watch.opened}
        return [str(path) for path in self.planted if str(path.absolute()) in seen]


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    trap = Trap(tmp_path)
    yield trap
    assert not trap.mark.exists(), "a pickle was unpickled"


def test_the_trap_detects_unpickling(tmp_path: Path) -> None:
    trap = Trap(tmp_path)
    trap.plant(tmp_path / "x.pkl")
    with watching() as watch:
        pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert trap.mark.exists()
    assert trap.opened(watch)
    assert str(trap.mark) in watch.written_outside(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a recipe, its rows, a finished run of it and its base; copied before use."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model, root / "base")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    rows = json.dumps({"messages": turns}) + "\n"
    (root / "rows.jsonl").write_text(rows * 4, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
        assert exit_code("train", "recipe.yaml", "-q") == 0
    return root


RECIPE = {
    "model": {"path": "base"},
    "adapter": {"type": "lora", "r": 4},
    "data": {"train": {"path": "rows.jsonl"}, "evaluation": {"path": "rows.jsonl"}},
    "training": {
        "max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "precision": "fp32", "save_every": 1
    },
    "output": {"dir": "run"},
}  # fmt: skip


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of `finished`, to be spoilt."""
    folder = tmp_path / "work"
    shutil.copytree(finished, folder)
    # Whoever sends a folder can leave the digests out.
    (folder / "run" / "last" / DIGESTS).unlink()
    monkeypatch.chdir(folder)
    return folder


def without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


def only_bin(base: Path, trap: Trap) -> None:
    without_weights(base)
    trap.plant(base / "pytorch_model.bin")


def only_pt(base: Path, trap: Trap) -> None:
    without_weights(base)
    trap.plant(base / "model.pt")


def sharded_bin(base: Path, trap: Trap) -> None:
    without_weights(base)
    name = "pytorch_model-00001-of-00001.bin"
    trap.plant(base / name)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def index_to_bin(base: Path, trap: Trap) -> None:
    without_weights(base)
    (base / "other.safetensors").write_bytes(b"")
    trap.plant(base / "shard.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "shard.bin"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def settings_to_bin(base: Path, trap: Trap) -> None:
    trap.plant(base / "adapter_model.bin")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["transformers_weights"] = "adapter_model.bin"
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")


def a_pickle_named_safetensors(base: Path, trap: Trap) -> None:
    without_weights(base)
    trap.plant(base / "model.safetensors")


WITH_A_BASE: list[tuple[Any, ...]] = [
    ("train", "recipe.yaml", "--set", "output.dir=again"),
    ("train", "recipe.yaml", "--set", "training.max_steps=3", "--resume", "auto"),
    ("rerun", "run"),
    ("eval", "recipe.yaml"),
    ("eval", "run"),
    ("eval", "base", "--recipe", "recipe.yaml"),
    ("merge", "run", "--output", "merged"),
    ("chat", "run"),
    ("generate", "run", "--prompts", "rows.jsonl", "--output", "answers.jsonl"),
    ("generate", "base", "--prompts", "rows.jsonl", "--output", "answers.jsonl"),
    ("export", "base", "--bnb-4bit", "packed"),
]


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    "spoil",
    [only_bin, only_pt, sharded_bin, index_to_bin, settings_to_bin, a_pickle_named_safetensors],
)
def test_no_command_opens_a_pickled_base(
    here: Path, trap: Trap, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path, Trap], None]
) -> None:
    spoil(here / "base", trap)
    for command in WITH_A_BASE:
        with watching() as watch:
            assert exit_code(*command) == 3, command
        error = capsys.readouterr().err
        assert "error: " in error, command
        assert "Traceback" not in error, command
        if spoil is not a_pickle_named_safetensors:
            assert trap.opened(watch) == [], command
        if spoil in (only_bin, only_pt, sharded_bin):
            assert "pickled weights are never loaded" in error, command
            assert "save_pretrained" in error, command


def test_a_pickled_file_as_the_model_is_refused(
    here: Path, trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.pt", "pytorch_model.bin", "model.gguf"):
        trap.plant(here / name)
        assert exit_code("eval", "recipe.yaml", "--set", f"model.path={name}") == 3
        assert exit_code("generate", name, "--prompts", "rows.jsonl", "--output", "a.jsonl") == 3
    assert "Traceback" not in capsys.readouterr().err


def test_pickles_next_to_safetensors_are_ignored(here: Path, trap: Trap) -> None:
    for folder in (here / "base", here / "run" / "last"):
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "x.pkl"):
            trap.plant(folder / name)
    with watching() as watch:
        assert exit_code("eval", "run") == 0
        assert exit_code("adapters", "inspect", "run") == 0
        assert exit_code("merge", "run", "--output", "merged") == 0
    assert trap.opened(watch) == []
    assert not [file for file in Path("merged").iterdir() if file.name in ("x.pkl", "x.bin")]


WITH_AN_ADAPTER: list[tuple[Any, ...]] = [
    ("train", "recipe.yaml", "--set", "output.dir=again", "--set", "adapter.init_from=run"),
    ("eval", "run"),
    ("merge", "run", "--output", "merged"),
    ("chat", "run"),
    ("chat", "recipe.yaml", "--adapter", "one=run/last"),
    ("generate", "run/last", "--prompts", "rows.jsonl", "--output", "answers.jsonl"),
    ("adapters", "inspect", "run"),
    ("adapters", "diff", "run", "run"),
    ("adapters", "combine", "run", "run", "--output", "both"),
    ("export", "base", "--bnb-4bit", "packed", "--run", "run"),
]


def test_no_command_opens_a_pickled_adapter(
    here: Path, trap: Trap, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run" / "last" / "adapter_model.safetensors").unlink()
    trap.plant(here / "run" / "last" / "adapter_model.bin")
    for command in WITH_AN_ADAPTER:
        with watching() as watch:
            assert exit_code(*command) == 3, command
        error = capsys.readouterr().err
        assert "pickled weights are never loaded" in error, command
        assert "weights_only=True" in error, command
        assert trap.opened(watch) == [], command
    (here / "run" / "last" / "adapter_model.bin").rename(
        here / "run" / "last" / "adapter_model.safetensors"
    )
    for command in WITH_AN_ADAPTER:
        assert exit_code(*command) == 3, command
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("is_listed", [False, True], ids=["planted", "and entered in the manifest"])
@pytest.mark.parametrize(
    "name", ["trained.safetensors", "state.safetensors", "state.json", "manifest.json"]
)
def test_a_pickle_in_a_checkpoint_is_never_unpickled(
    here: Path, trap: Trap, capsys: pytest.CaptureFixture[str], name: str, is_listed: bool
) -> None:
    """Optimizer and random states are in state.json and state.safetensors."""
    for checkpoint in (here / "run" / "checkpoints").glob("step-*"):
        trap.plant(checkpoint / name)
        if is_listed and name != "manifest.json":
            path = checkpoint / "manifest.json"
            manifest = json.loads(path.read_text(encoding="utf-8"))
            digest = hashlib.sha256(trap.data).hexdigest()
            manifest["files"][name] = {"bytes": len(trap.data), "sha256": digest}
            path.write_text(json.dumps(manifest), encoding="utf-8")
    command = ("train", "recipe.yaml", "--set", "training.max_steps=3", "--resume", "auto")
    assert exit_code(*command) == 4
    error = capsys.readouterr().err
    assert "error: " in error
    assert "Traceback" not in error


@pytest.mark.quick_every(4)
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "config.json",
        "generation_config.json", "additional_chat_templates/x.jinja",
    ],
)  # fmt: skip
def test_a_pickle_among_small_files_is_never_unpickled(
    here: Path, trap: Trap, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for folder in (here / "base", here / "run" / "last"):
        (folder / name).parent.mkdir(exist_ok=True)
        trap.plant(folder / name)
        if name == "tokenizer.model":
            (folder / "tokenizer.json").unlink()
    for command in (("eval", "recipe.yaml"), ("eval", "run"), ("merge", "run", "--output", "m")):
        assert exit_code(*command) in (0, 3), command
        shutil.rmtree("m", ignore_errors=True)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["x.pkl", "x.pkl.gz", "x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.txt"]
)
def test_a_pickle_for_data_is_never_unpickled(
    here: Path, trap: Trap, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    trap.plant(here / name)
    assert exit_code("preview", "recipe.yaml", "--set", f"data.train.path={name}") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_pickle_among_prepared_data_is_never_unpickled(
    here: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(here / "cache"))
    assert exit_code("preview", "recipe.yaml", "--json") == 0
    shown = capsys.readouterr().out
    files = [file for file in (here / "cache").rglob("*") if file.is_file() and file.suffix]
    names = {file.name for file in files if file.suffix != ".lock"}
    assert len(names) == 10
    for name in sorted(names):
        for file in [file for file in files if file.name == name]:
            trap.plant(file)
        assert exit_code("preview", "recipe.yaml", "--json") == 0
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize("place", ["base", "run/last", "run"])
def test_a_link_out_of_a_folder_is_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    outside = tmp_path / "outside.md"
    outside.write_text("mine", encoding="utf-8")
    (here / place / "README.md").unlink(missing_ok=True)
    (here / place / "README.md").symlink_to(outside)
    commands: list[tuple[Any, ...]] = [
        ("eval", "run"),
        ("merge", "run", "--output", "merged"),
        ("train", "recipe.yaml", "--set", "training.max_steps=3", "--resume", "auto"),
    ]
    for command in commands if place != "run/last" else commands[:2]:
        assert exit_code(*command) == 3, command
        assert "is a link out of its folder" in capsys.readouterr().err
    assert outside.read_text(encoding="utf-8") == "mine"
    assert not Path("merged").exists()


COMMANDS: list[list[str]] = [
    ["validate", "recipe.yaml"],
    ["schema"],
    ["preview", "recipe.yaml", "--html", "preview.html"],
    ["train", "recipe.yaml"],
    ["rerun", "run"],
    ["bench", "recipe.yaml", "--steps", "2"],
    ["compare", "recipe.yaml", "--vary", "training.max_steps=2", "--out", "compared"],
    ["plan", "recipe.yaml", "--device", "cpu"],
    ["train", "recipe.yaml", "--resume", "auto", "--set", "training.max_steps=3"],
    ["eval", "run", "--records", "records.jsonl"],
    ["eval", "recipe.yaml"],
    ["merge", "run", "--output", "merged"],
    ["export", "merged", "--bnb-4bit", "packed", "--run", "run"],
    ["generate", "run", "--prompts", "rows.jsonl", "--output", "answers.jsonl",
     "--max-new-tokens", "3"],
    ["generate", "run/last", "--prompts", "rows.jsonl", "--output", "more.jsonl",
     "--max-new-tokens", "3"],
    ["chat", "run", "--max-new-tokens", "3"],
    ["adapters", "list", "."],
    ["adapters", "inspect", "run"],
    ["adapters", "diff", "run", "run/best"],
    ["adapters", "combine", "run", "run/best", "--output", "both"],
    ["train", "head.yaml"],
    ["predict", "head", "--rows", "labelled.jsonl", "--output", "labels.jsonl"],
    ["cache"],
    ["cache", "--clear"],
]  # fmt: skip
"""Every command, in an order in which each has what it needs."""

CHILD = """
import io, json, sys
from tests.watch import watching
commands = json.loads(sys.argv[1])
with watching() as watch:
    from qlora_cli.cli import main
    for command in commands:
        sys.stdin = io.StringIO("hello\\n")
        try:
            main(command)
        except SystemExit as ended:
            if ended.code:
                sys.exit(f"{command}: {ended.code}")
print("sockets:", watch.sockets)
"""

HUB_KERNELS = """
from pathlib import Path
Path("kernels.found").touch()
def get_kernel(*arguments, **options):
    Path("kernels.fetched").touch()
"""
"""In the place of the package with which libraries fetch code from the hub."""

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD",
    "COMET_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN", "DATABASE_URL", "MY_PASSWORD",
)  # fmt: skip
CANARY = "canary5f1e7c0d9b"


@pytest.fixture(scope="module")
def all_commands(
    tmp_path_factory: pytest.TempPathFactory, finished: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Every command in a process of its own, which nothing keeps offline, with secrets about it."""
    import os

    folder = tmp_path_factory.mktemp("all")
    for name in ("base", "rows.jsonl"):
        source = finished / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    recipe = {**RECIPE, "output": {"dir": "run", "trackers": ["tensorboard"]}}
    recipe["evaluation"] = {"tasks": [{"type": "chrf"}], "max_new_tokens": 3}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    labelled = [{"text": text, "label": text[0]} for text in ("a b", "b a", "a a")]
    lines = "".join(json.dumps(row) + "\n" for row in labelled)
    (folder / "labelled.jsonl").write_text(lines, encoding="utf-8")
    head = {
        **RECIPE,
        "data": {"train": {"path": "labelled.jsonl", "format": {"type": "labelled"}}},
        "objective": {"type": "classify", "labels": ["a", "b"]},
        "output": {"dir": "head"},
    }
    (folder / "head.yaml").write_text(yaml.safe_dump(head), encoding="utf-8")
    (folder / "kernels.py").write_text(HUB_KERNELS, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= dict.fromkeys(SECRETS, f"hf_{CANARY}")
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment |= {"QLORA_CACHE": str(folder / "cache"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(COMMANDS)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return folder, done


def test_every_command_is_tried() -> None:
    from typer.main import get_command

    from qlora_cli.cli import app

    def names(group: Any, *before: str) -> Iterator[tuple[str, ...]]:
        for name, command in group.commands.items():
            below = (*before, name)
            yield from names(command, *below) if hasattr(command, "commands") else [below]

    tried = {tuple(command[:2]) for command in COMMANDS} | {(c[0],) for c in COMMANDS}
    assert set(names(get_command(app))) <= tried


@pytest.mark.slow
def test_with_local_paths_no_command_opens_a_socket(
    all_commands: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = all_commands
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("sockets: []\n")


@pytest.mark.slow
def test_with_local_paths_no_library_fetches_code_from_the_hub(
    all_commands: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """bitsandbytes does on some CPUs, where the package for it is installed."""
    folder, done = all_commands
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("kernels.f*"))


@pytest.mark.slow
def test_a_secret_in_the_environment_is_written_nowhere(
    all_commands: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = all_commands
    assert CANARY not in done.stdout + done.stderr
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"run.json", "README.md", "state.json", "metrics.jsonl", "merge.json"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []


TOKEN = f"hf_{CANARY}0123456789"


@pytest.mark.quick_every(3)
@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{TOKEN}@example.com/model",
        f"https://{CANARY}@example.com/model",
        f"s3://bucket/rows.jsonl?X-Amz-Signature={CANARY}",
        f"https://example.com/rows.jsonl?a=b&access_token={CANARY}",
        TOKEN,
    ],
)
@pytest.mark.parametrize("key", ["model.path", "data.train.path", "training.seed", "model.token"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(
    here: Path, capsys: pytest.CaptureFixture[str], address: str, key: str
) -> None:
    for command in ("validate", "train", "preview"):
        assert exit_code(command, "recipe.yaml", "--set", f"{key}={address}") == 2
        printed = capsys.readouterr()
        assert CANARY not in printed.out + printed.err
        assert key.rpartition(".")[2] in printed.err
    recipe = here / "secret.yaml"
    recipe.write_text(
        yaml.safe_dump({**RECIPE, "output": {"dir": f"new/{address}"}}), encoding="utf-8"
    )
    assert exit_code("train", recipe) == 2
    printed = capsys.readouterr()
    assert CANARY not in printed.out + printed.err
    assert "output.dir" in printed.err
    assert not Path("new").exists()


def test_a_secret_in_an_argument_is_not_repeated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"https://user:{CANARY}@example.com/model"
    for command in (
        ("eval", address),
        ("chat", address),
        ("adapters", "inspect", address),
        ("adapters", "list", address),
        ("merge", address, "--output", "m"),
        ("train", address),
        ("train", "recipe.yaml", "--resume", address),
    ):
        assert exit_code(*command) in (2, 3, 4), command
        printed = capsys.readouterr()
        assert CANARY not in printed.out + printed.err, command
        assert "***" in printed.err, command
