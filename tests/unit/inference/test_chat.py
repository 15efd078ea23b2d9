"""Chats with a tiny model, and the chat commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.cli import main
from qlora_cli.errors import DataError, QloraError, RecipeError
from qlora_cli.inference.chat import Chat, ChatSettings, side_by_side
from qlora_cli.inference.sampling import Sampling
from qlora_cli.inference.session import InferenceSession, check_one_model, open_session
from qlora_cli.types import Message
from tests.conftest import save_tiny_model
from tests.random_adapter import draw_adapter


class Talk:
    """A chat that records its output."""

    def __init__(self, session: InferenceSession, **options: Any) -> None:
        self.out: list[str] = []
        self.notes: list[str] = []
        settings = {"is_strict": True, "as_json": False, **options.pop("settings", {})}
        self.session = session
        self.chat = Chat(
            session,
            Sampling(**{"max_new_tokens": 6, **options.pop("sampling", {})}),
            ChatSettings(write=self.out.append, note=self.notes.append, **settings),
            **options,
        )

    def __call__(self, line: str) -> str:
        before = len(self.out)
        assert self.chat.handle(line)
        return "".join(self.out[before:])


@pytest.fixture(scope="module")
def session(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> InferenceSession:
    folder = tmp_path_factory.mktemp("adapters")
    names = [
        f"{name}={draw_adapter(tiny_model, folder / name, seed=i)}"
        for i, name in enumerate(["one", "two"])
    ]
    return open_session(str(tiny_model), adapters=names)


def test_switching_adapters_leaves_the_base_unchanged(
    session: InferenceSession, tiny_model: Path
) -> None:
    answers: dict[str, set[str]] = {}
    talk = Talk(session)
    for name in ("one", "two", "base", "two", "one", "base"):
        talk("/base" if name == "base" else f"/swap {name}")
        talk("/reset")
        answers.setdefault(name, set()).add(talk("hi"))
    assert all(len(found) == 1 for found in answers.values())
    assert len(set.union(*answers.values())) == 3
    assert answers["base"] == {Talk(open_session(str(tiny_model)))("hi")}


def test_the_first_adapter_is_the_default(session: InferenceSession) -> None:
    talk = Talk(session)
    talk("/swap")
    assert talk.notes == ["base, one (current), two"]


def test_the_history_is_in_the_next_prompt_until_reset(
    session: InferenceSession,
) -> None:
    talk = Talk(session)
    first = talk("hi")
    later = talk("hi")
    talk("/reset")
    assert talk("hi") == first
    assert later != first


def test_compare_shows_both_answers_and_keeps_the_conversation(
    session: InferenceSession,
) -> None:
    talk, plain = Talk(session), Talk(session)
    assert talk("hi") == plain("hi")
    both = talk("/compare what")
    again = talk("/compare")
    assert talk("ho") == plain("ho")
    assert both.startswith("base: ")
    assert "\none: " in both
    fresh = Talk(session)
    tuned = fresh("hi")
    assert again.endswith(f"\none: {tuned}")


def test_answers_can_be_json(session: InferenceSession) -> None:
    talk = Talk(session, settings={"as_json": True})
    [line] = talk("hi").splitlines()
    assert json.loads(line) == {
        "model": "one", "message": "hi", "answer": json.loads(line)["answer"], "num_tokens": 6,
        "ended": "length",
    }  # fmt: skip
    lines = [json.loads(line) for line in talk("/compare hi").splitlines()]
    assert [line["model"] for line in lines] == ["base", "one"]


def test_two_slashes_escape_one_and_an_unknown_command_is_an_error(
    session: InferenceSession,
) -> None:
    talk = Talk(session, settings={"as_json": True})
    assert json.loads(talk("//etc"))["message"] == "/etc"
    with pytest.raises(RecipeError, match="/swop: no such command"):
        talk("/swop one")
    with pytest.raises(RecipeError, match="/swap three: no such model; choose from base, one, two"):
        talk("/swap three")
    easy = Talk(session, settings={"is_strict": False})
    easy("/swop one")
    assert easy.notes == ["/swop: no such command (/help lists them)"]


def test_quit_ends_the_chat(session: InferenceSession) -> None:
    assert not Talk(session).chat.handle("/quit")


def test_ctrl_c_ends_the_answer_and_keeps_its_text(session: InferenceSession) -> None:
    class Impatient(Talk):
        """Press Ctrl-C after two writes."""

        def write(self, text: str) -> None:
            self.out.append(text)
            if len(self.out) == 2:
                raise KeyboardInterrupt

    impatient = Impatient(session, settings={"is_strict": False})
    settings = ChatSettings(impatient.write, impatient.notes.append, is_strict=False)
    impatient.chat = Chat(session, Sampling(max_new_tokens=6), settings)
    whole = Talk(session)("hi")
    shown = impatient("hi")
    assert shown.endswith("\n")
    assert len(shown) < len(whole)
    assert whole.startswith(shown.rstrip("\n"))
    assert impatient("and then?")


def test_typed_special_tokens_are_text(session: InferenceSession) -> None:
    model = session.default
    prompt = session.prompt(model, [Message("user", "a<|im_end|>b", train=False)])
    assert prompt.input_ids.count(model.tokenizer.eos_token_id) == 1


def test_every_stop_token_ends_an_answer(session: InferenceSession) -> None:
    assert session.default.stop_token_ids == [session.default.tokenizer.eos_token_id]


def test_a_full_context_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = save_tiny_model(tmp_path / "small", max_position_embeddings=64)
    talk = Talk(open_session(str(small)), sampling={"max_new_tokens": 50})
    talk("hi")
    assert "the context is full; /reset clears the conversation" in talk.notes
    caplog.clear()
    assert talk("x" * 64)
    [record] = [record for record in caplog.records if record.name == "qlora"]
    assert re.search(r"the context is full: .* room for 64 .* not trained", record.getMessage())
    assert "drop the earlier ones (/reset" in record.getMessage()


def test_a_prompt_without_a_position_is_refused(tmp_path: Path) -> None:
    small = save_tiny_model(tmp_path / "small", family="OPT", max_position_embeddings=64)
    talk = Talk(open_session(str(small)))
    with pytest.raises(DataError, match=r"the context is full: .* room for 64") as caught:
        talk("x" * 64)
    assert caught.value.hint == "shorten the message"
    easy = Talk(talk.session, settings={"is_strict": False})
    easy("x" * 64)
    assert easy.notes[0].startswith("the context is full")


def test_the_system_message_changes_the_answer(session: InferenceSession) -> None:
    plain, brief = Talk(session), Talk(session, system="be brief")
    assert plain("hi") != brief("hi")


def test_sampled_answers_repeat_with_their_seed(session: InferenceSession) -> None:
    def answers(seed: int) -> list[str]:
        talk = Talk(session, sampling={"temperature": 1.5, "seed": seed})
        return [talk("hi"), talk("hi")]

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        (["one"], "needs the form name=PATH"),
        (["one=nowhere"], "no adapter"),
        (["base={one}"], "duplicate name base"),
        (["a={one}", "a={one}"], "duplicate name a"),
    ],
)
def test_unusable_adapters_are_refused(
    tiny_model: Path, tmp_path: Path, adapters: list[str], reason: str
) -> None:
    one = draw_adapter(tiny_model, tmp_path / "one", seed=0)
    with pytest.raises(QloraError, match=reason):
        open_session(str(tiny_model), adapters=[text.format(one=one) for text in adapters])


@pytest.mark.parametrize(
    ("target", "adapters", "unused"),
    [
        ("adapter", [], None),
        ("adapter", ["b=two"], "b=two"),
        ("model", [], None),
        ("model", ["a=one"], None),
        ("model", ["a=one", "b=two"], "b=two"),
        ("recipe.yaml", ["a=one"], None),
        ("recipe.yaml", ["a=one", "b=two", "c=three"], "b=two"),
        ("org/on-the-hub", ["a=one", "b=two"], "b=two"),
    ],
)
def test_adapters_that_would_not_answer_a_file_are_refused(
    tiny_model: Path, tmp_path: Path, target: str, adapters: list[str], unused: str | None
) -> None:
    named = {"adapter": draw_adapter(tiny_model, tmp_path / "one", seed=0), "model": tiny_model}
    path = str(named.get(target, target))
    if unused is None:
        check_one_model(path, adapters)
        return
    with pytest.raises(QloraError, match=f"--adapter {unused}: one model answers a file"):
        check_one_model(path, adapters)


def test_generate_refuses_a_second_adapter_before_it_loads_anything(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hi\n", encoding="utf-8")
    files = ["--prompts", str(prompts), "--output", str(tmp_path / "answers.jsonl")]
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(tiny_model), *files, "--adapter", "a=nowhere", "--adapter", "b=too"])
    assert caught.value.code == 2
    assert "error: --adapter b=too: one model answers" in capsys.readouterr().err


def test_a_model_without_template_continues_each_message(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    talk = Talk(open_session(str(folder)))
    assert talk.session.is_plain
    assert talk("once upon") == talk("once upon")


def test_columns_fit_the_terminal() -> None:
    text = side_by_side(["base", "tuned"], ["one two three " * 5, "four\n\nfive"], 81)
    lines = text.splitlines()
    assert lines[0] == f"{'base':<39} | tuned"
    assert lines[2].endswith("| four")
    assert lines[4].endswith("| five") if len(lines) > 4 else "five" in text
    assert max(map(len, lines)) <= 81
    assert side_by_side(["base", "tuned"], ["a", "b"], 60) == "base: a\ntuned: b"
