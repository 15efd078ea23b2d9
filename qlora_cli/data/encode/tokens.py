"""Tokenize rendered rows, with the place of each token in the text."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from qlora_cli.data.render.renderer import RenderedRow
from qlora_cli.data.render.special_tokens import StandIns
from qlora_cli.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A rendered row and its tokens."""

    row: RenderedRow
    """Without stand-ins."""
    ids: list[int]
    offsets: list[tuple[int, int]]
    """First character of each token in the text, and the one after its last."""


class RowTokenizer:
    """Tokenizes rendered rows. Verbatim rows get the BOS and EOS that they lack."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._stand_ins = StandIns(tokenizer)
        bos: int | None = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        self._added_bos = bos if adds_bos else None

    def tokenize(self, rows: list[RenderedRow]) -> list[TokenizedRow]:
        """Tokenize rows that have no stand-ins, together."""
        if not rows:
            return []
        encoding = self._tokenizer(
            [row.text for row in rows],
            # The chat template writes the special tokens; a second BOS would come from here.
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [
            self._enclose(TokenizedRow(row, *pair)) for row, pair in zip(rows, pairs, strict=True)
        ]

    def tokenize_stand_ins(self, row: RenderedRow) -> TokenizedRow:
        """Tokenize a row whose messages contain special tokens, which become plain text.

        What was typed is put back into the text, and the template's own special tokens become
        stand-ins for a copy of the tokenizer in which they have these names.

        Raises:
            DataError: the special tokens found are not exactly the template's own.
        """
        table = self._stand_ins
        expected = [table.ids[found[0]] for found in table.pattern.finditer(row.text)]
        hidden = table.pattern.sub(lambda found: table.control[found[0]], row.text)
        encoding = self._twin.encode(table.restore(hidden), add_special_tokens=False)
        special = set(table.ids.values())
        if [token for token in encoding.ids if token in special] != expected:
            raise DataError(
                "a special token in a message cannot be distinguished from those of the chat "
                "template"
            )
        text = table.restore(row.text)
        return TokenizedRow(replace(row, text=text), encoding.ids, encoding.offsets)

    def tokenize_prompt(self, row: RenderedRow) -> list[int]:
        """Tokenize what precedes an answer: with a BOS that it lacks, and without an EOS.

        Raises:
            DataError: as `tokenize_stand_ins`.
        """
        if row.has_stand_ins:
            return self.tokenize_stand_ins(row).ids
        [whole] = self.tokenize([replace(row, is_verbatim=False)])
        return [*self._missing_bos(whole.ids), *whole.ids] if row.is_verbatim else whole.ids

    def _missing_bos(self, ids: list[int]) -> list[int]:
        """The BOS that verbatim text needs and does not contain."""
        bos = self._added_bos
        return [] if bos is None or ids[:1] == [bos] else [bos]

    def _enclose(self, found: TokenizedRow) -> TokenizedRow:
        """Give a verbatim row one BOS (if the tokenizer adds one) and one EOS."""
        if not found.row.is_verbatim:
            return found
        bos, eos = self._missing_bos(found.ids), [self._tokenizer.eos_token_id]
        if found.ids[-1:] == eos:
            eos = []
        # The EOS gets the place after the last character, where the labels look for it.
        length = len(found.row.text)
        offsets = [*((0, 0) for _ in bos), *found.offsets, *((length, length + 1) for _ in eos)]
        return TokenizedRow(found.row, [*bos, *found.ids, *eos], offsets)

    @cached_property
    def _twin(self) -> Tokenizer:
        """A copy of the tokenizer in which special tokens are named by their control stand-ins.

        Everything else is unchanged: normalizing, splitting, merging, and offsets.
        """
        from tokenizers import Tokenizer

        document = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in document["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = document["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self._renamed(text), score] for text, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._renamed(model["unk_token"])
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not self._makes_special(pair)]
        twin = Tokenizer.from_str(json.dumps(document))
        twin.no_truncation()
        twin.no_padding()
        return twin

    def _renamed(self, text: str) -> str:
        return self._stand_ins.control.get(text, text)

    def _makes_special(self, pair: list[str] | str) -> bool:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        return not self._stand_ins.ids.keys().isdisjoint((left, right, left + right))
