"""Use a run from Python: the same answers as the commands give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qlora_cli
from qlora_cli.api import Model
from qlora_cli.data.config import Data
from qlora_cli.data.sources import Source
from qlora_cli.errors import DataError, QloraError, RecipeError
from qlora_cli.evaluate.scorer import ModelScorer
from qlora_cli.inference.batch import generate
from qlora_cli.inference.chat import Chat, ChatSettings
from qlora_cli.inference.sampling import Sampling
from qlora_cli.inference.session import InferenceSession, open_session
from qlora_cli.tasks import Classification
from qlora_cli.train.train import train
from tests.conftest import save_tiny_model
from tests.pages import BLOCKS

PYTHON = [b for b in BLOCKS if b.page.name == "python.md" and b.language == "python"]
TEMPLATE = {"type": "template", "system": "calm", "user": "Q: {{ q }}", "assistant": "{{ a }}"}
LABELS = ["yes", "no", "maybe"]


@pytest.fixture
def session(write_recipe: Callable[..., Path], tmp_path: Path) -> InferenceSession:
    """A base with a recipe that writes its prompts by a template."""
    data = {"train": {"path": "rows.jsonl", "format": TEMPLATE}, "evaluation": None}
    tasks = [{"type": "classification", "labels": LABELS, "data": {"path": "rows.jsonl"}}]
    return open_session(str(write_recipe(data=data, evaluation={"tasks": tasks})))


def test_the_code_on_the_page_runs(
    tiny_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_recipe(output={"dir": str(tmp_path / "runs" / "mine")}))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in PYTHON:
        exec(compile(block.text, str(block), "exec"), names)
    assert len(PYTHON) == 7
    assert isinstance(names["answer"], str)
    assert len(names["answers"]) == 2
    assert names["found"].label in ("positive", "negative")
    assert sum(names["found"].probabilities.values()) == pytest.approx(1)


def test_python_generate_and_chat_answer_alike(session: InferenceSession, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"q": "hi"}, {"prompt": "hi"}, {"text": "hi"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sampling = Sampling(max_new_tokens=6)
    generate(
        session, Source(path=str(prompts)), tmp_path / "out.jsonl", sampling=sampling, batch_size=1
    )
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    said: list[str] = []
    settings = ChatSettings(said.append, lambda _: None, is_strict=True)
    Chat(session, sampling, settings).handle("hi")
    model = Model(session)
    answers = {
        *(json.loads(line)["answer"] for line in lines),
        "".join(said).removesuffix("\n"),
        model.generate("hi", max_new_tokens=6),
        model.generate({"q": "hi"}, max_new_tokens=6),
        model.chat("hi", max_new_tokens=6),
        *model.generate_all(["hi", "hi"], max_new_tokens=6),
    }
    assert len(answers) == 1
    assert model.generate("ho", max_new_tokens=6) not in answers
    messages = [{"role": "system", "content": "calm"}, {"role": "user", "content": "Q: hi"}]
    assert model.generate(messages, max_new_tokens=6) in answers


def test_a_chat_remembers_its_turns_until_reset(session: InferenceSession) -> None:
    model = Model(session)
    first = model.chat("hi", max_new_tokens=6)
    assert model.chat("hi", max_new_tokens=6) != first
    model.reset()
    assert model.chat("hi", max_new_tokens=6) == first


def test_classify_chooses_as_the_task_does(session: InferenceSession, tmp_path: Path) -> None:
    texts = ["hi", "ho", "what", "is", "this"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": t, "a": "no"}) + "\n" for t in texts), "utf-8")
    source = Source.model_validate({"path": str(rows), "format": TEMPLATE})
    task = Classification(labels=LABELS)
    tokenizer = session.default.tokenizer
    items = task.read_items([source], tokenizer, Data(train=source), limit=None)
    with session.use(session.default) as generator:
        scorer = ModelScorer(
            "base", generator.model, session.recipe, tokenizer, session.dtype, session.world
        )
        wanted = [outcome.answer for outcome in task.evaluate(scorer, items)]
    model = Model(session)
    assert [model.classify(text).label for text in texts] == wanted
    assert [model.classify(text, LABELS[::-1]).label for text in texts] == wanted
    shares = model.classify("hi").probabilities
    assert list(shares) == LABELS
    assert max(shares, key=lambda label: shares[label]) == wanted[0]


def test_a_model_without_template_continues_the_prompt_with_each_label(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    model = qlora_cli.load(folder)
    assert set(model.classify("Is it? ", ["yes", "no"]).probabilities) == {"yes", "no"}
    with pytest.raises(RecipeError, match="no classification task"):
        model.classify("Is it? ")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda model: model.generate(""), "empty"),
        (lambda model: model.generate(["hi"]), "got a list; expected a text"),
        (lambda model: model.generate(3), "got a int; expected a text"),
        (lambda model: model.generate({"x": "hi"}), "field 'q': missing; found 'x'"),
        (lambda model: model.generate([{"role": "user"}]), "content"),
        (lambda model: model.generate_all("hi"), "expected a list"),
        (lambda model: model.generate_all(["hi", {"x": "hi"}]), "prompt 1: field 'q': missing"),
        (lambda model: model.generate_all(["hi"], batch_size=0), "batch_size: 0; allowed"),
        (lambda model: model.generate("hi", temperature=-1), "temperature: -1; allowed"),
        (lambda model: model.generate("hi", top_p=0), "top_p: 0; allowed: above 0, at most 1"),
        (lambda model: model.generate("hi", top_k=-1), "top_k: -1; allowed"),
        (lambda model: model.generate("hi", max_new_tokens=0), "max_new_tokens: 0; allowed"),
        (lambda model: model.generate("hi", top_k=3), "no effect at temperature 0"),
        (lambda model: model.chat(" "), "empty"),
        (lambda model: model.classify("hi", "yes"), "labels: 'yes'; give a list"),
        (lambda model: model.classify("hi", ["yes"]), "at least two different"),
        (lambda model: model.classify("hi", ["yes", "yes"]), "at least two different"),
        (lambda model: model.classify("hi", ["yes", ""]), "at least two different"),
        (lambda _: qlora_cli.load("nowhere/at/all"), "no such folder"),
        (lambda _: qlora_cli.load("$HERE/run"), "environment variables .* are not read here"),
    ],
)
def test_mistakes_are_errors_with_a_reason(
    session: InferenceSession, call: Callable[[Model], object], reason: str
) -> None:
    with pytest.raises(QloraError, match=reason):
        call(Model(session))


@pytest.mark.parametrize(
    ("call", "is_numbered"),
    [
        (lambda model: model.generate("x" * 90, max_new_tokens=3), False),
        (lambda model: model.generate_all(["hi", "x" * 90], max_new_tokens=3), True),
        (lambda model: model.chat("x" * 90, max_new_tokens=3), False),
        (lambda model: model.classify("x" * 90, LABELS), False),
    ],
    ids=["generate", "generate_all", "chat", "classify"],
)
def test_a_prompt_beyond_the_context_is_a_warning_or_without_position(
    small_models: dict[str, Model],
    caplog: pytest.LogCaptureFixture,
    call: Callable[[Model], Any],
    is_numbered: bool,
) -> None:
    said = f"{'prompt 1: ' * is_numbered}the context is full"
    assert call(small_models["Llama"])
    [record] = [record for record in caplog.records if record.name == "qlora"]
    assert record.getMessage().startswith(said)
    with pytest.raises(DataError, match=f"^{said}"):
        call(small_models["OPT"])


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Models for rows of 64 tokens; OPT has a table of positions and fails beyond it."""
    folder = tmp_path_factory.mktemp("small")
    return {
        family: qlora_cli.load(
            save_tiny_model(folder / family, family=family, max_position_embeddings=64)
        )
        for family in ("Llama", "OPT")
    }


def test_an_empty_list_of_prompts_has_no_answers(session: InferenceSession) -> None:
    assert Model(session).generate_all([]) == []
    with pytest.raises(DataError):
        Model(session).generate([])
