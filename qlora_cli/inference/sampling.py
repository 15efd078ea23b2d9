"""Generate answers: greedy or sampled, in batches or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qlora_cli.common.hashing import hash_text
from qlora_cli.data.batching.collate import prompt_batches
from qlora_cli.errors import RecipeError
from qlora_cli.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        RecipeError: a setting would have no effect.
    """

    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws from what the model says."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 is all."""
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise RecipeError(
                "--top-p and --top-k choose among what may be drawn, and nothing is drawn at "
                "temperature 0",
                hint="give a --temperature, such as 0.7",
            )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote."""

    text: str
    """Without special tokens."""
    num_tokens: int
    """The stop token not counted."""
    ended: Literal["stop", "length", "interrupted"]
    """By a stop token, by the number of tokens allowed, or by the user."""


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerFast,
    *,
    stop_token_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[int, Answer]]:
    """Which prompt, and its answer; batch by batch, the longest prompts first.

    What is drawn for a prompt depends on the seed and the prompt's place among all of them, and not
    on its companions in the batch.
    """
    was_training = model.training
    model.eval()
    with _rows_without_gaps(model):
        for batch in prompt_batches(
            prompts, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id
        ):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model.generate(
                    input_ids=batch.input_ids.to(device),
                    attention_mask=batch.attention_mask.to(device),
                    generation_config=_config(sampling, stop_token_ids, tokenizer),
                    logits_processor=_draws(sampling, batch.indices),
                )  # (B, T + new)
            new = output[:, batch.input_ids.shape[1] :].tolist()
            for index, ids in zip(batch.indices, new, strict=True):
                yield index, _read(ids, tokenizer, stop_token_ids)
    model.train(was_training)


@torch.no_grad()
def stream(
    model: Any,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerFast,
    *,
    stop_token_ids: Sequence[int],
    sampling: Sampling,
    turn: int,
    dtype: torch.dtype,
    device: torch.device,
    write: Callable[[str], None],
) -> Answer:
    """One answer, written piece by piece as it comes. Ctrl-C ends it and keeps what was said.

    Args:
        turn: number of the answer; with the seed it fixes what is drawn.
    """
    pieces = _Pieces(tokenizer, stop_token_ids, write)
    input_ids = torch.tensor([prompt.input_ids], device=device)
    try:
        with (
            _rows_without_gaps(model),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=_config(sampling, stop_token_ids, tokenizer),
                logits_processor=_draws(sampling, [turn]),
                streamer=pieces,
            )
    except KeyboardInterrupt:
        pieces.end()
        return replace(_read(pieces.ids, tokenizer, stop_token_ids), ended="interrupted")
    return _read(pieces.ids, tokenizer, stop_token_ids)


@contextmanager
def _rows_without_gaps(model: Any) -> Iterator[None]:
    """Generation gives the head the last position of each row, a view with gaps between the rows.

    torch multiplies such a view in bfloat16 on a CPU by a copy of the weights for each row.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def _config(
    sampling: Sampling, stop_token_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        # Drawn by `_Draws`, if at all.
        do_sample=False,
        num_beams=1,
        # What is not said here, transformers takes from the model's own generation config.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )


def _draws(sampling: Sampling, indices: Sequence[int]) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList([_Draws(sampling, indices)] if sampling.temperature > 0 else [])


class _Draws:
    """Draws the next token of each row by a generator of the row's own.

    The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954), so a greedy
    choice after this is a draw: one that no companion in the batch has a part in.
    """

    def __init__(self, sampling: Sampling, indices: Sequence[int]) -> None:
        from transformers import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generators = [
            torch.Generator().manual_seed(_seed_of(sampling.seed, index)) for index in indices
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()  # (B, V)
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        waits = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._generators]
        )
        return scores - waits.clamp_min(torch.finfo(waits.dtype).tiny).log().to(scores.device)


def _seed_of(seed: int, index: int) -> int:
    return int(hash_text(f"{seed} {index}")[:14], 16)


def _read(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, stop_token_ids: Sequence[int]
) -> Answer:
    """The answer in what was generated; after a stop token comes padding."""
    stops = set(stop_token_ids)
    length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text = str(tokenizer.decode(list(ids[:length]), skip_special_tokens=True))
    return Answer(text, length, "stop" if length < len(ids) else "length")


class _Pieces:
    """What generation gives its tokens to: writes the text that they add."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_token_ids: Sequence[int],
        write: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._write = write
        self._written = 0
        self._has_prompt = False
        self.ids: list[int] = []

    def put(self, tokens: Tensor) -> None:
        """New tokens; the first call brings the prompt."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.ids += tokens.flatten().tolist()
        text = self._text()
        # The bytes of one character may be in several tokens; what is shown cannot be taken back.
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        """No more tokens."""
        self._flush(self._text())

    def _text(self) -> str:
        # A stop token need not be a special one.
        return _read(self.ids, self._tokenizer, self._stop_token_ids).text

    def _flush(self, text: str) -> None:
        if len(text) > self._written:
            piece, self._written = text[self._written :], len(text)
            self._write(piece)  # Ctrl-C may come here, and what was written is not to come twice
