"""Values that travel between parts.

Shapes, everywhere in this code: B rows, T tokens, V vocabulary, D width, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not supervised (as in torch and transformers)."""

DeviceChoice = Literal["auto", "cpu"]
"""The values of the recipe's `device`."""

Row = dict[str, Any]
"""One record of a data source, as read."""

GGUF_KINDS = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
"""Weight formats of GGUF files, by llama.cpp's names: those that need no calibration data."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """The number of positions that a model was made for."""

    length: int
    """Positions for the tokens of a row."""
    is_table: bool
    """Positions are rows of a table, so that a longer row cannot be computed."""
    virtual_tokens: int = 0
    """Virtual tokens before each row, whose positions `length` does not count."""

    @property
    def text(self) -> str:
        """The number of tokens that a row may have, for messages."""
        if not self.virtual_tokens:
            return f"{self.length:,} tokens"
        return (
            f"{self.length:,} tokens ({self.length + self.virtual_tokens:,} less "
            f"{self.virtual_tokens:,} virtual tokens)"
        )


Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call of the assistant."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The role "text" is verbatim text, outside of any template."""

    role: Role
    content: str
    train: bool
    """Supervise the content of this turn, and the end of the turn after it."""
    reasoning: str | None = None
    """The assistant's reasoning before its answer."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The function calls of the assistant."""
    name: str | None = None
    """In a tool's answer: the function that gave it."""
    tool_call_id: str | None = None
    """In a tool's answer: the call that it answers."""
    is_marked: bool = False
    """The row itself says if this turn is supervised, so that no setting changes it."""
    ignored: tuple[str, ...] = ()
    """Keys of the turn that have a value but are not used."""


RowKind = Literal["answers", "pairs", "feedback", "labels"]
"""Content of the rows of a source: answers, pairs of a better and a worse answer, answers that are
good or bad, or texts with labels."""

GOOD, BAD = "good", "bad"
"""The labels of answers in rows of feedback, as text."""

