"""Trained weights and merged models with a damaged file are refused by all that reads them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.common.digests import DIGESTS, refuse_damaged, write_digests
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.evaluate.target import find_model
from qlora_cli.export.combine_adapters import CombineOptions, combine
from qlora_cli.export.export import export
from qlora_cli.export.merge import merge
from qlora_cli.inference.session import open_session
from qlora_cli.inspect.adapters import diff, inspect, list_adapters
from qlora_cli.models.base import load_model
from qlora_cli.recipe.load import load_recipe
from qlora_cli.runs.adapter_folder import AdapterFolder
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.reproduce import rerun
from qlora_cli.train.train import train
from qlora_cli.train.warm_start import find_warm_start
from tests.damage import flipped

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(
    tiny_model: Path, tiny_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with last and best weights, and the model merged from it."""
    folder = tmp_path_factory.mktemp("made")
    rows, recipe = folder / "rows.jsonl", folder / "recipe.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")
    sections = {
        "model": {"path": str(tiny_model)},
        "adapter": {"type": "lora", "r": 4},
        "data": {"train": {"path": str(rows)}, "evaluation": {"path": str(rows)}, "max_length": 96},
        "training": {"max_steps": 2, "batch_size": 4, "save_every": 1, "eval_every": 1},
        "output": {"dir": str(folder / "run")},
    }
    recipe.write_text(json.dumps(sections), encoding="utf-8")
    train(load_recipe(recipe).recipe)
    merge(folder / "run", folder / "merged", weights="last", with_logits=False)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "made")


def damage(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes()))


def _warm_start(run: Path) -> None:
    given = [f"adapter.init_from={run}"]
    find_warm_start(load_recipe(run / "recipe.yaml", given).recipe, {})


def _combine(run: Path) -> None:
    combine([run, run], run.with_name("both"), CombineOptions("linear"), measure=False)


READERS: dict[str, Callable[[Path], Any]] = {
    "eval": lambda run: find_model(run, (), "last", None),
    "generate": lambda run: open_session(str(run)),
    "the path of the weights": lambda run: open_session(str(run / "last")),
    "--adapter": lambda run: open_session(str(run / "recipe.yaml"), adapters=[f"one={run}"]),
    "merge": lambda run: merge(run, run.with_name("again"), weights="last"),
    "init_from": _warm_start,
    "inspect": inspect,
    "diff": lambda run: diff(run, run),
    "combine": _combine,
    "rerun": rerun,
    "export --run": lambda run: export(
        run.with_name("merged"), bnb_4bit=run.with_name("packed"), run=run
    ),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_stopped_run_names_the_way_to_its_weights(
    folder: Path, read: Callable[[Path], Any]
) -> None:
    run = folder / "run"
    _stop(run, step=1)
    with pytest.raises(RecipeError, match="the run has not finished") as caught:
        read(run)
    resume = f"qlora train {run / 'recipe.yaml'} --resume auto"
    assert caught.value.hint == (
        f"{resume} finishes it; {resume} --set training.max_steps=1 writes the weights after its "
        "newest checkpoint, without further steps"
    )


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"epochs": 0.5}], ids=str)
def test_a_stopped_run_gets_its_weights_and_can_be_continued(
    folder: Path, length: dict[str, float]
) -> None:
    run = folder / "run"
    whole = (run / "last" / WEIGHTS).read_bytes()
    _stop(run, step=1, length=length)
    way = RunFolder(run).ways_to_finish().partition(";")[2].partition(" writes")[0]
    overrides = [*way.split(" --set ")[1:], f"output.dir={run}"]
    record = train(load_recipe(run / "recipe.yaml", overrides).recipe, resume="auto")
    assert (record["status"], record["steps"]) == ("finished", 1)
    assert (run / "last" / WEIGHTS).read_bytes() != whole
    AdapterFolder.find(run)
    again = {"training.max_steps": "null", **{f"training.{key}": length[key] for key in length}}
    overrides = [f"output.dir={run}", *(f"{key}={value}" for key, value in again.items())]
    assert train(load_recipe(run / "recipe.yaml", overrides).recipe, resume="auto")["steps"] == 2
    assert (run / "last" / WEIGHTS).read_bytes() == whole


