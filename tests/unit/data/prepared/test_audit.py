"""The audit computes its figures from tokens and labels, and counts each kind of mistake."""

from __future__ import annotations

import pytest

from qlora_cli.data.prepared.findings import (
    AuditLimits,
    Finding,
    TemplateDrift,
    find_drift,
    findings,
)
from qlora_cli.data.prepared.scan import DatasetScan
from qlora_cli.data.prepared.statistics import DatasetStatistics, LengthBar, RowStatistics
from qlora_cli.errors import DataError
from qlora_cli.types import IGNORE_INDEX, Example

BOS, STOP = 1, 2
MAX_LENGTH = 12


class Examples(list[Example]):
    """Rows of sources, in memory."""

    def __init__(self, examples: list[Example], sources: list[int], places: list[str]) -> None:
        super().__init__(examples)
        self._sources = sources
        self._places = places

    def source(self, index: int) -> int:
        return self._sources[index]

    def place(self, index: int) -> str:
        return self._places[index]


def row(text: str) -> Example:
    """One token per character: capitals are supervised, `^` is BOS, `!` a supervised stop."""
    ids = [{"^": BOS, "!": STOP}.get(c, ord(c.lower())) for c in text]
    supervised = [c.isupper() or c == "!" for c in text]
    labels = [i if is_label else IGNORE_INDEX for i, is_label in zip(ids, supervised, strict=True)]
    return Example(ids, labels)


def rows(*texts: str) -> Examples:
    """Build rows of one source at the places `a:1`, `a:2` ..."""
    places = [f"a:{number}" for number in range(1, len(texts) + 1)]
    return Examples([row(text) for text in texts], [0] * len(texts), places)


def scan_of(examples: Examples) -> DatasetScan:
    scan = DatasetScan(added_token_ids={BOS, STOP}, bos_token_id=BOS, max_length=MAX_LENGTH)
    for i, example in enumerate(examples):
        scan.add(example, examples.source(i))
    return scan


def audit(*texts: str, training: tuple[str, ...] | None = None) -> DatasetStatistics:
    return scan_of(rows(*texts)).audit(None if training is None else scan_of(rows(*training)))


def test_audit_totals_of_a_few_rows() -> None:
    assert audit("abcDE!", "abcF!", "xyz").total == RowStatistics(
        num_rows=3,
        num_tokens=14,
        num_supervised=5,
        num_empty=1,
        num_turns=2,
        num_unfinished=0,
        num_stopped=2,
        num_double_bos=0,
        num_duplicates=0,
        num_seen=0,
        num_asked=0,
        shortest=3,
        median=5,
        longest=6,
    )


def test_a_sources_figures_count_only_its_own_rows() -> None:
    examples = Examples([row("aB!"), row("cccD!"), row("aB!")], [0, 1, 1], ["a:1", "b:1", "b:2"])
    first, second = scan_of(examples).audit().sources
    assert (first.num_rows, first.num_tokens, first.num_duplicates) == (1, 3, 0)
    assert (second.num_rows, second.num_tokens, second.num_duplicates) == (2, 8, 1)
    assert scan_of(examples).first_rows(1, 1) == [1]
    assert scan_of(examples).first_rows(1, None) == [1, 2]


def test_the_first_token_of_a_row_is_not_supervised() -> None:
    total = audit("AB!").total
    assert (total.num_tokens, total.num_supervised) == (3, 2)
    assert audit("A").total.num_empty == 1


def test_turns_are_counted_by_stop_token() -> None:
    found = audit("aB!cD!", "aB!cDd")
    assert (found.total.num_turns, found.total.num_stopped, found.total.unstopped) == (4, 3, 1)
    assert found.ends == {STOP: 3}


def test_a_truncated_turn_is_unfinished_rather_than_unstopped() -> None:
    cut = "a" * (MAX_LENGTH - 2)
    found = audit(f"{cut}BB")
    total = found.total
    assert (total.num_turns, total.num_unfinished, total.unstopped) == (1, 1, 0)
    assert findings(rows(f"{cut}BB"), found, TemplateDrift(0, []), CUT)[2:4] == [
        Finding("turns that do not end in their row", 1, 1),
        Finding("turns that end in no stop token", 0, 1),
    ]
    assert audit(f"{cut}B!").total.num_stopped == 1
    assert audit(f"{cut[:-1]}BB").total.unstopped == 1


