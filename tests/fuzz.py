"""Fuzz everything that reads files: each input must end in a result or a `QloraError`.

    python -m tests.fuzz --inputs 20000 --seed 0        # all kinds, evenly
    python -m tests.fuzz --inputs 2000 --kind adapters

An input fails if it ends in another exception, takes more than five seconds, or makes something be
written outside its own folder. A failing input is shrunk and shown.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from qlora_cli.errors import QloraError
from tests.watch import watching

SECONDS = 5.0


class HangError(BaseException):
    """An input took too long. Nothing that is tested catches it."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise HangError in what runs longer."""

    def end(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What programs stumble over: ends of ranges, other types, names that lead elsewhere.
ODD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 10**400, 1.5, -0.0, 1e308, float("nan"),
        float("inf"), "", " ", "0", "-1", "null", "../x", "/etc/passwd", "~", "a/b", "x" * 5000,
        "\0", "\ud800", "é\u202e", "__class__", "{{ 9 ** 9 }}", "${HOME}", "*", "(a+)+$", "[", [],
        {}, [[]], [None], {"": None}, "F32", "LORA", "lora", "all-linear",
    ]
)  # fmt: skip
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document in which a few places are changed, dropped, doubled, renamed or nested."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        place = draw(st.sampled_from(sorted(_places(found), key=repr)))
        act = draw(st.sampled_from(["replace", "replace", "drop", "rename", "nest", "add"]))
        if not place:
            if act == "add" and isinstance(found, dict):
                found[draw(st.text(max_size=8))] = draw(VALUES)
            elif draw(st.integers(0, 9)) == 0:
                found = draw(VALUES)
            continue
        holder = found
        for key in place[:-1]:
            holder = holder[key]
        _change(draw, holder, place[-1], act)
    return found


def _change(draw: st.DrawFn, holder: Any, key: Any, act: str) -> None:
    if act == "drop":
        del holder[key]
    elif act == "rename" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8))] = holder.pop(key)
    elif act == "nest":
        for _ in range(draw(st.sampled_from([1, 50, 200]))):
            holder[key] = [holder[key]]
    elif act == "add" and isinstance(holder[key], list):
        holder[key] = holder[key] * 2
    else:
        holder[key] = draw(_near(holder[key]) if draw(st.booleans()) else VALUES)


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, which get further than others."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 40)
    if isinstance(value, float):
        return st.floats(0, 2)
    return st.text(max_size=12) if isinstance(value, str) else VALUES


def as_json(value: Any) -> bytes:
    """Write a value as JSON, NaN and lone surrogates included."""
    return json.dumps(value).encode()


@st.composite
def documents(draw: st.DrawFn, document: Any) -> bytes:
    """A mutated document as text, sometimes damaged in other ways too."""
    text = as_json(draw(mutated(document)))
    damage = draw(st.integers(0, 19))
    if damage == 0:
        return text[: draw(st.integers(0, len(text)))]
    if damage == 1:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.binary(min_size=1, max_size=3)) + text[at + 1 :]
    if damage == 2:
        return draw(st.binary(max_size=60))
    if damage == 3:
        depth = draw(st.sampled_from([65, 1000, 100_000]))
        return b'{"a":' * depth + b"1" + b"}" * depth
    return text


class Kind(ABC):
    """A kind of input: how it is drawn, and how it is used in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "input"

    def empty_folder(self) -> None:
        """Make the folder that an input is used in."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    @abstractmethod
    def whole(self) -> list[Any]:
        """Return valid inputs."""

    @abstractmethod
    def inputs(self) -> st.SearchStrategy[Any]:
        """Return the strategy that draws inputs."""

    @abstractmethod
    def attempt(self, drawn: Any) -> None:
        """Use an input as a command would. Raises QloraError, or nothing."""


RECIPE = """\
model: {path: base, revision: main, attention: sdpa}
quantization: {type: nf4}
adapter: {type: lora, r: 8, target_modules: [q_proj], rank_pattern: {q_proj: 4}}
data:
  train:
    - {path: rows.jsonl, format: {type: template, user: "{{ a }}"}, weight: 0.5}
    - {path: more.csv, columns: [a, b], delimiter: ";", fields: {prompt: a}}
  evaluation: {path: rows.jsonl, limit: 5}
  max_length: 64
training: {epochs: 1.5, stop_after: 3h55m, seed: 1}
optimizer: {type: adamw, learning_rate: 2e-4}
schedule: {type: cosine, warmup_steps: 3}
evaluation: {tasks: [{type: json_match}], best_by: loss}
output: {dir: run, trackers: [tensorboard]}
"""
PIECES = (
    "&a [*a]", "*a", "&a x", "<<: *a", "!!python/object:os.system x", "---", "? [a]", "- ", "  ",
    "\t", "{", "]", "'", '"', ": ", "#", "|", ">", "extends: recipe.yaml", "extends: ../..", "0x1F",
    "2e-4", "no", "~", "\u2028", "a: " + "[" * 100, "{{", "b: &b [x,x]\nc: &c [*b,*b]\nd: [*c,*c]",
)  # fmt: skip


