"""`qlora preview`, from the command line: what the model will see, and no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.cli import main
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX
from tests.conftest import make_tokenizer

Run = Callable[..., tuple[int, str, str]]


def rows_file(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three rows to learn, one of them held out too; whatever opens the weights fails."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "model")
    for weights in Path("model").glob("*.safetensors"):
        weights.unlink()
        weights.symlink_to("nowhere")
    rows_file(Path("train.jsonl"), ("Hi", "Ho"), ("1+1?", "2\n!"), ("Hi", "Ho"))
    rows_file(Path("test.jsonl"), ("Hi", "Ho"), ("1+1?", "3"), ("New", "Row"))
    pairs = {"type": "prompt_completion"}
    document = {
        "model": {"path": "model"},
        "data": {
            "train": {"path": "train.jsonl", "format": pairs},
            "evaluation": {"path": "test.jsonl", "format": pairs},
            "max_length": 64,
        },
        "output": {"dir": "run"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return Path("recipe.yaml")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return code or 0, *capsys.readouterr()

    return run


PREVIEW = """\
⟦supervised⟧ not supervised   ◆ before a special token   ⏎ line break

train: train.jsonl
3 rows, 0 bad, 0 dropped, 0 cut; 78 tokens, 12.8% supervised

train.jsonl:1: 25 tokens, 3 supervised
  ◆<|im_start|>user⏎
  Hi◆<|im_end|>⏎
  ◆<|im_start|>assistant⏎
  ⟦Ho◆<|im_end|>⟧⏎

training: 3 rows
lengths 25 to 28 tokens, median 25; 78 tokens, 12.8% supervised
  25 to 25  ████████████████████████████████████████ 2
  26 to 26   0
  27 to 27   0
  28 to 28  ████████████████████ 1
supervised turns: 3, ended by <|im_end|> 3
rows longer than data.max_length         0 of 3
rows beyond the model's context (512)    0 of 3
rows with nothing to learn               0 of 3
turns that end in no stop token          0 of 3
rows whose prompt differs in generation  0 of 3
rows that begin with two BOS tokens      0 of 3
rows that repeat an earlier one          1 of 3 (33.33%)
  train.jsonl:3 = train.jsonl:1

evaluation: test.jsonl
3 rows, 0 bad, 0 dropped, 0 cut; 78 tokens, 11.5% supervised

test.jsonl:1: 25 tokens, 3 supervised
  ◆<|im_start|>user⏎
  Hi◆<|im_end|>⏎
  ◆<|im_start|>assistant⏎
  ⟦Ho◆<|im_end|>⟧⏎

evaluation: 3 rows
lengths 25 to 27 tokens, median 26; 78 tokens, 11.5% supervised
  25 to 25  ████████████████████████████████████████ 1
  26 to 26  ████████████████████████████████████████ 1
  27 to 27  ████████████████████████████████████████ 1
supervised turns: 3, ended by <|im_end|> 3
rows longer than data.max_length              0 of 3
rows beyond the model's context (512)         0 of 3
rows with nothing to learn                    0 of 3
turns that end in no stop token               0 of 3
rows whose prompt differs in generation       0 of 3
rows that begin with two BOS tokens           0 of 3
rows that repeat an earlier one               0 of 3
rows that training has too                    1 of 3 (33.33%)
  test.jsonl:1 = train.jsonl:1
rows whose prompt training answers otherwise  1 of 3 (33.33%)
  test.jsonl:2 = train.jsonl:2