Problem = Literal["single", "multi", "regression"]
"""Prediction of a head: one class, any number of classes, or a number."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The head of a model that scores whole rows, in place of the head that predicts tokens."""

    labels: tuple[str, ...]
    """The names of its outputs."""
    problem: Problem


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation of one row."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call (as in transformers)."""
    rejected: list[Message] | None = None
    """In a preference row: the whole conversation with the rejected answer."""
    margin: float | None = None
    """In a preference row: by how much the chosen answer is better, if the row says so."""
    label: bool | float | str | tuple[str, ...] | None = None
    """In a row of feedback: whether the answer is good. In a labelled row: its class, its classes,
    or its number."""
    train_on_all: bool = False
    """Supervise everything, including the prompt and the template's own text."""
    place: str = ""
    """Place of the row, for messages: `train.jsonl:17`, or `train.parquet, row 17`."""
    repaired: tuple[str, ...] = ()
    """The repairs (`data.repair`) that changed the row."""

    @property
    def is_labelled(self) -> bool:
        """The row has a label in place of supervised answers."""
        return self.label is not None and not any(message.train for message in self.messages)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized row. Labels are unshifted: labels[i] is input_ids[i] or IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    is_linked: bool = False
    """Stays with the example before it in every batch: the second of a pair, the rest of a group.
    The first example of a link, and one on its own, is not linked."""
    prefix: int = 0
    """In a linked example: tokens at its beginning that the first example of its link has too, and
    that neither supervises (the prompt of a pair)."""
    values: tuple[float, ...] = ()
    """Numbers that the objective learns from besides tokens, such as the class of the row."""

    @property
    def num_supervised(self) -> int:
        """Tokens that contribute to the loss. The first one has no predecessor that predicts it."""
        labels = self.labels[1:]
        return len(labels) - labels.count(IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of an evaluation, and its reference answer."""

    input_ids: list[int]
    reference: str
    text: str = ""
    """The tokens as text, for reports."""
    place: str = ""
    """Place of its row: `test.jsonl:17`."""
    lead: str = ""
    """Text that the model generates before the content of its answer, and that is not part of it:
    the channel of GPT-OSS."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: right-padded rows, or one row of several examples without padding."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) int64, 1 for real tokens; None without padding
    labels: Tensor  # (B, T) int64, unshifted, IGNORE_INDEX where not supervised
    documents: tuple[int, ...] = ()
    """Without padding: the lengths of the examples in the one row; their sum is T."""
    examples: tuple[tuple[int, ...], ...] = ()
    """The examples in each row, by their index in the data; () if not needed."""
    links: tuple[int, ...] = ()
    """Number of consecutive examples (rows, or documents if packed) in each link: (2, 2) for two
    pairs. () if every example stands on its own."""
    prefixes: tuple[int, ...] = ()
    """Without padding: for each document, the tokens at its beginning that are not repeated: they
    are those of the first document of its link. () if none is left out."""
    values: tuple[tuple[float, ...], ...] = ()
    """Numbers that the objective learns from besides tokens, for each link; () if none."""
    reference: Tensor | None = None  # (S,) float64
    """Log-probability of each example under the reference model, where an objective has one."""
    divergence: Tensor | None = None  # () float64
    """Estimate of the divergence from the reference model over the whole step (KTO)."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        if self.attention_mask is None:
            return self.input_ids.numel()
        return int(self.attention_mask.sum())

    @property
    def num_supervised(self) -> int:
        """Number of tokens that contribute to the loss; nothing predicts the first one of a row."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        """Copy the inputs to a device. Labels stay on the host: counting them does not wait."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=copy_to(device, self.input_ids),
            attention_mask=None if mask is None else copy_to(device, mask),
        )

    @property
    def num_examples(self) -> int:
        """Number of examples: rows with padding, documents without."""
        return len(self.documents) or len(self.input_ids)

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a model's forward, by transformers' names.

        Examples in one row are separated by positions that restart at 0, and by boundaries for
        back ends that use them: `cu_seq_lens_*` for flash attention, `documents` for ours, and
        `shared` for prefixes that are computed once.
        """
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        import torch

        device = self.input_ids.device
        shared = SharedTokens.of(self) if self.prefixes else None
        lengths = shared.lengths if shared else self.documents
        begins = self.prefixes or (0,) * len(self.documents)
        spans = zip(begins, self.documents, strict=True)
        positions = torch.cat([torch.arange(at, at + length) for at, length in spans])[None]
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        ends = copy_to(device, ends)
        longest = max(lengths)
        return {
            "input_ids": self.input_ids,
            "position_ids": copy_to(device, positions),
            "documents": lengths,
            **({} if shared is None else {"shared": shared.to(device)}),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """Places of the whole documents in a row that repeats no shared prefix.

    T is the number of tokens in the row, S that of all documents with their prefixes.
    """

    lengths: tuple[int, ...]
    """Tokens of each document with its prefix; their sum is S."""
    gather: Tensor  # (S,) int64: the place in the row of each token of the whole documents
    own: Tensor  # (T,) int64: the place in the whole documents of each token of the row
    repeats: Tensor  # (S - T,) int64: the places in the whole documents of the repeated tokens

    @classmethod
    def of(cls, batch: Batch) -> SharedTokens:
        """Find the places, on the host."""
        import torch

        starts = list(accumulate(batch.documents, initial=0))
        gather: list[int] = []
        own: list[int] = []
        repeats: list[int] = []
        lengths: list[int] = []
        for number in batch.links:
            first = starts[len(lengths)]
            for _ in range(number):
                start, prefix = starts[len(lengths)], batch.prefixes[len(lengths)]
                length = batch.documents[len(lengths)]
                repeats += range(len(gather), len(gather) + prefix)
                gather += range(first, first + prefix)
                own += range(len(gather), len(gather) + length)
                gather += range(start, start + length)
                lengths.append(prefix + length)
        return cls(tuple(lengths), *map(torch.tensor, (gather, own, repeats)))

    def to(self, device: torch.device) -> SharedTokens:
        """Copy the places to a device."""
        places = (copy_to(device, places) for places in (self.gather, self.own, self.repeats))
        return SharedTokens(self.lengths, *places)


def copy_to(device: torch.device, values: Tensor) -> Tensor:
    """Copy values from the host to a device without waiting for it.

    From ordinary memory, CUDA copies in the order of the stream, and the host waits; from pinned
    memory it does not. The pinned copy is kept until the device has read it.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(slots=True)
class TrainState:
    """State that changes while training, apart from weights and optimizer. JSON-serializable."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens processed so far, over all ranks, without padding."""
    best_step: int | None = None
    """Step with the best weights so far; the evaluation before the first step does not count."""
    best_value: float | None = None
    """Value of `evaluation.best_by` at that step."""
    bad_steps: int = 0
    """Last steps in a row that were not applied: their loss or gradient was not finite."""
    high_steps: int = 0
    """Last steps in a row whose loss was above the limit of `training.spike`."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses that `training.spike` takes the median of, the newest last."""
    passed_over: int = 0
    """Steps whose rows were skipped after spikes; later rows take their place."""
    returns: int = 0
    """Number of times that the run went back to a checkpoint after a spike."""
    not_applied: int = 0
    """Steps of the run that were not applied: their loss or gradient was not finite."""
    first_loss: float | None = None
    """Training loss of the first step that was applied."""
    last_loss: float | None = None
    """Training loss of the last step that was applied."""

    @property
    def is_trained(self) -> bool:
        """At least one step was applied."""
        return self.step > self.not_applied

    def count(self, loss: float, *, is_applied: bool) -> None:
        """Count a step that was just done."""
        self.step += 1
        if not is_applied:
            self.not_applied += 1
            return
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss

    @property
    def position(self) -> int:
        """Index of the next step's rows in the stream of batches."""
        return self.step + self.passed_over


class StepHooks:
    """Work of an adapter method in each step, in addition to the optimizer: here, none."""

    def before_update(self) -> None:
        """Called when all gradients of the step are computed, before they are clipped."""

    def after_update(self, step: int) -> None:
        """Called after the weights were updated, while their gradients still exist.

        Not called after a step that was not applied.

        Args:
            step: optimizer steps done.
        """