class Recipes(Kind):
    """YAML, put through `qlora validate`."""

    def whole(self) -> list[Any]:
        return [RECIPE.encode()]

    def inputs(self) -> st.SearchStrategy[Any]:
        import yaml

        document = yaml.safe_load(RECIPE)
        lines = RECIPE.splitlines(keepends=True)
        pieces = st.lists(st.sampled_from([*lines, *PIECES]) | st.text(max_size=12), max_size=14)
        damaged = st.tuples(
            st.integers(0, len(RECIPE)), st.integers(0, 9), st.sampled_from(PIECES)
        ).map(lambda d: (RECIPE[: d[0]] + d[2] + RECIPE[d[0] + d[1] :]).encode())
        joined = pieces.map(lambda some: "".join(some).encode("utf-8", "surrogatepass"))
        return documents(document) | damaged | joined | st.binary(max_size=80)

    def attempt(self, drawn: Any) -> None:
        path = self.folder / "recipe.yaml"
        path.write_bytes(drawn)
        run_command("validate", str(path), "--json")


def run_command(*arguments: str) -> None:
    """A command line in this process; an exit code for the user becomes a `QloraError`."""
    from qlora_cli.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code: object = 0
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    if code:
        assert code in (2, 3, 4), f"exit code {code}"
        assert "error: " in said.getvalue()
        raise QloraError(said.getvalue())


class Rows(Kind):
    """Rows in every format, prepared as for training."""

    def __init__(self, root: Path) -> None:
        from qlora_cli.data.formats import FormatConfig
        from tests.conftest import make_tokenizer

        super().__init__(root)
        self.tokenizer = make_tokenizer()
        self.formats = {
            one.model_fields["type"].default: one for one in get_args(get_args(FormatConfig)[0])
        }
        assert len(self.formats) > 5

    def whole(self) -> list[Any]:
        return [(name, ".jsonl", [as_json(one.example)]) for name, one in self.formats.items()]

    def inputs(self) -> st.SearchStrategy[Any]:
        rows = st.sampled_from(sorted(self.formats)).flatmap(
            lambda name: st.tuples(
                st.just(name),
                st.sampled_from([".jsonl", ".json"]),
                st.lists(documents(self.formats[name].example), min_size=1, max_size=3),
            )
        )
        raw = st.tuples(
            st.sampled_from(sorted(self.formats)),
            st.sampled_from(
                [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".jsonl.gz"]
            ),
            st.lists(st.binary(max_size=40) | st.text(max_size=40).map(_encoded), max_size=3),
        )
        return rows | rows | raw

    def attempt(self, drawn: Any) -> None:
        from qlora_cli.data.config import Data
        from qlora_cli.data.prepared.prepare import prepare

        name, ending, lines = drawn
        path = self.folder / f"rows{ending}"
        joined = b",".join(lines)
        path.write_bytes(b"[" + joined + b"]" if ending == ".json" else b"\n".join(lines))
        source = {"path": str(path), "format": {"type": name}}
        on_bad_row = "skip" if len(lines) > 1 else "stop"
        data = Data.model_validate({"train": source, "max_length": 512, "on_bad_row": on_bad_row})
        (self.folder / "set").mkdir()
        made = prepare(data.train_sources, self.tokenizer, data, self.folder / "set")
        for i in range(len(made.examples)):
            example = made.examples[i]
            assert len(example.input_ids) == len(example.labels) <= 512


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Checkpoints(Kind):
    """Manifests and states, also such as their manifest vouches for; then a step of training."""

    def __init__(self, root: Path) -> None:
        from qlora_cli.runs.checkpoint import random_states, save_checkpoint
        from qlora_cli.types import TrainState

        super().__init__(root)
        model, optimizer, scaler = self._fresh()
        self._step(model, optimizer)
        self.saved = save_checkpoint(
            root / "saved",
            model=model,
            optimizer=optimizer,
            scaler=scaler,
            state=TrainState(step=1, tokens=5, best_step=1, best_value=0.5),
            random_states=[random_states()],
            keep=1,
        )
        self.texts = {
            name: json.loads((self.saved / name).read_bytes())
            for name in ("manifest.json", "state.json")
        }

    def whole(self) -> list[Any]:
        return [(name, as_json(text)) for name, text in self.texts.items()]

    def inputs(self) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.tuples(st.just(name), documents(text)) for name, text in self.texts.items()
        ) | st.tuples(st.just("state.safetensors"), headers(self.saved / "state.safetensors"))

    def attempt(self, drawn: Any) -> None:
        from qlora_cli.runs.checkpoint import load_checkpoint, newest_checkpoint

        name, data = drawn
        path = self.folder / self.saved.name
        shutil.copytree(self.saved, path)
        (path / name).write_bytes(data)
        if name != "manifest.json":
            manifest = copy.deepcopy(self.texts["manifest.json"])
            digest = hashlib.sha256(data).hexdigest()
            manifest["files"][name] = {"bytes": len(data), "sha256": digest}
            (path / "manifest.json").write_bytes(as_json(manifest))
        model, optimizer, scaler = self._fresh()
        found = newest_checkpoint(self.folder)
        state, _ = load_checkpoint(found, model=model, optimizer=optimizer, scaler=scaler)
        assert state.step >= 0
        self._step(model, optimizer)

    @staticmethod
    def _fresh() -> tuple[Any, Any, Any]:
        import torch

        from qlora_cli.optim.families import AdamW

        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = AdamW(learning_rate=1e-2).build(model.named_parameters(), torch.device("cpu"))
        return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)

    @staticmethod
    def _step(model: Any, optimizer: Any) -> None:
        import torch

        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