def test_duplicates_point_to_the_first_row_with_the_same_tokens() -> None:
    found = audit("aB!", "cD!", "aB!", "aBb", "aB!")
    assert found.total.num_duplicates == 2
    assert found.duplicates == [(2, 0), (4, 0)]


def test_rows_with_equal_tokens_but_other_labels_are_duplicates() -> None:
    assert audit("abC!", "aBC!").total.num_duplicates == 1


def test_double_bos_is_counted() -> None:
    assert audit("^^aB!", "^aB!", "aB!", "^aB!^").total.num_double_bos == 1


def test_an_evaluation_row_that_is_also_in_training_is_found() -> None:
    found = audit("axY!", "aaB!", training=("acD!", "aaB!", "aaB!"))
    assert (found.total.num_seen, found.total.num_asked) == (1, 0)
    assert found.seen == [(1, 1)]


def test_a_prompt_with_another_answer_in_training_is_found() -> None:
    found = audit("aaBb", "azB!", training=("acD!", "aaC!"))
    assert (found.total.num_seen, found.total.num_asked) == (0, 1)
    assert found.asked == [(0, 1)]


def test_the_prompt_is_everything_before_the_last_answer() -> None:
    found = audit("aaB!cD!", training=("aaB!cE!",))
    assert found.asked == [(0, 0)]
    assert audit("aaB!cD!", training=("aaX!cD!",)).asked == []


def test_a_prompt_answered_in_an_earlier_training_turn_is_found() -> None:
    assert audit("aaB!", training=("azY!", "aaX!cD!")).asked == [(0, 1)]


@pytest.mark.parametrize(
    "start", ["", "^", "x"], ids=["nothing", "bos", "last of the piece before"]
)
def test_plain_text_has_no_prompt_to_share(start: str) -> None:
    assert audit(f"{start}AB!", training=(f"{start}XY!",)).total.num_asked == 0


def test_training_rows_without_a_prompt_share_nothing() -> None:
    assert audit("aaB!", training=("XY!",)).total.num_asked == 0


def test_a_supervised_line_break_after_the_stop_token_is_not_a_turn() -> None:
    found = audit("AB!C", "ABC")
    assert (found.total.num_turns, found.total.num_stopped, found.ends) == (2, 1, {STOP: 1})


@pytest.mark.parametrize(
    ("lengths", "bars"),
    [
        ([3], [(3, 3, 1)]),
        ([1, 2, 2, 4], [(1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 4, 1)]),
        ([9, 30], [(8, 9, 1), *((n, n + 1, 0) for n in range(10, 30, 2)), (30, 31, 1)]),
        (
            [120, 199, 700],
            [(100, 199, 2), *((n, n + 99, 0) for n in range(200, 700, 100)), (700, 799, 1)],
        ),
    ],
)
def test_bars_have_one_round_width(lengths: list[int], bars: list[tuple[int, int, int]]) -> None:
    found = audit(*("a" * length for length in lengths)).bars
    assert found == [LengthBar(*bar) for bar in bars]


def test_a_row_that_does_not_begin_with_its_prompt_drifts() -> None:
    examples = rows("abC!", "abC!", "abcD!", "abX!cD!", "ab")
    a, b, c, x = (ord(character) for character in "abcx")
    prompts = [
        (0, [a, b]),
        (1, [a, c]),
        (2, [a, b]),  # the same tokens, but supervised from the next one on
        (3, [a, b, x, STOP, c]),
        (4, [a]),
    ]
    assert find_drift(examples, prompts) == TemplateDrift(5, [1, 2, 4])


