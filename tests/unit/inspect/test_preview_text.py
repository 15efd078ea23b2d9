"""Learnt and special tokens are told apart on a terminal and in a file, and nothing hides."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from qlora_cli.data.prepared.findings import Finding
from qlora_cli.data.prepared.scan import DatasetScan
from qlora_cli.data.prepared.statistics import LengthBar
from qlora_cli.inspect.preview_html import preview_page
from qlora_cli.inspect.preview_model import Sample, SourceView, SplitView, TextSpan, make_sample
from qlora_cli.inspect.preview_text import preview_text, visible
from qlora_cli.types import IGNORE_INDEX, Example
from tests.conftest import make_tokenizer

PIECES = [
    TextSpan("<s>", is_supervised=False, is_special=True),
    TextSpan("Say\nit: ", is_supervised=False, is_special=False),
    TextSpan("so\n", is_supervised=True, is_special=False),
    TextSpan("</s>", is_supervised=True, is_special=True),
    TextSpan("\n", is_supervised=False, is_special=False),
]


def side(spans: list[TextSpan], path: str = "rows.jsonl", place: str = "rows.jsonl:1") -> SplitView:
    """Training on one source of which one row is shown."""
    scan = DatasetScan(added_token_ids={9}, bos_token_id=None, max_length=64)
    scan.add(Example([5, 6, 9], [IGNORE_INDEX, 6, 9]))
    scan.add(Example([5, 6, 7, 8], [IGNORE_INDEX] * 4))
    audit = scan.audit()
    assert audit.bars == [LengthBar(3, 3, 1), LengthBar(4, 4, 1)]
    return SplitView(
        name="training",
        audit=audit,
        stops=[("</s>", 1)],
        findings=[
            Finding("rows with nothing to learn", 1, 2, ("rows.jsonl:2",)),
            Finding("rows that repeat an earlier one", 0, 2),
        ],
        sources=[
            SourceView(
                name="train",
                path=path,
                num_read=4,
                num_bad=1,
                num_swallowed=0,
                num_dropped=1,
                num_cut=2,
                repaired="",
                ignored="",
                figures=audit.sources[0],
                samples=[Sample(place, num_tokens=1234, num_supervised=2, spans=spans)],
            )
        ],
    )


TEXT = """\
⟦supervised⟧ not supervised   ◆ before a special token   ⏎ line break

train: rows.jsonl
4 rows, 1 bad, 1 dropped, 2 cut; 7 tokens, 28.6% supervised

rows.jsonl:1: 1,234 tokens, 2 supervised
  ◆<s>Say⏎
  it: ⟦so⏎
  ◆</s>⟧⏎

training: 2 rows
lengths 3 to 4 tokens, median 4; 7 tokens, 28.6% supervised
  3 to 3  ████████████████████████████████████████ 1
  4 to 4  ████████████████████████████████████████ 1
supervised turns: 1, ended by </s> 1
rows with nothing to learn       1 of 2 (50.00%)
  rows.jsonl:2
