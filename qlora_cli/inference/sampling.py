"""Generate completions: greedy or sampled, in batches or streamed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.common.hashing import hash_text
from qlora_cli.data.batching.collate import prompt_batches
from qlora_cli.errors import RecipeError
from qlora_cli.models.context import check_prompts, context_of, limit_new_tokens
from qlora_cli.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        RecipeError: a setting is out of bounds, or would have no effect.
    """

    temperature: float = 0.0
    """0 takes the most likely token (greedy decoding); 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    top_k: int = 0
    """Sample from the K most likely tokens (0 = all)."""
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
        }
        for name, (is_allowed, allowed) in bounds.items():
            if not is_allowed:
                raise RecipeError(f"{name}: {getattr(self, name)}; allowed: {allowed}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise RecipeError(
                "top-p and top-k have no effect at temperature 0, where the most likely token is "
                "always taken",
                hint="give a temperature, such as 0.7",
            )


@dataclass(frozen=True, slots=True)
class Completion:
    """Text that a model generated for a prompt."""

    text: str
    """Without special tokens, and without the `lead` of the prompt."""
    num_tokens: int
    """Generated tokens; the stop token is not counted."""
    ended: Literal["stop", "length", "interrupted"]
    """By a stop token, by `max_new_tokens` or a full context, or by the user."""


@dataclass(frozen=True, slots=True)
class TextGenerator:
    """A loaded model, and what it takes to generate text with it."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    stop_token_ids: Sequence[int]
    dtype: torch.dtype
    """Autocast dtype; float32 turns autocast off."""
    device: torch.device

    @torch.no_grad()
    def complete(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the prompt, completion), batch by batch, longest prompts first.

        Each prompt samples with its own generator, seeded by `sampling.seed` and the prompt's
        index, so its completion does not depend on the other prompts in its batch. A completion
        ends where the model's context is full; a warning counts those that this cut off.

        Raises:
            DataError: a prompt leaves no room in a context whose positions are a table.
        """
        context = context_of(self.model)
        # Where positions are computed, the commands have warned.
        if context is not None and context.is_table:
            check_prompts(prompts, context)
        # Prompts whose completions have another limit are in other batches.
        by_limit: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            limit = limit_new_tokens(len(prompt.input_ids), sampling.max_new_tokens, context)
            by_limit.setdefault(limit, []).append(index)
        num_cut = 0
        with eval_mode(self.model), _contiguous_head_inputs(self.model):
            for limit, indices in sorted(by_limit.items()):
                limited = replace(sampling, max_new_tokens=limit)
                chosen = [prompts[index] for index in indices]
                for place, completion in self._complete(chosen, indices, limited, batch_size):
                    is_cut = completion.ended == "length" and limit < sampling.max_new_tokens
                    num_cut += is_cut
                    yield indices[place], completion
        if context is not None and num_cut:
            log.warning(
                "%d of %d answers end where the model's context of %s is full, before "
                "%d new tokens",
                num_cut, len(prompts), context.text, sampling.max_new_tokens,
            )  # fmt: skip

    def _complete(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index in `prompts`, completion), batch by batch.

        Args:
            seeds: seed of each prompt, together with `sampling.seed`.
        """
        for batch in prompt_batches(
            prompts, batch_size=batch_size, pad_token_id=self.tokenizer.pad_token_id
        ):
            with self._autocast():
                output = self.model.generate(
                    input_ids=batch.input_ids.to(self.device),
                    attention_mask=batch.attention_mask.to(self.device),
                    generation_config=self._generation_config(sampling),
                    logits_processor=_logits_processors(
                        sampling, [seeds[index] for index in batch.indices], self.device
                    ),
                )  # (B, T + new)
            new = output[:, batch.input_ids.shape[1] :].tolist()
            for index, ids in zip(batch.indices, new, strict=True):
                yield index, self._completion(ids, prompts[index].lead)

    @torch.no_grad()
    def stream(
        self, prompt: Prompt, sampling: Sampling, *, turn: int, write: Callable[[str], None]
    ) -> Completion:
        """Generate one completion and write it while it grows. Ctrl-C ends it and keeps its text.

        Args:
            turn: number of the completion in the conversation; it seeds the sampling together with
                `sampling.seed`.
        """
        streamer = TextStream(self.tokenizer, self.stop_token_ids, write, lead=prompt.lead)
        input_ids = torch.tensor([prompt.input_ids], device=self.device)  # (1, T)
        try:
            with _contiguous_head_inputs(self.model), self._autocast():
                self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=self._generation_config(sampling),
                    logits_processor=_logits_processors(sampling, [turn], self.device),
                    streamer=streamer,
                )
        except KeyboardInterrupt:
            streamer.end()
            return replace(self._completion(streamer.ids, prompt.lead), ended="interrupted")
        return self._completion(streamer.ids, prompt.lead)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _generation_config(self, sampling: Sampling) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            # `GumbelSampler` samples, if anything does.
            do_sample=False,
            num_beams=1,
            # transformers fills settings left out here from the model's own generation config.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            eos_token_id=list(self.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _completion(self, ids: Sequence[int], lead: str) -> Completion:
        found = _to_completion(ids, self.tokenizer, self.stop_token_ids)
        return replace(found, text=found.text.removeprefix(lead))


