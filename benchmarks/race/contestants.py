"""The contestants: their settings, commands and output.

To add one, add an entry to `CONTESTANTS`. For another trainer, also add a script to `peers/` and
its imports to `IMPORTS`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.race.rows import Rows

HERE = Path(__file__).resolve().parent

Kind = Literal["ours", "trl", "llamafactory", "plain"]

IMPORTS: dict[Kind, str] = {
    "ours": "import qlora_cli.train.train, bitsandbytes; from peft import get_peft_model; "
    "from transformers import AutoModelForCausalLM",
    "trl": "import bitsandbytes; from trl import SFTConfig, SFTTrainer; "
    "from peft import get_peft_model; from transformers import AutoModelForCausalLM",
    "llamafactory": "import bitsandbytes; from llamafactory.train.tuner import run_exp",
    "plain": "import bitsandbytes; from peft import get_peft_model; "
    "from transformers import AutoModelForCausalLM",
}
"""Imports of an interpreter that is ready to train. Its memory is the baseline."""

_LOADED = re.compile(r"\btrained: [\d,]+ of [\d,]+ weights")
"""Line that `qlora train` logs once the base is loaded and the adapter attached."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the work, the same for all contestants."""

    rows_per_step: int = 16
    micro_batch: int = 4
    r: int = 16
    alpha: int = 32
    learning_rate: float = 2e-4
    seed: int = 0
    max_length: int = 1024


@dataclass(frozen=True)
class Contestant:
    """A trainer with its settings."""

    name: str
    kind: Kind
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Recipe keys for ours; for others, settings that their script in `peers/` reads."""
    by_length: bool = False
    """Sort the rows of a step longest first, for less padding within a micro-batch."""

    def command(
        self, python: str, model: Path, rows: Rows, sizes: Sizes, folder: Path
    ) -> list[str]:
        """Return the command to run, and write its inputs into `folder`."""
        if self.kind == "ours":
            return self._our_command(python, model, rows, sizes, folder)
        job = folder / "job.json"
        facts = {
            "model": str(model),
            "rows": str(rows.by_length if self.by_length else rows.in_order),
            "lines": str(self.lines(folder)),
            "folder": str(folder),
            **vars(sizes),
            **self.options,
        }
        job.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        name = "transformers" if self.kind == "plain" else self.kind
        return [python, str(HERE / "peers" / f"with_{name}.py"), str(job)]

    def _our_command(
        self, python: str, model: Path, rows: Rows, sizes: Sizes, folder: Path
    ) -> list[str]:
        settings = {
            "model.path": str(model),
            "adapter.r": sizes.r,
            "adapter.alpha": sizes.alpha,
            "data.train.path": str(rows.conversations),
            "data.max_length": sizes.max_length,
            "training.seed": sizes.seed,
            "training.batch_size": sizes.rows_per_step,
            "training.micro_batch_size": sizes.micro_batch,
            "optimizer.learning_rate": sizes.learning_rate,
            "output.dir": str(folder / "run"),
            **self.options,
        }
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return [python, "-m", "qlora_cli", "train", str(HERE / "ours.yaml"), "--no-cache", *words]

    def lines(self, folder: Path) -> Path:
        """Return the file in which it logs its steps, one JSON object per line."""
        return folder / ("run/metrics.jsonl" if self.kind == "ours" else "lines.jsonl")

    def loaded(self, lines: Sequence[str], log: Sequence[str]) -> dict[str, Any] | None:
        """Return the facts about the loaded model once a new line reports it, else None.

        Args:
            lines: new lines of its file.
            log: new lines of its log, where `qlora train` reports the model.
        """
        if self.kind == "ours":
            return {} if any(map(_LOADED.search, log)) else None
        for line in lines:
            told: dict[str, Any] = json.loads(line)
            if told.pop("event") == "loaded":
                return told
        return None

    def step(self, line: str) -> dict[str, float] | None:
        """Return loss and tokens of the step in a line; None for other lines."""
        told = json.loads(line)
        if "loss" not in told:
            return None
        if self.kind == "ours":
            return {
                "loss": told["loss"],
                "tokens_so_far": told["tokens"],
                "supervised": told["supervised_tokens"],
            }
        return {key: told[key] for key in ("loss", "tokens_so_far", "supervised")}


def _trl(name: str, about: str, sft: Mapping[str, Any] | None = None, **more: Any) -> Contestant:
    by_length = more.pop("by_length", False)
    return Contestant(name, "trl", about, {"sft": dict(sft or {}), **more}, by_length)


_KEEP = {"gradient_checkpointing": False}

CONTESTANTS = {
    one.name: one
    for one in [
        Contestant("ours", "ours", "activations kept"),
        Contestant(
            "ours-lean",
            "ours",
            "activations recomputed",
            {"training.gradient_checkpointing": "true"},
        ),
        _trl("trl", "its defaults: activations recomputed, adapter in bfloat16"),
        _trl("trl-keep", "activations kept", _KEEP, by_length=True),
        _trl("trl-float32", "activations kept, adapter in float32", _KEEP, by_length=True,
             float32_adapter=True),
        _trl("trl-padding-free", "activations kept, a micro-batch end to end",
             {**_KEEP, "padding_free": True, "max_length": None}),
        _trl("trl-packing", "activations kept, rows of max_length packed by TRL (other steps)",
             {**_KEEP, "packing": True}),
        _trl("trl-single", "activations kept, one row a forward, so no padding", _KEEP,
             micro_batch=1),
        _trl("trl-eager", "activations kept, eager attention", _KEEP, by_length=True,
             attention="eager"),
        _trl("trl-compile", "activations kept, torch.compile", {**_KEEP, "torch_compile": True},
             by_length=True),
        Contestant("llamafactory", "llamafactory", "its defaults: activations recomputed"),
        Contestant("llamafactory-keep", "llamafactory", "activations kept",
                   {"arguments": {"disable_gradient_checkpointing": True}}, by_length=True),
        Contestant("plain", "plain", "a loop of transformers and PEFT, activations kept",
                   {"precision": "bf16"}, by_length=True),
        Contestant("reference", "plain", "the same in float32",
                   {"precision": "fp32"}, by_length=True),
    ]
}  # fmt: skip

# torch.compile takes minutes, and again for other lengths. --heats can include it.
TUNED_TRL = [name for name in CONTESTANTS if name.startswith("trl-") and name != "trl-compile"]


def named(names: Sequence[str], our_settings: Sequence[str]) -> list[Contestant]:
    """Return the named contestants, and ours with other settings (each `NAME KEY=VALUE ...`).

    Raises:
        SystemExit: unknown name.
    """
    known = dict(CONTESTANTS)
    added = []
    for text in our_settings:
        name, *settings = shlex.split(text)
        options = dict(setting.split("=", 1) for setting in settings)
        known[name] = Contestant(name, "ours", shlex.join(settings), options)
        added.append(name)
    if unknown := sorted(set(names) - set(known)):
        sys.exit(
            f"--contestants: no such contestant: {', '.join(unknown)}; there are "
            f"{', '.join(known)}, and trl-best"
        )
    return [known[name] for name in dict.fromkeys([*names, *added])]


def micro_batch_of(one: Contestant, micro_batch: int) -> Contestant:
    """Return the contestant with another micro-batch, replacing its own if it has one."""
    if "micro_batch" not in one.options:
        return one
    return replace(one, options={**one.options, "micro_batch": micro_batch})
