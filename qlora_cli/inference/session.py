"""Keep one base model in memory and switch adapters on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.switch import AdapterSet
from qlora_cli.common.formatting import first_names
from qlora_cli.common.untrusted_files import read_object
from qlora_cli.data.encode.encoder import Encoder
from qlora_cli.data.formats import FormatConfig, is_verbatim
from qlora_cli.data.prompts import PromptReader
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.distributed.world import World
from qlora_cli.errors import DataError, RecipeError
from qlora_cli.inference.sampling import Sampling, TextGenerator
from qlora_cli.models.context import check_length, context_of, limit_new_tokens
from qlora_cli.models.heads import read_head
from qlora_cli.models.identity import identify
from qlora_cli.models.loading import compute_dtype, load_base
from qlora_cli.models.tokenizer import as_ids, load_tokenizer, set_stop_tokens, stop_token_ids
from qlora_cli.objectives import Classify
from qlora_cli.recipe.load import load_recipe, recipe_of_model
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.adapter_folder import AdapterFolder, is_adapter, run_of
from qlora_cli.runs.run_folder import RunFolder, Weights, is_run
from qlora_cli.types import HeadSpec, Message, ModelContext, Prompt, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora")

BASE = "base"
"""Name of the base model without an adapter."""
TUNED = "tuned"
"""Name of the run or adapter given on the command line."""

_RECIPE_SUFFIXES = (".yaml", ".yml")

MakeReader = Callable[[str | None], PromptReader]
"""Makes a reader of prompts; the argument is as in `InferenceSession.reader`."""


@dataclass(frozen=True, slots=True)
class SessionModel:
    """One set of weights in a session, with its tokenizer and stop tokens."""

    name: str
    adapter: str | None
    """None for the model as it was loaded."""
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    stop_token_ids: list[int]
    """Stop tokens of the model, of its training and of the chat template."""
    context: ModelContext | None
    """Maximum tokens of prompt and completion together; None if the model's config does not say."""