def _stop(run: Path, *, step: int, length: dict[str, float] | None = None) -> None:
    """Make a run of two steps look as one that was stopped after a step."""
    for name in ("last", "best", "checkpoints/step-00000002"):
        shutil.rmtree(run / name)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    record = RunFolder(run).read_record()
    document = record["recipe"]
    if length is not None:
        document["training"].update({"max_steps": None, **length})
    RunFolder(run).update_record(status="training", recipe=document)
    (run / "recipe.yaml").write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("opened", [DIGESTS, WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
def test_weights_that_are_replaced_while_they_are_read_are_not_damaged(
    folder: Path, opened: str
) -> None:
    last, other = folder / "run" / "last", folder / "other"
    shutil.copytree(last, other)
    damage(other / WEIGHTS)
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_digests(other)
    pending = [last / opened]

    def replace(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and pending and arguments[0] in (str(pending[0]), pending[0]):
            pending.clear()
            last.rename(folder / "before")
            other.rename(last)

    sys.addaudithook(replace)
    refuse_damaged(last)
    assert not pending
    assert (folder / "before").exists()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_damaged_weights_are_refused_by_all_that_reads_them(
    folder: Path, read: Callable[[Path], Any]
) -> None:
    run = folder / "run"
    before = {path for path in folder.rglob("*") if path.is_file()}
    damage(run / "last" / WEIGHTS)
    with pytest.raises(ModelError, match="is damaged: its SHA-256 is") as caught:
        read(run)
    assert str(caught.value).startswith(f"{run / 'last' / WEIGHTS} is damaged")
    assert f"qlora train {run / 'recipe.yaml'} --resume auto writes last/ again" in str(
        caught.value.hint
    )
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    damage(folder / "run" / "last" / "tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        AdapterFolder.find(folder / "run")


def test_the_name_of_the_base_may_be_edited(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is edited before an adapter is published."""
    path = folder / "run" / "last" / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "org/base"}), "utf-8")
    assert AdapterFolder.find(folder / "run").base_path() == "org/base"
    [line] = [record.message for record in caplog.records if record.name == "qlora"]
    assert line.startswith(f"{path} has changed since it was written")


def test_damaged_best_weights_do_not_touch_the_last(folder: Path) -> None:
    run = folder / "run"
    damage(run / "best" / WEIGHTS)
    AdapterFolder.find(run)
    for path in (run, run / "best"):
        with pytest.raises(ModelError, match=f"best/{WEIGHTS} is damaged") as caught:
            AdapterFolder.find(path, "best")
        assert "or take --weights last" in str(caught.value.hint)
    with pytest.raises(ModelError, match=f"best/{WEIGHTS} is damaged"):
        rerun(run)


def test_damaged_adapters_are_listed(folder: Path) -> None:
    damage(folder / "run" / "last" / WEIGHTS)
    assert len(list_adapters(folder).adapters) == 2


def test_resuming_writes_the_last_weights_again(folder: Path) -> None:
    run = folder / "run"
    given = [f"output.dir={run}"]
    written = (run / "last" / WEIGHTS).read_bytes()
    damage(run / "last" / WEIGHTS)
    train(load_recipe(run / "recipe.yaml", given).recipe, resume="auto")
    assert (run / "last" / WEIGHTS).read_bytes() == written
    AdapterFolder.find(run)


def test_an_adapter_without_digests_is_read_as_it_is(folder: Path) -> None:
    plain = folder / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(folder / "run" / "last" / name, plain / name)
    damage(plain / WEIGHTS)
    assert AdapterFolder.find(plain).folder == plain
    (folder / "run" / "last" / DIGESTS).unlink()
    damage(folder / "run" / "last" / WEIGHTS)
    assert AdapterFolder.find(folder / "run").run is not None


MERGED: dict[str, Callable[[Path], Any]] = {
    "train, eval, generate": load_model,
    "export": lambda merged: export(merged, bnb_4bit=merged.with_name("packed")),
}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("read", MERGED.values(), ids=MERGED)
def test_a_damaged_merged_model_is_refused(
    folder: Path, read: Callable[[Path], Any], name: str
) -> None:
    merged = folder / "merged"
    damage(merged / name)
    with pytest.raises(ModelError, match=f"{name} is damaged"):
        read(merged)


@pytest.mark.slow
def test_a_model_that_is_merged_again_gets_digests_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Train on a merged model, and merge that run: the base's digests are not copied."""
    merged = folder / "merged"
    given = [f"model.path={merged}", f"output.dir={tmp_path / 'second'}"]
    train(load_recipe(folder / "recipe.yaml", given).recipe)
    merge(tmp_path / "second", tmp_path / "twice", weights="last")
    one, two = (json.loads((path / DIGESTS).read_text()) for path in (merged, tmp_path / "twice"))
    assert one.keys() == two.keys()
    assert one["model.safetensors"] != two["model.safetensors"]
    load_model(tmp_path / "twice")
    damage(merged / "tokenizer.json")
    with pytest.raises(ModelError, match=r"merged/tokenizer\.json is damaged"):
        merge(tmp_path / "second", tmp_path / "thrice", weights="last")
