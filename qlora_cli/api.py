"""The Python interface to a trained model: generate, chat, classify."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.common.user_paths import expand_path
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.evaluate.scorer import ModelScorer
from qlora_cli.inference.predict import predictions, row_reader
from qlora_cli.inference.sampling import Sampling
from qlora_cli.inference.session import InferenceSession, limit_sampling, open_session
from qlora_cli.models.context import check_length, check_prompts
from qlora_cli.runs.run_folder import Weights
from qlora_cli.tasks import Classification
from qlora_cli.tasks.choice import encode_choice
from qlora_cli.types import HeadSpec, Message, Row

log = logging.getLogger("qlora")

Request = str | Row | Sequence[Mapping[str, Any]]
"""A text, the messages of a conversation, or a row with the columns of the recipe's data."""


@dataclass(frozen=True, slots=True)
class LabelChoice:
    """The most likely of several labels."""

    label: str
    probabilities: dict[str, float]
    """Label -> probability among these labels, in the order given."""


class Model:
    """A trained model in memory. `qlora_cli.load` makes one."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self._model = session.default
        self._reader = session.reader()
        self._history: list[Message] = []

    def generate(
        self,
        prompt: Request,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """Return the answer to one prompt, as `qlora generate` writes it.

        Raises:
            DataError: the prompt is missing, or does not fit into the context.
            RecipeError: a setting is out of bounds.
        """
        sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
        return self._answers([prompt], sampling, batch_size=1)[0]

    def generate_all(
        self,
        prompts: Sequence[Request],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """Return the answer to each prompt, in their order.

        A sampled answer depends on `seed` and on the place of its prompt, not on the batch.

        Raises:
            DataError: a prompt is missing, or does not fit into the context.
            RecipeError: a setting is out of bounds.
        """
        if isinstance(prompts, str | Mapping):
            raise RecipeError(
                "prompts: got one prompt, expected a list", hint="generate() answers one prompt"
            )
        if batch_size < 1:
            raise RecipeError(f"batch_size: {batch_size}; allowed: at least 1")
        sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
        return self._answers(prompts, sampling, batch_size=batch_size)

    def chat(
        self,
        message: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """Answer a message of a conversation, which continues until `reset`.

        Raises:
            DataError: the message is empty, or the conversation fills the context.
            RecipeError: a setting is out of bounds.
        """
        self._refuse_head()
        sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
        typed = [*self._history, Message("user", message, train=False)]
        prompt = self._session.prompt(self._model, self._reader.conversation(typed))
        limited = limit_sampling(self._model, sampling, prompt)
        with self._session.use(self._model) as generator:
            answer = generator.stream(
                prompt, limited, turn=len(self._history) // 2, write=lambda _: None
            )
        if answer.ended == "length" and limited.max_new_tokens < sampling.max_new_tokens:
            log.warning("the context is full; reset() clears the conversation")
        if answer.text:
            self._history = [*typed, Message("assistant", answer.text, train=False)]
        return answer.text

    def reset(self) -> None:
        """Forget the conversation of `chat`."""
        self._history.clear()

    def classify(self, prompt: Request, labels: Sequence[str] | None = None) -> LabelChoice:
        """Return the most likely answer among `labels`, by the likelihood of each.

        It is the answer that the task `classification` of `qlora eval` counts. A model that was
        trained with `objective: classify` has a head, which gives the probabilities instead.

        Args:
            labels: the possible answers; None takes those of the recipe's classification task. A
                model with a head takes only the labels of its head. A model without a chat template
                continues the prompt with the label as it is, so it needs the space between them.

        Raises:
            DataError: the prompt is missing, or does not fit into the context.
            RecipeError: there are fewer than two labels, or the head of the model has others, or
                predicts a number.
        """
        if self._session.head is not None:
            return self._classified(self._session.head, prompt, labels)
        names = self._checked_labels(labels)
        conversation, _ = self._reader.read(_row(prompt))
        *before, answer = conversation.messages
        item = encode_choice(
            self._model.encoder,
            self._model.tokenizer,
            replace(conversation, messages=before),
            replace(answer, content="", reasoning=None, tool_calls=()),
            names,
            answer=0,
            place="",
        )
        # Less one: a label in the row takes no further token.
        longest = max(len(one.input_ids) for one in item.examples)
        check_length(longest - 1, self._model.context)
        with self._session.use(self._model) as generator:
            log_p = ModelScorer(
                self._model.name,
                generator.model,
                self._session.recipe,
                self._model.tokenizer,
                self._session.dtype,
                self._session.world,
            ).log_likelihoods(item.examples)
        best = max(log_p)
        shares = [math.exp(one - best) for one in log_p]
        probabilities = {
            name: share / sum(shares) for name, share in zip(names, shares, strict=True)
        }
        return LabelChoice(names[log_p.index(best)], probabilities)

    def predict(self, rows: Sequence[Request], *, batch_size: int = 8) -> list[dict[str, Any]]:
        """Return what the head of the model says about each row, as `qlora predict` writes it.

        For one label per row, `label` and `probabilities` (label -> probability); for any number of
        labels, `labels` and `probabilities`; for a number or a reward, `value`.

        Args:
            rows: texts, messages of conversations, or rows with the columns of the recipe's data.

        Raises:
            DataError: a row cannot be read.
            RecipeError: the model predicts tokens and not labels or scores.
        """
        if self._session.head is None:
            raise RecipeError(
                "the model predicts tokens; it has no head that scores rows",
                hint="generate() answers a prompt, and classify() chooses between labels",
            )
        reader = row_reader(self._session)
        read = [reader.read(row if isinstance(row, str) else _row(row)) for row in rows]
        return predictions(self._session, read, batch_size=batch_size)

    def _refuse_head(self) -> None:
        """Raise RecipeError if the model scores rows, and writes no text."""
        if (head := self._session.head) is not None:
            raise RecipeError(
                f"the model scores rows ({', '.join(head.labels)}) and writes no text",
                hint="predict(rows), or classify(row) for its labels",
            )

    def _classified(
        self, head: HeadSpec, prompt: Request, labels: Sequence[str] | None
    ) -> LabelChoice:
        if head.problem == "regression":
            raise RecipeError(
                f"the head of the model predicts a number ({head.labels[0]}), not a label",
                hint="predict([text]) returns it",
            )
        if labels is not None and list(labels) != list(head.labels):
            raise RecipeError(
                f"labels: {list(labels)}; the head of the model was trained on "
                f"{', '.join(head.labels)}",
                hint="leave labels out",
            )
        [found] = self.predict([prompt])
        probabilities: dict[str, float] = found["probabilities"]
        return LabelChoice(max(probabilities, key=probabilities.__getitem__), probabilities)

    def _answers(
        self, prompts: Sequence[Request], sampling: Sampling, *, batch_size: int
    ) -> list[str]:
        self._refuse_head()
        questions = []
        for number, prompt in enumerate(prompts):
            try:
                question = self._reader.question(_row(prompt), self._model.encoder).prompt
            except DataError as error:
                place = f"prompt {number}: " if len(prompts) > 1 else ""
                raise DataError(f"{place}{error}", hint=error.hint) from error
            questions.append(question)
        check_prompts(questions, self._model.context)
        with self._session.use(self._model) as generator:
            found = dict(generator.complete(questions, sampling, batch_size=batch_size))
        return [found[index].text for index in range(len(prompts))]

    def _checked_labels(self, labels: Sequence[str] | None) -> list[str]:
        if labels is None:
            tasks = self._session.recipe.evaluation.tasks
            named = [task.labels for task in tasks if isinstance(task, Classification)]
            labels = next(filter(None, named), None)
        if labels is None:
            raise RecipeError(
                "labels: missing, and the recipe has no classification task that names them",
                hint='classify(prompt, ["positive", "negative"])',
            )
        is_list = not isinstance(labels, str) and all(isinstance(one, str) for one in labels)
        if not is_list or len(set(labels)) < 2 or len(set(labels)) < len(labels) or "" in labels:
            raise RecipeError(
                f"labels: {labels!r}; give a list of at least two different texts",
                hint='classify(prompt, ["positive", "negative"])',
            )
        return list(labels)


def load_model(target: str, *, weights: Weights, overrides: Sequence[str]) -> Model:
    """Open a session on a run, adapter, model or recipe. `~` in its path is expanded.

    Raises:
        QloraError: the model cannot be loaded.
    """
    try:
        target = expand_path(target)
    except ValueError as error:
        raise RecipeError(f"run: {error}") from error
    return Model(open_session(target, overrides, weights=weights, scores_rows=None))


def _row(request: Request) -> Row:
    """Return a request as a row of a file of prompts."""
    match request:
        case str():
            return {"prompt": request}
        case Mapping():
            return dict(request)
        case [*messages] if all(isinstance(one, Mapping) for one in messages):
            return {"messages": [dict(one) for one in messages]}
        case _:
            raise DataError(
                f"got a {type(request).__name__}; expected a text, a list of messages, or a row "
                "with the columns of the recipe's data"
            )