@st.composite
def headers(draw: st.DrawFn, path: Path) -> bytes:
    """A safetensors file with a changed header, or a length that is not its own."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    few = {name: header[name] for name in sorted(header)[:4]}
    text = draw(documents(draw(st.sampled_from([header, few]))))
    said = draw(st.sampled_from([len(text)] * 8 + [0, 1, 2**31, 2**63, len(text) + 8]))
    data = whole[8 + length :]
    kept = draw(st.sampled_from([len(data)] * 5 + [0, len(data) // 2]))
    return said.to_bytes(8, "little") + text + data[:kept]


class _OnAdapter(Kind):
    """Uses of an adapter folder with one file drawn at random."""

    name: str

    def __init__(self, root: Path) -> None:
        import torch

        from qlora_cli.adapters import LoRA
        from qlora_cli.models.base import load_model
        from tests.conftest import save_tiny_model

        super().__init__(root)
        self.base = load_model(save_tiny_model(root / "base", num_hidden_layers=1))
        torch.manual_seed(0)
        adapted = LoRA(r=2, target_modules=["q_proj", "v_proj"]).attach(copy.deepcopy(self.base))
        self.saved = root / "saved"
        LoRA(r=2).save(adapted, self.saved)

    def whole(self) -> list[Any]:
        return [(self.saved / self.name).read_bytes()]

    def attempt(self, drawn: Any) -> None:
        from qlora_cli.adapters import LoRA
        from qlora_cli.inspect.adapters import list_adapters
        from qlora_cli.inspect.adapters_text import list_text

        adapter = self.folder / "adapter"
        shutil.copytree(self.saved, adapter)
        (adapter / self.name).write_bytes(drawn)
        refused = []
        for use in (
            lambda: list_text(list_adapters(self.folder)),
            lambda: run_command("adapters", "inspect", str(adapter)),
            lambda: LoRA().load(copy.deepcopy(self.base), adapter),
            self._read_shards,
        ):
            try:
                use()
            except QloraError as error:
                refused.append(error)
        if refused:
            raise refused[0]

    def _read_shards(self) -> None:
        from qlora_cli.models.shards import Shards

        shards = Shards(self.folder / "adapter" / "adapter_model.safetensors")
        for name in shards.tensors:
            shards.read(name)


class Adapters(_OnAdapter):
    """Settings of an adapter: listed, inspected, loaded on a model."""

    name = "adapter_config.json"

    def inputs(self) -> st.SearchStrategy[Any]:
        return documents(json.loads((self.saved / self.name).read_bytes()))


class Headers(_OnAdapter):
    """Headers of safetensors files, used in the same ways."""

    name = "adapter_model.safetensors"

    def inputs(self) -> st.SearchStrategy[Any]:
        return headers(self.saved / self.name)


KINDS: dict[str, type[Kind]] = {
    "recipes": Recipes,
    "rows": Rows,
    "checkpoints": Checkpoints,
    "adapters": Adapters,
    "headers": Headers,
}


class Outcome:
    """Results of the inputs of one kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0

    def __str__(self) -> str:
        read = self.counts["read"]
        return (
            f"{self.counts.total():,} inputs, {read:,} read, {self.counts.total() - read:,} "
            f"refused, slowest {self.slowest:.2f} s"
        )


def fuzz(kind: Kind, inputs: int, number: int) -> Outcome:
    """Try so many inputs of a kind, the same for each seed.

    Raises:
        AssertionError, HangError, Exception: of an input that fails, made small.
    """
    outcome = Outcome()

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs())
    def survives(drawn: Any) -> None:
        kind.empty_folder()
        started = time.monotonic()
        result = "read"
        with watching() as watch, deadline(SECONDS):
            try:
                kind.attempt(drawn)
            except QloraError as error:
                result = type(error).__name__
        outcome.slowest = max(outcome.slowest, time.monotonic() - started)
        outcome.counts[result] += 1
        outside = watch.written_outside(kind.folder)
        assert not outside, f"written outside of the folder: {outside}"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        survives()
    return outcome


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all of them")
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("qlora").setLevel(logging.ERROR)
    kinds = options.kind or list(KINDS)
    failed = False
    for name in kinds:
        with tempfile.TemporaryDirectory() as root:
            started = time.monotonic()
            try:
                outcome = fuzz(KINDS[name](Path(root)), options.inputs // len(kinds), options.seed)
            except (Exception, HangError) as error:
                failed = True
                print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
                import traceback

                traceback.print_exc()
                continue
            print(f"{name}: {outcome}, {time.monotonic() - started:.0f} s in all", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
