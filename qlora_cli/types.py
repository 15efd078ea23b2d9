"""Values that travel between parts.

Shapes, everywhere in this code: B rows, T tokens, V vocabulary, D width, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not learnt from (as in torch and transformers)."""

Row = dict[str, Any]
"""One record of a data source, as read."""

GGUF_KINDS = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
"""How weights are held in a GGUF file, by llama.cpp's names: the kinds that need no calibration."""

Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant asks for."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The role "text" is a verbatim piece: no template is put around it."""

    role: Role
    content: str
    train: bool
    """Whether the model learns to produce this content (and the end of the turn after it)."""
    reasoning: str | None = None
    """What the assistant thought before it answered."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The functions that the assistant asks for."""
    name: str | None = None
    """Of a tool's answer: which function gave it."""
    tool_call_id: str | None = None
    """Of a tool's answer: which call it answers."""
    is_marked: bool = False
    """Whether the row itself says if this turn is learnt, so that no setting changes it."""
    ignored: tuple[str, ...] = ()
    """Keys of the turn that hold something, and that nobody reads."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one row says."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may ask for (as in transformers)."""
    rejected: list[Message] | None = None
    """Of a preference: the whole conversation with the answer that was not chosen."""
    train_on_all: bool = False
    """Everything is learnt, the prompt and what the template writes included."""
    place: str = ""
    """For messages to the user: `train.jsonl:17`, or `train.parquet, row 17`."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized row. Labels are unshifted: labels[i] is input_ids[i] or IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    is_linked: bool = False
    """Stays with the example before it in every batch: the second of a pair, the rest of a group.
    The first example of a link, and one on its own, is not linked."""

    @property
    def num_supervised(self) -> int:
        """Tokens that contribute to the loss. The first has no predecessor to predict it from."""
        labels = self.labels[1:]
        return len(labels) - labels.count(IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given at evaluation, and the answer that is due."""

    input_ids: list[int]
    reference: str
    text: str = ""
    """The tokens as text, for whoever looks at the answer."""
    place: str = ""
    """Of its row: `test.jsonl:17`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: rows that are right-padded, or one row of examples end to end (packed)."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) int64, 1 for real tokens; None if packed
    labels: Tensor  # (B, T) int64, unshifted, IGNORE_INDEX where nothing is learnt
    documents: tuple[int, ...] = ()
    """Packed: the lengths of the examples in the one row, which is as long as all of them."""
    examples: tuple[tuple[int, ...], ...] = ()
    """The examples in each row, by their index in the data; () where nobody asks."""
    links: tuple[int, ...] = ()
    """Number of consecutive examples (rows, or documents if packed) in each link: (2, 2) for two
    pairs. () if every example stands on its own."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        if self.attention_mask is None:
            return self.input_ids.numel()
        return int(self.attention_mask.sum())

    @property
    def num_supervised(self) -> int:
        """Tokens that contribute to the loss; the first of a row has nothing to predict it from."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch for a device. Labels stay on the host: counted there, nobody waits."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
            self.labels,
            self.documents,
            self.examples,
            self.links,
        )

    def inputs(self) -> dict[str, Any]:
        """What a model's forward is given, in transformers' names.

        Packed examples are told apart by positions that begin again, and by boundaries for those
        back ends that take them: `cu_seq_lens_*` for flash attention, `documents` for ours.
        """
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        import torch

        device = self.input_ids.device
        positions = torch.cat([torch.arange(length) for length in self.documents])[None]  # (1, T)
        ends = torch.tensor([0, *self.documents]).cumsum(0, dtype=torch.int32)
        ends = ends.to(device, non_blocking=True)
        longest = max(self.documents)
        return {
            "input_ids": self.input_ids,
            "position_ids": positions.to(device, non_blocking=True),
            "documents": self.documents,
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(slots=True)
class TrainState:
    """What changes while training, apart from weights and optimizer. JSON-serializable."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens read so far, over all ranks, padding not counted."""
    best_step: int | None = None
    """When the weights were the best so far, of all steps that were evaluated but the first."""
    best_value: float | None = None
    """By what `evaluation.best_by` names, then."""
    bad_steps: int = 0
    """Steps in a row, up to now, that were not applied: their loss or gradient was not finite."""
    high_steps: int = 0
    """Steps in a row, up to now, whose loss was above `training.spike`."""
    recent_losses: list[float] = field(default_factory=list)
    """What `training.spike` takes its median of, the newest last."""
    passed_over: int = 0
    """Steps whose rows were left out after a spike, so that later rows take their place."""
    returns: int = 0
    """How often the run went back to a checkpoint because of a spike."""

    @property
    def position(self) -> int:
        """Where the rows of the next step are in the stream of batches."""
        return self.step + self.passed_over


class StepHooks:
    """What a method of training does in each optimizer step beside the optimizer: nothing."""

    def before_update(self) -> None:
        """When all gradients of the step are there, before they are clipped."""

    def after_update(self, step: int) -> None:
        """When the weights were updated, their gradients still there. Not after a step that was not
        applied.

        Args:
            step: optimizer steps done.
        """
