"""A model to talk to: a base in memory once, and the adapters that take turns on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.switch import AdapterSet
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import FormatConfig, PromptCompletion, TemplateFormat
from qlora_cli.data.prompts import is_verbatim
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.distributed.world import World
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.models.base import as_ids, load_tokenizer, set_stop_tokens, stop_token_ids
from qlora_cli.models.identity import identify
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.recipe.load import load_recipe, recipe_of_model
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.adapter_folder import AdapterFolder, is_adapter
from qlora_cli.runs.run_folder import RunFolder, Weights, is_run
from qlora_cli.types import Message, Prompt, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

BASE = "base"
"""The voice of the base model without an adapter."""
TUNED = "tuned"
"""The voice of the run or adapter that was named."""


@dataclass(frozen=True, slots=True)
class SessionModel:
    """One set of weights, and how it is spoken to."""

    name: str
    adapter: str | None
    """None is the model as it was loaded."""
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    stop_token_ids: list[int]
    """Whatever may end an answer: of the model, of its training and of the chat template."""


class InferenceSession:
    """The model in memory, with its voices.

    Attributes:
        voices: by their names; the base is there unless its weights were trained.
        first: who speaks if nobody else is named.
        formats: of the rows that it learnt from, if it is known.
        is_plain: prompts are continued as they are: it has no chat template, or learnt without.
        context_length: tokens of prompt and answer together; None if the model does not say.
    """

    def __init__(
        self, recipe: Recipe, *, is_known: bool, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        world = World()
        self.device = world.device
        self.dtype = compute_dtype(recipe.quantization, recipe.training.precision, world)
        self._recipe = recipe
        self._tokenizer = tokenizer
        self.formats: list[FormatConfig] = (
            [source.format for source in recipe.data.train_sources] if is_known else []
        )
        self.is_plain = tokenizer.chat_template is None or (
            bool(self.formats) and all(map(is_verbatim, self.formats))
        )
        self._base = load_base(recipe.model, recipe.quantization, self.dtype, world.device)
        config = self._base.config.get_text_config()
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self._adapters = AdapterSet(self._base.eval())
        self.voices: dict[str, SessionModel] = {}
        self.add(BASE, None)
        self.first = self.voices[BASE]

    def add(self, name: str, place: AdapterFolder | None) -> None:
        """A voice; without a place it is the base's.

        Raises:
            RecipeError: the name is taken.
            ModelError: the adapter belongs to another base.
        """
        if name in self.voices:
            raise RecipeError(f"--adapter: there are two adapters called {name}")
        tokenizer, stops = self._tokenizer, set(as_ids(self._base.generation_config.eos_token_id))
        if place is not None:
            place.check_base(self._recipe, identify(self._recipe.model.locate()))
            self._adapters.add(name, place.folder)
            stops |= {*stop_token_ids(place.folder)}
            if (place.folder / "tokenizer_config.json").is_file():
                tokenizer = load_tokenizer(place.folder)
        encoder = Encoder(tokenizer)
        stops |= {tokenizer.eos_token_id, _end_of_turn(encoder)} - {None}
        adapter = None if place is None else name
        voice = SessionModel(name, adapter, tokenizer, encoder, sorted(stops))
        self.voices[name] = voice
        if place is not None and self.first.adapter is None:
            self.first = voice

    def replace_base(self, folder: Path) -> None:
        """Put weights that were trained in full in the place of the base's."""
        self._base = self._recipe.adapter.load(self._base, folder).eval()
        self._adapters = AdapterSet(self._base)
        set_stop_tokens(self._base, stop_token_ids(folder))
        self.voices.clear()
        self.add(TUNED, None)
        self.first = self.voices[TUNED]

    @contextmanager
    def speaking(self, voice: SessionModel) -> Iterator[Any]:
        """The model with the weights of a voice."""
        with self._adapters.using(voice.adapter) as model:
            yield model

    def prompt(self, voice: SessionModel, messages: Sequence[Message]) -> Prompt:
        """What a voice is given to answer the last of the messages.

        Raises:
            DataError: the chat template refuses them, or they are longer than the context.
        """
        role: Role = "assistant"
        said = list(messages)
        if self.is_plain:
            # Without a template nothing tells one turn from another.
            role, said = "text", [Message("text", messages[-1].content, train=False)]
        answer = Message(role, "", train=True)
        prompt = voice.encoder.to_prompt([*said, answer])
        self.refuse_longer(prompt)
        return prompt

    def refuse_longer(self, prompt: Prompt) -> None:
        """Raises DataError if the context has no room for an answer."""
        length = len(prompt.input_ids)
        if self.context_length is not None and length >= self.context_length:
            where = f"{prompt.place}: " if prompt.place else ""
            raise DataError(
                f"{where}the context is full: {length:,} tokens, and the model has room for "
                f"{self.context_length:,}"
            )

    @property
    def system(self) -> str | None:
        """The system message that it was trained with, if its recipe names one."""
        found = [f.system for f in self.formats if isinstance(f, PromptCompletion | TemplateFormat)]
        return found[0] if found else None


def open_session(
    target: str,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "last",
    adapters: Sequence[str] = (),
) -> InferenceSession:
    """Load what the user named, and the adapters beside it.

    Args:
        target: run folder, recipe, adapter folder, model folder, GGUF file or hub id.
        adapters: `name=PATH` of each.

    Raises:
        QloraError: in one of its kinds, with its exit code.
    """
    quiet_libraries()
    path = Path(target)
    named = [_named(text, weights) for text in adapters]
    if path.suffix in (".yaml", ".yml"):
        recipe = load_recipe(path, overrides).recipe
        session = InferenceSession(recipe, is_known=True, tokenizer=_tokenizer(recipe))
    elif is_run(path) or is_adapter(path):
        session = _tuned(path, overrides, weights)
    else:
        recipe = recipe_of_model(target, overrides)
        session = InferenceSession(recipe, is_known=False, tokenizer=_tokenizer(recipe))
    for name, place in named:
        session.add(name, place)
    return session


def _tuned(path: Path, overrides: Sequence[str], weights: Weights) -> InferenceSession:
    run = RunFolder(path) if is_run(path) else None
    recipe = load_recipe(run.recipe, overrides).recipe if run else None
    if run and recipe and recipe.adapter.trains_base:
        trained = run.weights(weights)
        session = InferenceSession(recipe, is_known=True, tokenizer=load_tokenizer(trained))
        session.replace_base(trained)
        return session
    place = AdapterFolder.find(path, weights)
    if recipe is None:
        of_run = place.run and load_recipe(place.run.recipe, overrides).recipe
        recipe = of_run or recipe_of_model(place.base_path(), overrides)
    has_tokenizer = (place.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(place.folder) if has_tokenizer else _tokenizer(recipe)
    session = InferenceSession(recipe, is_known=place.run is not None, tokenizer=tokenizer)
    session.add(TUNED, place)
    return session


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    return recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))


def _named(text: str, weights: Weights) -> tuple[str, AdapterFolder]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path or name != "".join(name.split()):
        raise RecipeError(
            f"--adapter {text}: needs the form name=PATH", hint="--adapter legal=runs/legal"
        )
    return name, AdapterFolder.find(Path(path), weights)


def _end_of_turn(encoder: Encoder) -> int | None:
    """The token that ends an answer in the chat template."""
    row = [Message("user", "a", train=False), Message("assistant", "b", train=True)]
    try:
        encoded = encoder.encode(row, max_length=2**20)
    except DataError:
        return None
    return next((end.token_id for end in encoded.turn_ends), None)