"""


def test_the_whole_preview_of_a_few_rows(recipe: Path, run: Run) -> None:
    code, out, _ = run("preview", recipe, "--rows", 1)
    assert code == 0
    assert out == PREVIEW


def test_json_gives_one_object_a_row(recipe: Path, run: Run) -> None:
    code, out, _ = run("preview", recipe, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["source"], row["row"]) for row in rows] == [
        *(("train", f"train.jsonl:{number}") for number in (1, 2, 3)),
        *(("evaluation", f"test.jsonl:{number}") for number in (1, 2, 3)),
    ]
    assert {tuple(row) for row in rows} == {("source", "row", "input_ids", "labels", "text")}
    text = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2\n!<|im_end|>\n"
    tokenizer = make_tokenizer()
    answer = tokenizer("2\n!<|im_end|>")["input_ids"]
    assert rows[1]["text"] == text
    assert rows[1]["input_ids"] == tokenizer(text)["input_ids"]
    assert [label for label in rows[1]["labels"] if label != IGNORE_INDEX] == answer


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--rows", 1], ["train.jsonl:1", "test.jsonl:1"]),
        (["--rows", 2, "--source", "train"], ["train.jsonl:1", "train.jsonl:2"]),
        (["--source", "evaluation", "--rows", 9], [f"test.jsonl:{n}" for n in (1, 2, 3)]),
    ],
    ids=str,
)
def test_rows_and_source_choose(
    recipe: Path, run: Run, options: list[object], places: list[str]
) -> None:
    _, out, _ = run("preview", recipe, "--json", *options)
    assert [json.loads(line)["row"] for line in out.splitlines()] == places


def test_one_of_several_sources_is_chosen_by_its_place(recipe: Path, run: Run) -> None:
    rows_file(Path("more.jsonl"), ("More", "Rows"))
    pairs = "format: {type: prompt_completion}"
    both = f"data.train=[{{path: train.jsonl, {pairs}}}, {{path: more.jsonl, {pairs}}}]"
    code, out, _ = run("preview", recipe, "--set", both, "--source", "train.1")
    assert code == 0
    assert "train.0: train.jsonl\n3 rows" in out
    assert "train.1: more.jsonl\n1 row," in out
    assert "training: 4 rows" in out
    assert "more.jsonl:1: " in out
    assert "train.jsonl:1: " not in out
    code, out, error = run("preview", recipe, "--set", both, "--source", "train.2")
    assert (code, out) == (2, "")
    assert error == (
        'error: --source: found "train.2"; choose from train, evaluation, train.0, train.1\n'
    )


def test_a_page_is_written_in_place_of_text(recipe: Path, run: Run) -> None:
    rows_file(Path("train.jsonl"), ("<script>alert(1)</script>", "<b>"))
    code, out, _ = run("preview", recipe, "--html", "page.html")
    assert (code, out) == (0, "")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Preview of recipe.yaml" in page
    code, _, error = run("preview", recipe, "--html", "none/page.html")
    assert code == 2
    assert error.endswith("error: --html: none/page.html: No such file or directory\n")


def test_bad_data_is_an_error(recipe: Path, run: Run) -> None:
    Path("train.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    code, out, error = run("preview", recipe)
    assert (code, out) == (2, "")
    assert "train.jsonl:1: field 'completion': missing" in error


def test_overlap_is_reported_when_training_begins(recipe: Path, run: Run) -> None:
    _, _, error = run("preview", recipe, "-q")
    assert error == ""
    code, _, error = run("train", recipe)
    assert code == 3, "the weights cannot be opened"
    lines = [line for line in error.splitlines() if line.startswith("audit")]
    assert lines == [
        "audit of training data: 25 to 28 tokens a row, median 25; "
        "rows that repeat an earlier one: 1 of 3 (33.33%), train.jsonl:3 = train.jsonl:1",
        "audit of evaluation data: 25 to 27 tokens a row, median 26; "
        "rows that training has too: 1 of 3 (33.33%), test.jsonl:1 = train.jsonl:1; "
        "rows whose prompt training answers otherwise: 1 of 3 (33.33%), "
        "test.jsonl:2 = train.jsonl:2",
    ]


@pytest.mark.parametrize("command", ["train", "preview"])
def test_an_exceeded_limit_stops_before_the_model_is_loaded(
    recipe: Path, run: Run, command: str
) -> None:
    code, out, error = run(command, recipe, "--set", "data.audit.max_overlap=0.5")
    assert code == 2
    assert "data.audit.max_overlap (0.5): 66.67% of the evaluation rows are shown in" in error
    # A preview says so after the report, which shows why.
    assert ("test.jsonl:1 = train.jsonl:1" in out) == (command == "preview")


@pytest.mark.parametrize("option", ["--rows", "--json"])
def test_a_preview_of_more_lost_answers_than_allowed_says_so_after_the_report(
    recipe: Path, run: Run, option: str
) -> None:
    rows_file(Path("test.jsonl"), ("Hi", "Ho"), ("Long", "answer " * 64))
    options = [option, 1] if option == "--rows" else [option]
    code, out, error = run("preview", recipe, *options, "-q")
    assert code == 2
    assert "test.jsonl:1" in out
    lost = "error: test.jsonl: 1 of 2 answers are lost, in 1 of 2 held-out rows; data.max_lost"
    assert lost in error
    # Nothing is left to show.
    code, out, _ = run(
        "preview", recipe, "--set", "data.truncate=drop", "--set", "data.max_length=8"
    )
    assert (code, out) == (2, "")


def test_keys_of_messages_that_are_not_read_are_named_and_counted(recipe: Path, run: Run) -> None:
    turns = [{"role": "user", "content": "a", "name": "Bo"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{**turn, "date": 7, "note": None} for turn in turns]}] * 2
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = "not read in messages: 'date' (4), 'name' (2)"
    for _ in range(2):  # the second time from the cache
        _, out, _ = run("preview", recipe, "--set", "data.train.format.type=messages")
        assert out.count(found) == out.count("not read") == 1
    run("preview", recipe, "--set", "data.train.format.type=messages", "--html", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("Not read in messages: &#39;date&#39; (4), &#39;name&#39; (2)") == 1


def test_turns_that_are_all_cut_are_counted(recipe: Path, run: Run) -> None:
    rows_file(Path("train.jsonl"), *[("Hi", f"{n} answer " * 64) for n in range(4)])
    _, out, _ = run("preview", recipe, "--set", "data.max_lost=1", "--source", "train")
    assert "supervised turns: 4, ended by nothing\n" in out
    assert "\nturns that do not end in their row       4 of 4 (100.00%)\n" in out


def test_the_record_of_a_run_holds_the_audit(tiny_recipe: Callable[..., Any]) -> None:
    from qlora_cli.train.train import train

    record = train(tiny_recipe(training={"max_steps": 1}))
    assert record["audit"]["training"]["num_rows"] == 16
    assert record["audit"]["evaluation"]["num_seen"] == 6


def test_a_limit_may_be_set_when_a_run_is_resumed(tiny_recipe: Callable[..., Any]) -> None:
    from qlora_cli.train.train import train

    train(tiny_recipe(training={"max_steps": 1}))
    with pytest.raises(DataError, match=r"max_overlap \(0\.5\): 100\.00% of the evaluation rows"):
        train(
            tiny_recipe(training={"max_steps": 2}, data={"audit": {"max_overlap": 0.5}}),
            resume="auto",
        )
    strict = tiny_recipe(training={"max_steps": 2}, data={"audit": {"max_duplicates": 0}})
    assert train(strict, resume="auto")["status"] == "finished"


def test_both_answers_of_a_preference_are_shown(recipe: Path, run: Run) -> None:
    rows = [{"prompt": f"Hi {number}", "chosen": "Ho", "rejected": "No"} for number in range(1, 4)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    preference = ["--set", "data.train.format.type=preference", "--source", "train"]
    code, out, error = run("preview", recipe, *preference)
    assert (code, "train.jsonl:1, chosen" in out) == (2, True)
    assert "format.type (preference) reads pairs" in error
    preference += ["--set", "data.evaluation=null", "--set", "objective.type=dpo"]
    code, out, _ = run("preview", recipe, *preference, "--rows", 1)
    assert code == 0
    for answer, text in (("chosen", "Ho"), ("rejected", "No")):
        assert (
            f"train.jsonl:1, {answer}: 27 tokens, 3 supervised\n  ◆<|im_start|>user⏎\n"
            f"  Hi 1◆<|im_end|>⏎\n  ◆<|im_start|>assistant⏎\n  ⟦┆{text}◆<|im_end|>⟧⏎\n"
        ) in out
    _, out, _ = run("preview", recipe, *preference, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [(row["row"], row["answer"]) for row in found] == [
        (f"train.jsonl:{number}", answer)
        for number in (1, 2, 3)
        for answer in ("chosen", "rejected")
    ]
    assert found[1]["text"].endswith("assistant\nNo<|im_end|>\n")


@pytest.mark.parametrize(
    ("is_terminal", "no_color", "is_coloured"),
    [(True, "", True), (True, "1", False), (False, "", False)],
)
def test_colour_only_for_terminals_that_support_it(
    recipe: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    no_color: str,
    is_coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    _, out, _ = run("preview", recipe)
    assert ("\x1b[32m" in out) == is_coloured
    assert ("⟦" in out) != is_coloured