@pytest.mark.parametrize(
    ("finding", "shown"),
    [
        (Finding("a", 0, 9), ()),
        (Finding("a", 5, 9), ()),  # a kind that names no rows
        (Finding("a", 2, 9, ("x", "y")), ("x", "y")),
        (Finding("a", 6, 9, ("x", "y", "z")), ("x", "y", "z", "and 3 more")),
        (Finding("a", 17, 189, ("x", "y", "z"), num_groups=5), ("x", "y", "z", "and 2 more")),
        (Finding("a", 17, 189, ("x", "y", "z"), num_groups=3), ("x", "y", "z")),
    ],
)
def test_a_finding_counts_what_it_does_not_name(finding: Finding, shown: tuple[str, ...]) -> None:
    assert finding.first_named() == shown
    more = finding.num_groups or finding.count
    assert finding.first_named(1) == (*shown[:1], *([f"and {more - 1} more"] if shown else []))


CUT = Finding("rows longer than data.max_length", 0, 9)


def test_findings_name_the_first_rows() -> None:
    training, held_out = rows("aaB!", "aaB!", "acD!"), rows("aaB!", "acX!", "^^zY!", "azY", "q")
    drift = TemplateDrift(4, [2])
    audited = scan_of(held_out).audit(scan_of(training))
    assert findings(held_out, audited, drift, CUT, training=training) == [
        CUT,
        Finding("rows with nothing to learn", 1, 5),
        Finding("turns that end in no stop token", 1, 4),
        Finding("rows whose prompt differs in generation", 1, 4, ("a:3",)),
        Finding("rows that begin with two BOS tokens", 1, 5),
        Finding("rows that repeat an earlier one", 0, 5),
        Finding("rows that training has too", 1, 5, ("a:1 = a:1",)),
        Finding("rows whose prompt training answers otherwise", 1, 5, ("a:2 = a:3",)),
    ]
    repeated = rows(*["aB!"] * 6)
    found = findings(repeated, scan_of(repeated).audit(), TemplateDrift(0, []), CUT)[-1]
    assert (found.found, found.named) == (
        "5 of 6 (83.33%)",
        ("a:2 = a:1", "a:3 = a:1", "a:4 = a:1"),
    )


TRAINING = ("aaB!", "aaB!", "acD!", "aeF!")
HELD_OUT = ("aaB!", "acX!", "agH!", "aiJ!")


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_duplicates": 0.2}, "max_duplicates (0.2): 25.00% of the training rows repeat"),
        ({"max_overlap": 0.4}, "max_overlap (0.4): 50.00% of the evaluation rows are shown"),
        ({"max_truncated": 0.1}, "max_truncated (0.1): 12.50% of the training rows are longer"),
        ({"min_learnt": 0.7}, "min_learnt (0.7): 50.00% of the training tokens are supervised"),
    ],
    ids=str,
)
def test_each_exceeded_limit_is_an_error(limits: dict[str, float], problem: str) -> None:
    training, held_out = audit(*TRAINING), audit(*HELD_OUT, training=TRAINING)
    with pytest.raises(DataError) as caught:
        AuditLimits(**limits).check(training, held_out, truncated=0.125)
    assert f"data.audit.{problem}" in str(caught.value)
    assert caught.value.hint is not None


def test_all_exceeded_limits_are_named_together() -> None:
    limits = AuditLimits(max_duplicates=0, max_overlap=0, max_truncated=0, min_learnt=1)
    with pytest.raises(DataError) as caught:
        limits.check(audit(*TRAINING), audit(*HELD_OUT, training=TRAINING), truncated=0.5)
    keys = [line.partition(" ")[0] for line in str(caught.value).splitlines()]
    assert keys == [
        f"data.audit.{name}"
        for name in ("max_duplicates", "max_truncated", "max_overlap", "min_learnt")
    ]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_duplicates": 0.25, "max_overlap": 0.5, "max_truncated": 0.125, "min_learnt": 0.5},
    ],
    ids=["none", "just met"],
)
def test_limits_that_are_not_exceeded_pass(limits: dict[str, float]) -> None:
    training, held_out = audit(*TRAINING), audit(*HELD_OUT, training=TRAINING)
    AuditLimits(**limits).check(training, held_out, truncated=0.125)
    AuditLimits(**limits).check(training, None, truncated=0.125)
    assert training.record()["num_duplicates"] == 1
