"""The audit of pairs, feedback and labels: what is often wrong with them is counted and named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.prepared.audit import check_data
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.data.prepared.findings import AuditLimits, pair_findings, score_findings
from qlora_cli.data.prepared.labels import LabelCounter, find_balance
from qlora_cli.data.prepared.scan import DatasetScan
from qlora_cli.data.prepared.statistics import DatasetStatistics
from qlora_cli.errors import DataError
from qlora_cli.inspect.preview import preview
from qlora_cli.inspect.preview_html import preview_page
from qlora_cli.objectives import KTO
from qlora_cli.objectives.head_settings import Classify
from qlora_cli.types import Conversation, Example, Message
from tests.unit.data.prepared.test_audit import BOS, STOP, Examples, row


def pairs(*texts: tuple[str, str]) -> Examples:
    """Build pairs at the places `a:1`, `a:2` ...; letters as in `row`."""
    examples, places = [], []
    for number, (chosen, rejected) in enumerate(texts, start=1):
        examples += [row(chosen), replace(row(rejected), is_linked=True)]
        places += [f"a:{number}"] * 2
    return Examples(examples, [0] * len(examples), places)


def scan_of(examples: Sequence[Example]) -> DatasetScan:
    scan = DatasetScan(added_token_ids={BOS, STOP}, bos_token_id=BOS, max_length=12)
    for example in examples:
        scan.add(example)
    return scan


def audit(*texts: tuple[str, str]) -> DatasetStatistics:
    return scan_of(pairs(*texts)).audit()


def test_a_pair_is_one_row() -> None:
    total = audit(("abCD!", "abE!"), ("xyZ!", "xyZZZ!")).total
    assert (total.num_rows, total.num_pairs, total.num_turns, total.num_stopped) == (2, 2, 4, 4)
    assert (total.num_tokens, total.num_supervised) == (19, 11)
    assert (total.shortest, total.longest) == (5, 6)
    assert (total.num_longer_chosen, total.num_longer_rejected) == (1, 1)
    scan = scan_of(pairs(("abCD!", "abE!"), ("xyZ!", "xyZZZ!")))
    assert scan.first_rows(0, None) == [0, 2]
    assert scan.longer_than(5) == [2]


@pytest.mark.parametrize(
    ("texts", "equal", "duplicates", "swapped"),
    [
        ([("aB!", "aC!"), ("aD!", "aC!")], 0, 0, 0),
        ([("aB!", "aB!"), ("aC!", "aD!")], 1, 0, 0),
        ([("aB!", "aB!"), ("aB!", "aB!")], 2, 1, 0),
        ([("aB!", "aC!"), ("aB!", "aC!"), ("aB!", "aC!")], 0, 2, 0),
        ([("aB!", "aC!"), ("aC!", "aB!")], 0, 0, 1),
        ([("aB!", "aC!"), ("aC!", "aB!"), ("aB!", "aC!")], 0, 1, 1),
        ([("aB!", "aC!"), ("xC!", "xB!")], 0, 0, 0),
    ],
)
def test_repeated_and_swapped_pairs_are_counted(
    texts: list[tuple[str, str]], equal: int, duplicates: int, swapped: int
) -> None:
    total = audit(*texts).total
    assert (total.num_equal, total.num_duplicates, total.num_swapped) == (
        equal,
        duplicates,
        swapped,
    )


@pytest.mark.parametrize(
    ("held_out", "seen", "asked"),
    [
        (("aaB!", "aaC!"), 1, 0),
        (("aaC!", "aaB!"), 1, 0),  # the other way round
        (("aaB!", "aaD!"), 0, 1),
        (("aaE!", "aaF!"), 0, 1),
        (("xxB!", "xxC!"), 0, 0),
    ],
)
def test_pairs_and_prompts_of_training_are_found_in_the_evaluation(
    held_out: tuple[str, str], seen: int, asked: int
) -> None:
    training = scan_of(pairs(("zzY!", "zzX!"), ("aaB!", "aaC!")))
    found = scan_of(pairs(held_out)).audit(training)
    assert (found.total.num_seen, found.total.num_asked) == (seen, asked)
    # Indices are those of the first example of a row.
    assert [*found.seen, *found.asked] == [(0, 2)] * (seen + asked)


def test_findings_of_pairs_name_the_rows() -> None:
    examples = pairs(("aB!", "aB!"), ("aC!", "aD!"), ("aD!", "aC!"))
    equal, swapped, longer = pair_findings(examples, scan_of(examples).audit())
    assert (equal.count, equal.total, equal.named) == (1, 3, ("a:1",))
    assert (swapped.count, swapped.named) == (1, ("a:3 = a:2",))
    assert (longer.count, longer.total, longer.is_suspect) == (0, 0, False)
    plain = Examples([row("aB!")], [0], ["a:1"])
    assert pair_findings(plain, scan_of(plain).audit()) == []


@pytest.mark.parametrize(
    ("longer", "shorter", "remark"),
    [
        (15, 5, "prefer longer answers: add pairs whose longer answer is rejected"),
        (5, 15, "prefer shorter answers: add pairs whose shorter answer is rejected"),
        (14, 6, None),
        (6, 14, None),
        (19, 0, None),  # too few to say anything
        (20, 0, "prefer longer answers"),
    ],
)
def test_a_bias_of_length_is_remarked(longer: int, shorter: int, remark: str | None) -> None:
    texts = [("aBB!", "aC!")] * longer + [("aC!", "aBB!")] * shorter + [("aB!", "aC!")] * 9
    examples = pairs(*texts)
    found = pair_findings(examples, scan_of(examples).audit())[-1]
    assert (found.count, found.total) == (longer, longer + shorter)
    assert found.is_suspect is (remark is not None)
    assert (remark or "") in " ".join(found.remedy)


def test_scores_that_contradict_a_pair_are_found() -> None:
    assert score_findings(9, 0, 0, ()) == []
    contradicted, missing = score_findings(9, 7, 2, ("a:3", "a:4"))
    assert (contradicted.count, contradicted.total) == (2, 7)
    assert (missing.count, missing.total) == (2, 9)


def test_the_limit_on_equal_answers_stops_a_run() -> None:
    found = audit(("aB!", "aB!"), ("aC!", "aD!"))
    AuditLimits(max_equal_answers=0.5).check(found, None, truncated=0)
    with pytest.raises(DataError, match=r"max_equal_answers \(0.4\): 50.00% of the training pairs"):
        AuditLimits(max_equal_answers=0.4).check(found, None, truncated=0)
    answers = scan_of([row("aB!")]).audit()
    AuditLimits(max_equal_answers=0).check(answers, None, truncated=0)


def test_the_same_row_with_another_label_is_found() -> None:
    rows = [replace(row("aaB!"), values=(value,)) for value in (1.0, 0.0, 1.0)]
    other = replace(row("aaC!"), values=(0.0,))
    found = scan_of([other, *rows]).audit()
    assert (found.total.num_duplicates, found.total.num_relabelled) == (2, 1)
    assert found.relabelled == [(2, 1)]


TEXT = [Message("text", "a", train=False)]
ANSWER = [Message("user", "a", train=False), Message("assistant", "b", train=True)]


@pytest.mark.parametrize(
    ("messages", "values", "expected"),
    [
        (TEXT, ["pos", "neg", "pos"], {"pos": 2, "neg": 1}),
        (TEXT, ["a", "b", "c"], {"a": 1, "b": 1, "c": 1}),
        (TEXT, [("a", "b"), (), ("a",)], {"a": 2, "b": 1}),
        (TEXT, [True, False, True], {"true": 2, "false": 1}),
        (TEXT, [1, 0, 0.0], {"1": 1, "0": 2}),
        (TEXT, [number / 7 for number in range(300)], {}),
        (ANSWER, [True, False, True], {"good": 2, "bad": 1}),
    ],
)
def test_labels_are_counted(messages: list[Message], values: list[Any], expected: Any) -> None:
    counter = LabelCounter()
    for value in values:
        counter.add(Conversation(messages, label=value))
    assert counter.labels() == expected


@pytest.mark.parametrize(
    ("labels", "what", "is_suspect"),
    [
        ({"a": 5, "b": 5}, "rows with the most frequent label", False),
        ({"b": 1, "a": 9}, "rows with the most frequent label", False),
        ({"a": 95, "b": 5}, "rows with the most frequent label", True),
        ({"a": 10}, "rows of one label only", True),
        ({"a": 1}, "rows with the most frequent label", True),
    ],
)
def test_the_balance_of_labels(labels: dict[str, int], what: str, is_suspect: bool) -> None:
    found = find_balance(labels, sum(labels.values()))
    assert (found.what, found.is_suspect, found.count) == (what, is_suspect, max(labels.values()))
    assert found.first_named() == tuple(
        f"{label!r} ({labels[label]:,})" for label in sorted(labels)
    )


@pytest.mark.parametrize(
    ("good", "bad", "weights", "remark"),
    [
        (10, 10, {}, None),
        (12, 9, {}, None),
        (40, 10, {}, "w_D n_D / (w_U n_U) is 4 .*objective.undesirable_weight: 4 makes it 1"),
        (5, 10, {}, "w_D n_D / (w_U n_U) is 0.5 .*objective.desirable_weight: 2 makes it 1"),
        (40, 10, {"undesirable_weight": 4.0}, None),
        (5, 10, {"desirable_weight": 3.0}, "is 1.5 .*objective.undesirable_weight: 1.5 makes it 1"),
        (10, 0, {}, None),  # found as rows of one label only
    ],
)
def test_the_weights_of_kto_balance_good_and_bad_answers(
    good: int, bad: int, weights: dict[str, float], remark: str | None
) -> None:
    found = KTO(**weights).label_remark({"good": good, "bad": bad})
    if remark is None:
        assert found is None
        return
    start, _, end = remark.partition(" .*")
    assert found is not None
    assert start in found
    assert end in found


Recipes = Callable[..., Any]
PAIR = {"prompt": "Hi", "chosen": "Ho", "rejected": "No"}


def prepared(recipe: Any, caplog: pytest.LogCaptureFixture) -> tuple[str, dict[str, Any]]:
    """Return the audit line and the record of the training rows of a recipe."""
    caplog.clear()
    tokenizer = recipe.model.load_tokenizer(None)
    data, objective = recipe.data, recipe.objective
    rows = read_data(
        "training", data, data.train_sources, tokenizer, use_cache=False, objective=objective
    )
    caplog.set_level(logging.DEBUG, "qlora")
    record = check_data(data, rows, None, tokenizer, objective=objective)
    [line] = [one.getMessage() for one in caplog.records if "audit of" in one.getMessage()]
    return line, record["training"]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def test_pairs_are_audited_as_they_are_prepared(
    tiny_recipe: Recipes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = {"score_chosen": 1, "score_rejected": 2}
    rows = [
        {**PAIR, "rejected": "Ho"},
        {**PAIR, **scores},
        {"prompt": "Hi", "chosen": "No", "rejected": "Ho"},
        PAIR,
    ]
    path = write(tmp_path / "pairs.jsonl", *rows)
    recipe = tiny_recipe(
        data={"train": {"path": path, "format": {"type": "preference"}}, "evaluation": None},
        objective={"type": "dpo"},
    )
    line, record = prepared(recipe, caplog)
    for said in (
        "rows that repeat an earlier one: 1 of 4 (25.00%), pairs.jsonl:4 = ",
        "pairs with equal answers: 1 of 4 (25.00%), ",
        "the other way round: 1 of 4 (25.00%), ",
        "rejected answer has the higher score: 1 of 1 (100.00%), ",
        "pairs without scores, where others have them: 3 of 4 (75.00%)",
    ):
        assert said in line.replace(f"{tmp_path}/", "")
    assert (record["num_rows"], record["num_equal"], record["num_swapped"]) == (4, 1, 1)
    shown = preview(recipe, use_cache=False)
    text = shown.text(1, colour=False)
    assert "┆ the two answers of a pair part here" not in text  # the answers are equal
    text = shown.text(2, colour=False)
    assert "┆ the two answers of a pair part here" in text
    assert "⟦┆Ho" in text
    assert "⟦┆No" in text
    found = list(shown.rows(2))
    assert [one.answer for one in found] == ["chosen", "rejected"] * 2
    assert found[0].num_shared == len(found[0].input_ids)
    start = found[2].num_shared
    assert isinstance(start, int)
    assert found[2].labels[start - 1] == -100
    assert found[2].labels[start] == found[2].input_ids[start]


def test_feedback_is_audited_and_shown_with_its_label(
    tiny_recipe: Recipes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"Hi {i}", "completion": "Ho", "label": i > 0} for i in range(5)]
    path = write(tmp_path / "kto.jsonl", *rows, {**rows[0], "label": True})
    recipe = tiny_recipe(
        data={"train": {"path": path, "format": {"type": "feedback"}}, "evaluation": None},
        objective={"type": "kto"},
    )
    line, record = prepared(recipe, caplog)
    assert "rows with the most frequent label: 5 of 6 (83.33%), 'good' (5) and 1 more" in line
    assert "objective.undesirable_weight: 5 makes it 1" in line
    assert "with another label: 1 of 6" in line
    assert record["num_relabelled"] == 1
    assert record["labels"] == {"good": 5, "bad": 1}
    shown = preview(recipe, use_cache=False)
    assert "kto.jsonl:1, label bad: " in shown.text(2, colour=False)
    assert [one.label for one in shown.rows(None)] == ["bad", *["good"] * 5]


@pytest.mark.parametrize("is_text", [True, False])
def test_labels_are_audited_and_shown(
    tiny_recipe: Recipes, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_text: bool
) -> None:
    """A tsv file without a header, as that of SST-2: its labels are texts."""
    texts = ["good film", "bad film", "bad film", "dull"]
    columns = {"columns": ["sentence", "label"]} if is_text else {}
    rows = [(text, int(text == "good film" or i == 2)) for i, text in enumerate(texts)]
    path = tmp_path / ("rows.tsv" if is_text else "rows.jsonl")
    if is_text:
        path.write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    else:
        write(path, *({"sentence": text, "label": label} for text, label in rows))
    format = {"type": "labelled", "field": "sentence"}
    recipe = tiny_recipe(
        data={"train": {"path": str(path), "format": format, **columns}, "evaluation": None},
        objective={"type": "classify", "labels": ["negative", "positive", "neutral"]},
    )
    line, record = prepared(recipe, caplog)
    line = line.replace(f"{tmp_path}/", "")
    assert f"with another label: 1 of 4 (25.00%), {path.name}:3 = {path.name}:2" in line
    assert "most frequent label: 2 of 4 (50.00%)" in line
    assert "no row has the label 'neutral'" in line
    assert "stop token" not in line
    assert record["num_rows"] == 4
    shown = preview(recipe, use_cache=False)
    labels = ["positive", "negative", "positive", "negative"]
    assert [one.label for one in shown.rows(None)] == labels
    text = shown.text(1, colour=False)
    assert f"{path.name}:1, label positive: " in text
    assert "supervised turns" not in text
    assert "supervised turns" not in preview_page(shown.views(1), title="x")


@pytest.mark.parametrize(
    ("settings", "label", "values"),
    [
        ({"labels": ["a", "b"]}, "1", (1.0,)),
        ({"labels": ["1", "0"]}, "1", (0.0,)),  # a name goes before an index
        ({"labels": ["a", "b"]}, " 0", (0.0,)),
        ({"labels": ["a", "b"], "problem": "multi"}, ("1", "a"), (1.0, 1.0)),
        ({"problem": "regression"}, "3.5", (3.5,)),
        ({"problem": "regression"}, " -1e2", (-100.0,)),
    ],
)
def test_labels_of_tables_are_texts(settings: Any, label: Any, values: tuple[float, ...]) -> None:
    objective = Classify(**settings)
    assert objective.values_of(Conversation(TEXT, label=label)) == values


@pytest.mark.parametrize(
    ("settings", "label", "reason"),
    [
        ({"labels": ["a", "b"]}, "2", "'2' is not one of objective.labels"),
        ({"labels": ["a", "b"]}, "-1", "'-1' is not one of objective.labels"),
        ({"labels": ["a", "b"]}, "0.5", "'0.5' is not one of objective.labels"),
        ({"problem": "regression"}, "high", "'high' is not a number"),
        ({"problem": "regression"}, "nan", "nan is not a finite number"),
        ({"problem": "regression"}, True, "true' is not a number"),
    ],
)
def test_texts_that_are_not_labels_are_refused(settings: Any, label: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Classify(**settings).values_of(Conversation(TEXT, label=label))


@pytest.mark.parametrize(
    ("settings", "values", "text"),
    [
        ({"labels": ["a", "b"]}, (1.0,), "b"),
        ({"labels": ["a", "b"], "problem": "multi"}, (1.0, 1.0), "a + b"),
        ({"labels": ["a", "b"], "problem": "multi"}, (0.0, 0.0), "none"),
        ({"problem": "regression"}, (2.5,), "2.5"),
    ],
)
def test_labels_are_written_as_text(settings: Any, values: tuple[float, ...], text: str) -> None:
    assert Classify(**settings).label_text(values) == text