rows that repeat an earlier one  0 of 2"""


def test_the_whole_text_without_colour() -> None:
    assert preview_text([side(PIECES)], colour=False) == TEXT


def test_colour_takes_the_place_of_marks() -> None:
    text = preview_text([side(PIECES)], colour=True)
    assert "\x1b[2;7m<s>\x1b[0m\x1b[2mSay⏎\x1b[0m\n" in text
    assert "\x1b[32mso⏎\x1b[0m\n  \x1b[1;7;32m</s>\x1b[0m" in text
    assert "\x1b[33mrows with nothing to learn       1 of 2 (50.00%)\x1b[0m" in text
    assert not re.search("[⟦⟧◆]", text)
    assert all(line.count("\x1b") % 2 == 0 for line in text.splitlines())


def test_the_answers_of_a_preference_are_named() -> None:
    shown = side(PIECES)
    shown.sources[0].samples[:] = [
        Sample("a:1", 5, 2, [*PIECES[:2], replace(PIECES[2], is_parting=True)], answer=answer)
        for answer in ("chosen", "rejected")
    ]
    assert "  it: ⟦┆so⏎" in preview_text([shown], colour=False)
    assert "it: \x1b[0m\x1b[33m┆\x1b[0m\x1b[32mso⏎" in preview_text([shown], colour=True)
    assert 'title="the answers part here">┆</span><span class="supervised">so' in preview_page(
        [shown], title="x"
    )
    text, page = preview_text([shown], colour=False), preview_page([shown], title="x")
    for answer in ("chosen", "rejected"):
        assert f"a:1, {answer}: 5 tokens, 2 supervised" in text
        assert f"a:1, {answer}: 5 tokens, 2 supervised" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("äöü 👍 日本", "äöü 👍 日本"),
        ("a\nb", "a⏎\nb"),
        ("a\tb\r", r"a\tb\r"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\xa0b\u200b\u202ec", r"a\xa0b\u200b\u202ec"),
        ("⏎ is a key", r"\u23ce is a key"),
    ],
)
def test_invisible_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_markers_in_the_data_are_not_treated_as_markers() -> None:
    spans = [TextSpan("⟦x⟧ ◆", is_supervised=False, is_special=False)]
    assert r"  \u27e6x\u27e7 \u25c6" in preview_text([side(spans)], colour=False)
    assert "⟦x⟧ ◆" in preview_text([side(spans)], colour=True)


def test_a_row_is_cut_where_its_kind_of_token_changes() -> None:
    tokenizer = make_tokenizer()
    start, stop = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ask, say = tokenizer("hé <")["input_ids"], tokenizer(" ä\n")["input_ids"]
    ids = [start, *ask, *say, stop, stop]
    first = 1 + len(ask)
    example = Example(ids, [IGNORE_INDEX] * first + ids[first:-1] + [IGNORE_INDEX])
    assert make_sample(example, "a:1", tokenizer) == Sample(
        place="a:1",
        num_tokens=len(ids),
        num_supervised=len(say) + 1,
        spans=[
            TextSpan("<|im_start|>", is_supervised=False, is_special=True),
            TextSpan("hé <", is_supervised=False, is_special=False),
            TextSpan(" ä\n", is_supervised=True, is_special=False),
            TextSpan("<|im_end|>", is_supervised=True, is_special=True),
            TextSpan("<|im_end|>", is_supervised=False, is_special=True),
        ],
    )


def test_a_space_before_a_piece_is_shown_whatever_the_decoder_does() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁say": 0, "▁so": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert fast.decode([1]) == "so"
    sample = make_sample(Example([0, 1, 2], [IGNORE_INDEX, 1, 2]), "a:1", fast)
    assert [piece.text for piece in sample.spans] == ["say", " so", "</s>"]


EVIL = "<script>alert('\"&</script>"


def test_a_page_escapes_whatever_comes_from_the_data() -> None:
    spans = [
        TextSpan(EVIL, is_supervised=is_supervised, is_special=False)
        for is_supervised in (False, True)
    ]
    shown = side(spans, path=f"{EVIL}.jsonl", place=f"{EVIL}.jsonl:1")
    shown.stops[:] = [(EVIL, 1)]
    shown.findings[:] = [Finding(EVIL, 1, 2, (EVIL,))]
    page = preview_page([shown], title=EVIL)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;&#34;&amp;&lt;/script&gt;") == 10


def test_a_page_needs_nothing_from_outside() -> None:
    page = preview_page([side(PIECES)], title="mine")
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page)


def test_a_page_marks_supervised_and_special_tokens() -> None:
    page = preview_page([side(PIECES)], title="mine")
    assert (
        '<pre><span class="special">&lt;s&gt;</span>Say⏎\nit: <span class="supervised">so⏎\n</span>'
        '<span class="supervised special">&lt;/s&gt;</span>⏎\n</pre>'
    ) in page
    assert (
        '<tr class="suspect"><td>rows with nothing to learn</td>'
        "<td>1 of 2 (50.00%)<br/>rows.jsonl:2" in page
    )
    assert "<tr><td>rows that repeat an earlier one</td><td>0 of 2" in page
    assert "<title>mine</title>" in page