class InferenceSession:
    """A model in memory, and the adapters that can be switched on it.

    Args:
        has_recipe: the recipe says how the model was trained; if false, it only says how to load
            the model.
        before_loading: is given a function that makes readers of prompts (as `reader`), before
            any weights are loaded.
        expects_tools: all rows that the model, or one of its adapters, was trained on declared
            tools.

    Attributes:
        recipe: how the model was loaded.
        dtype: autocast dtype; float32 turns autocast off.
        models: by name; the base is among them unless all of its weights were trained.
        default: the model that answers unless another one is chosen.
        formats: data formats that the model was trained on; empty if unknown.
        is_plain: prompts are continued verbatim, because the model has no chat template or was
            trained without it.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        has_recipe: bool,
        tokenizer: PreTrainedTokenizerFast,
        before_loading: Callable[[MakeReader], None] | None = None,
        expects_tools: bool = False,
    ) -> None:
        self.world = World(recipe.device)
        self.dtype = compute_dtype(recipe.quantization, recipe.training.precision, self.world)
        self.recipe = recipe
        self._tokenizer = tokenizer
        self._expects_tools = expects_tools
        self.formats: list[FormatConfig] = (
            [source.format for source in recipe.data.train_sources] if has_recipe else []
        )
        self.is_plain = tokenizer.chat_template is None or (
            bool(self.formats) and all(map(is_verbatim, self.formats))
        )
        self._readers: dict[str | None, PromptReader] = {}
        if before_loading is not None:
            before_loading(self.reader)
        self._base = load_base(
            recipe.model, recipe.quantization, self.dtype, self.world.device, self.head
        )
        self._adapters = AdapterSet(self._base.eval())
        self.models: dict[str, SessionModel] = {}
        self.add(BASE, None)
        self.default = self.models[BASE]

    def add(self, name: str, adapter: AdapterFolder | None) -> None:
        """Add an adapter under a name; None adds the base.

        Raises:
            RecipeError: the name is taken.
            ModelError: the adapter was trained on another base.
        """
        if name in self.models:
            raise RecipeError(f"--adapter: duplicate name {name}; give each adapter its own name")
        tokenizer, stops = self._tokenizer, set[int]()
        if self._base.can_generate():
            stops |= {*as_ids(self._base.generation_config.eos_token_id)}
        if adapter is not None:
            adapter.check_base(self.recipe, identify(self.recipe.model.locate()))
            self._adapters.add(name, adapter.folder)
            stops |= {*stop_token_ids(adapter.folder)}
            if (adapter.folder / "tokenizer_config.json").is_file():
                tokenizer = load_tokenizer(adapter.folder)
        encoder = Encoder(tokenizer)
        stops |= {tokenizer.eos_token_id, _end_of_turn(encoder)} - {None}
        key = None if adapter is None else name
        with self._adapters.using(key) as weights:
            context = context_of(weights)
        model = SessionModel(name, key, tokenizer, encoder, sorted(stops), context)
        self.models[name] = model
        if adapter is not None and self.default.adapter is None:
            self.default = model

    def load_full_weights(self, folder: Path) -> None:
        """Replace the base by weights that were trained in full."""
        self._base = self.recipe.adapter.load(self._base, folder).eval()
        self._adapters = AdapterSet(self._base)
        set_stop_tokens(self._base, stop_token_ids(folder))
        self.models.clear()
        self.add(TUNED, None)
        self.default = self.models[TUNED]

    @property
    def head(self) -> HeadSpec | None:
        """The head that scores rows; None for a model that predicts tokens."""
        return self.recipe.objective.head

    @contextmanager
    def weights(self, model: SessionModel) -> Iterator[Any]:
        """Switch to the weights of a model and yield them."""
        with self._adapters.using(model.adapter) as weights:
            yield weights

    @contextmanager
    def use(self, model: SessionModel) -> Iterator[TextGenerator]:
        """Switch to the weights of a model and yield a generator for it."""
        with self._adapters.using(model.adapter) as weights:
            yield TextGenerator(
                weights, model.tokenizer, model.stop_token_ids, self.dtype, self.world.device
            )

    def prompt(self, model: SessionModel, messages: Sequence[Message]) -> Prompt:
        """Encode a conversation so that the model answers its last message.

        Raises:
            DataError: the chat template rejects the messages, or they do not fit into a context
                whose positions are a table.
        """
        role: Role = "assistant"
        turns = list(messages)
        if self.is_plain:
            # Without a template, nothing separates one turn from the next.
            role, turns = "text", [Message("text", messages[-1].content, train=False)]
        answer = Message(role, "", train=True)
        input_ids = model.encoder.encode_prompt([*turns, answer])
        hint = "shorten the message"
        if len([one for one in messages if one.role == "user"]) > 1 and not self.is_plain:
            hint += ", or drop the earlier ones (/reset; in Python, reset())"
        check_length(len(input_ids), model.context, hint=hint)
        return Prompt(input_ids, reference="", lead=model.encoder.lead(answer))

    def reader(self, system: str | None = None) -> PromptReader:
        """Return the reader of prompts in the form of the training rows; it warns once.

        Args:
            system: system message for conversations without one; None takes the recipe's.
        """
        if system not in self._readers:
            self._readers[system] = PromptReader(
                self.formats,
                is_plain=self.is_plain,
                system=system,
                expects_tools=self._expects_tools,
            )
        return self._readers[system]


def limit_sampling(model: SessionModel, sampling: Sampling, prompt: Prompt) -> Sampling:
    """Limit new tokens to what the context of a model has room for after a prompt."""
    limit = limit_new_tokens(len(prompt.input_ids), sampling.max_new_tokens, model.context)
    return replace(sampling, max_new_tokens=limit)


def open_session(
    target: str,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "last",
    adapters: Sequence[str] = (),
    before_loading: Callable[[MakeReader], None] | None = None,
    scores_rows: bool | None = False,
) -> InferenceSession:
    """Load a model, and adapters that can be switched on it.

    Args:
        target: run folder, recipe, adapter folder, model folder, GGUF file or Hub id.
        adapters: `name=PATH` for each.
        before_loading: as in `InferenceSession`: to find what is wrong with prompts early.
        scores_rows: the model has to have a head that scores rows (True), or one that predicts
            tokens (False). None accepts both.

    Raises:
        QloraError: the model or an adapter cannot be loaded, or it has the other kind of head.
    """
    quiet_libraries()
    path = Path(target)

    def check(recipe: Recipe) -> Recipe:
        return _check_head(recipe, target, scores_rows=scores_rows)

    named = [_parse_adapter(text, weights) for text in adapters]
    if _is_tuned(path):
        session = _open_tuned(path, overrides, weights, before_loading, check)
    else:
        has_recipe = path.suffix in _RECIPE_SUFFIXES
        recipe = (
            load_recipe(path, overrides).recipe
            if has_recipe
            else _with_own_head(recipe_of_model(target, overrides))
        )
        session = InferenceSession(
            check(recipe),
            has_recipe=has_recipe,
            tokenizer=_tokenizer(recipe),
            before_loading=before_loading,
            expects_tools=any(_trained_with_tools(adapter) for _, adapter in named),
        )
    for name, adapter in named:
        session.add(name, adapter)
    return session


def check_one_model(target: str, adapters: Sequence[str]) -> None:
    """Refuse adapters that would not answer, for a command that asks one model.

    Args:
        target: as in `open_session`. A run or an adapter answers itself.
        adapters: `name=PATH` for each. The first one answers over a recipe or a model.

    Raises:
        RecipeError: another adapter is given.
    """
    asked, unused = target, adapters
    if adapters and not _is_tuned(Path(target)):
        asked, unused = f"--adapter {adapters[0]}", adapters[1:]
    if unused:
        raise RecipeError(
            f"--adapter {unused[0]}: one model answers a file of prompts, and {asked} is given",
            hint="run the command once for each of them; qlora chat switches between several",
        )


def _is_tuned(path: Path) -> bool:
    """Tell if a target is a run or an adapter, and not a recipe or a model."""
    return path.suffix not in _RECIPE_SUFFIXES and bool(run_of(path) or is_adapter(path))


def _trained_with_tools(adapter: AdapterFolder) -> bool:
    return adapter.run is not None and adapter.run.trained_with_tools()


def _open_tuned(
    path: Path,
    overrides: Sequence[str],
    weights: Weights,
    before_loading: Callable[[MakeReader], None] | None,
    check: Callable[[Recipe], Recipe],
) -> InferenceSession:
    run = RunFolder(path) if is_run(path) else None
    recipe = load_recipe(run.recipe, overrides).recipe if run else None
    if run and recipe and recipe.adapter.trains_base:
        trained = run.weights(weights)
        session = InferenceSession(
            check(recipe),
            has_recipe=True,
            tokenizer=load_tokenizer(trained),
            before_loading=before_loading,
            expects_tools=run.trained_with_tools(),
        )
        session.load_full_weights(trained)
        return session
    adapter = AdapterFolder.find(path, weights)
    if recipe is None:
        of_run = adapter.run and load_recipe(adapter.run.recipe, overrides).recipe
        recipe = of_run or recipe_of_model(adapter.base_path(), overrides)
    has_tokenizer = (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter.folder) if has_tokenizer else _tokenizer(recipe)
    session = InferenceSession(
        check(recipe),
        has_recipe=adapter.run is not None,
        tokenizer=tokenizer,
        before_loading=before_loading,
        expects_tools=_trained_with_tools(adapter),
    )
    session.add(TUNED, adapter)
    return session


def _with_own_head(recipe: Recipe) -> Recipe:
    """Return the recipe of a model folder, with an objective if the model has a head."""
    path = Path(recipe.model.path) / "config.json"
    if not path.is_file() or (head := read_head(read_object(path))) is None:
        return recipe
    objective = Classify(labels=list(head.labels), problem=head.problem)
    return recipe.model_copy(update={"objective": objective})


def _check_head(recipe: Recipe, target: str, *, scores_rows: bool | None) -> Recipe:
    """Return a recipe whose model does what a command asks of it.

    Raises:
        RecipeError: it scores rows where it should predict tokens, or the other way round.
    """
    head = recipe.objective.head
    if scores_rows and head is None:
        raise RecipeError(
            f"{target} predicts tokens; it has no head that scores rows",
            hint=f"qlora generate {target} --prompts FILE --output FILE writes its answers; "
            "objective.type classify or reward trains a head",
        )
    if head is not None and scores_rows is False:
        raise RecipeError(
            f"{target} scores rows ({first_names(head.labels, 5)}) and writes no text",
            hint=f"qlora predict {target} --rows FILE --output FILE",
        )
    return recipe


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    return recipe.model.load_tokenizer(read_chat_template(recipe.data.chat_template))


def _parse_adapter(text: str, weights: Weights) -> tuple[str, AdapterFolder]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path or name != "".join(name.split()):
        raise RecipeError(
            f"--adapter {text}: needs the form name=PATH", hint="--adapter legal=runs/legal"
        )
    return name, AdapterFolder.find(Path(path), weights)


def _end_of_turn(encoder: Encoder) -> int | None:
    """Find the first token that ends an assistant turn in the chat template."""
    row = [Message("user", "a", train=False), Message("assistant", "b", train=True)]
    try:
        encoded = encoder.encode(row, max_length=2**20)
    except DataError:
        return None
    return next((token for end in encoded.turn_ends for token in end.token_ids), None)