@contextmanager
def _contiguous_head_inputs(model: Any) -> Iterator[None]:
    """Make the input of the language model head contiguous.

    `generate` gives the head the last position of each row, a view with gaps between the rows. For
    such a view in bfloat16 on a CPU, torch copies the head's weights once per row.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def _logits_processors(sampling: Sampling, indices: Sequence[int], device: torch.device) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(
        [GumbelSampler(sampling, indices, device)] if sampling.temperature > 0 else []
    )


class GumbelSampler:
    """Sample the next token of each row with a generator of that row.

    The argmax of logits plus Gumbel noise is a sample from their softmax (Gumbel 1954). After this
    logits processor a greedy choice is therefore a sample, and one that does not depend on the
    other rows of the batch.

    Args:
        indices: seed of each row, together with `sampling.seed`.
        device: device of the logits, on which the noise is drawn.
    """

    def __init__(self, sampling: Sampling, indices: Sequence[int], device: torch.device) -> None:
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
            torch.Generator(device).manual_seed(_row_seed(sampling.seed, index))
            for index in indices
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()  # (B, V)
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        # -log of an exponential variable is Gumbel noise.
        exponential = torch.stack(
            [
                torch.empty(scores.shape[1], device=scores.device).exponential_(generator=generator)
                for generator in self._generators
            ]
        )
        smallest = torch.finfo(exponential.dtype).tiny
        return scores - exponential.clamp_min(smallest).log()


def _row_seed(seed: int, index: int) -> int:
    return int(hash_text(f"{seed} {index}")[:14], 16)


def _to_completion(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, stop_token_ids: Sequence[int]
) -> Completion:
    """Decode generated tokens up to the stop token; padding follows it."""
    stops = set(stop_token_ids)
    length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text = str(tokenizer.decode(list(ids[:length]), skip_special_tokens=True))
    return Completion(text, length, "stop" if length < len(ids) else "length")


class TextStream:
    """A streamer for transformers' `generate` that writes the text which new tokens add.

    Args:
        lead: text at the beginning that is not written.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_token_ids: Sequence[int],
        write: Callable[[str], None],
        *,
        lead: str = "",
    ) -> None:
        self._lead = lead
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._write = write
        self._written = 0
        self._has_prompt = False
        self.ids: list[int] = []

    def put(self, tokens: Tensor) -> None:
        """Take new tokens. The first call brings the prompt, which is not written."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.ids += tokens.flatten().tolist()
        text = self._text()
        # One character may span several tokens, and written text cannot be taken back.
        is_begun = self._lead != text and self._lead.startswith(text)
        if not is_begun and not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        """Write the rest of the text."""
        self._flush(self._text())

    def _text(self) -> str:
        # A stop token need not be a special token.
        return _to_completion(self.ids, self._tokenizer, self._stop_token_ids).text

    def _flush(self, text: str) -> None:
        text = text.removeprefix(self._lead)
        if len(text) > self._written:
            new, self._written = text[self._written :], len(text)
            self._write(new)  # after the count: Ctrl-C in here must not write the text twice
