"""The contestants, each run on the same rows: ours in this process, the others in their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from benchmarks.race.floor import Geometry, operations
from qlora_cli.distributed.devices import known_card
from qlora_cli.distributed.world import is_out_of_memory
from qlora_cli.loop.fast_path import Checkpointing
from scripts.gpu.bench import ROOT, Bench, last_line
from scripts.gpu.race.stopwatch import Rows, Stopwatch, seconds_of
from scripts.gpu.training import Mode, Run, cut, random_batch

RANK, LEARNING_RATE = 16, 1e-4
LAYERS = 32
"""Layers of Llama 3.1 8B, to which the figures are scaled."""

Kind = Literal["ours", "peft", "trl", "unsloth"]


@dataclass(frozen=True)
class Contestant:
    """A trainer in one of its settings."""

    name: str
    kind: Kind
    mode: Mode
    needs: tuple[str, ...] = ()
    """Modules that have to be installed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keys of the job for `peer.py`."""
    seconds: float = 20
    """Estimated seconds on a large card."""

    @property
    def missing(self) -> list[str]:
        """Return the modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def contestants() -> Iterator[Contestant]:
    """Yield all contestants, in order of value."""
    again, kept = Mode("nf4", "plain", True), Mode("nf4", "plain", False)
    trl, liger = ("trl",), {"liger": True}
    checkpointing: Checkpointing
    yield ours(Mode("nf4", "compiled", True), seconds=60)
    yield Contestant("peft", "peft", again, seconds=40)
    yield Contestant("trl, padding-free", "trl", again, trl, seconds=50)
    yield Contestant("trl, padding-free, liger", "trl", again, ("trl", "liger_kernel"), liger, 50)
    yield Contestant("peft, liger", "peft", again, ("liger_kernel",), liger, 50)
    yield Contestant("unsloth", "unsloth", again, ("unsloth",), seconds=60)
    yield ours(Mode("nf4", "fused", True))
    yield ours(Mode("nf4", "plain", True))
    for checkpointing in ("mlp", False, "offload"):
        yield ours(Mode("nf4", "compiled", checkpointing))
    yield Contestant("peft", "peft", kept, seconds=40)
    for checkpointing in (True, "mlp", False, "offload"):
        yield ours(Mode("none", "compiled", checkpointing))
    yield Contestant("peft", "peft", Mode("none", "plain", True), seconds=40)
    for checkpointing in ("mlp", False, "offload"):
        yield ours(Mode("nf4", "fused", checkpointing))
    yield ours(kept)
    yield ours(Mode("nf4", "plain", "offload"))
    for checkpointing in (True, "mlp", False, "offload"):
        yield ours(Mode("none", "fused", checkpointing))
    for checkpointing in (True, False, "offload"):
        yield ours(Mode("none", "plain", checkpointing))


def ours(mode: Mode, seconds: float = 18) -> Contestant:
    return Contestant("qlora", "ours", mode, seconds=seconds)


@dataclass(frozen=True)
class Race:
    """The work, the same for all contestants."""

    bench: Bench
    steps: list[Rows]
    """Rows of each step; a step is one forward pass."""

    @classmethod
    def of(cls, bench: Bench) -> Race:
        """Make random rows of different lengths, half of whose tokens are supervised."""
        sizes, steps = bench.sizes, []
        for seed in range(2 * sizes.steps):
            batch = random_batch(cut(sizes.tokens, sizes.documents, seed), sizes.vocabulary, seed)
            ids, labels = (
                [part.tolist() for part in tensor[0].split(batch.documents)]
                for tensor in (batch.input_ids, batch.labels)
            )
            steps.append([{"input_ids": i, "labels": k} for i, k in zip(ids, labels, strict=True)])
        return cls(bench, steps)

    def run(self, one: Contestant) -> dict[str, Any]:
        """Run a contestant, and return its figures; `note` says why there are none."""
        row: dict[str, Any] = {
            "name": one.name, "mode": one.mode.name if one.kind == "ours" else plain_name(one.mode)
        }  # fmt: skip
        started = time.monotonic()
        if one.missing:
            return row | {"note": f"not installed: {', '.join(one.missing)}"}
        try:
            result = self._ours(one) if one.kind == "ours" else self._peer(one)
        # A contestant that fails must not hide the others.
        except Exception as error:
            name = "out of memory" if is_out_of_memory(error) else type(error).__name__
            row["note"] = f"{name}: {last_line(str(error))[:200]}"
        else:
            row |= result | self._figures(result)
        self.bench.start_memory()
        return row | {"seconds_in_all": round(time.monotonic() - started, 1)}

    def _ours(self, one: Contestant) -> dict[str, Any]:
        bench, sizes = self.bench, self.bench.sizes
        batches = [
            [random_batch(cut(sizes.tokens, sizes.documents, seed), sizes.vocabulary, seed)]
            for seed in range(len(self.steps))
        ]
        bench.start_memory()
        run = Run(bench, one.mode, batches, model=bench.large_model(), is_new=True)
        watch = Stopwatch(run.setup.base.model, bench.device, sizes.steps)
        for _ in range(watch.num_steps):
            watch.begin()
            watch.end(run.step()["loss"])
        return {**watch.result(), "kernels": run.setup.kernels}

    def _peer(self, one: Contestant) -> dict[str, Any]:
        bench = self.bench
        job, result = bench.folder / "job.json", bench.folder / "result.json"
        result.unlink(missing_ok=True)
        facts = {
            "kind": one.kind, "model": str(bench.large_model()), "steps": self.steps,
            "result": str(result), "folder": str(bench.folder / "peer"),
            "device": str(bench.device), "timed": bench.sizes.steps, "r": RANK,
            "learning_rate": LEARNING_RATE, "quantization": one.mode.quantization,
            "checkpointing": bool(one.mode.checkpointing), "attention": best_attention(one, bench),
            **one.options,
        }  # fmt: skip
        job.write_text(json.dumps(facts), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "scripts.gpu.race.peer", str(job)],
            capture_output=True, text=True, encoding="utf-8", cwd=ROOT, timeout=bench.remaining(),
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip
        if done.returncode or not result.exists():
            raise RuntimeError(last_line(done.stderr) or f"exit code {done.returncode}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found

    def _figures(self, result: dict[str, Any]) -> dict[str, Any]:
        """Compute rates from seconds. Recomputed work does not count as operations."""
        config = json.loads((self.bench.large_model() / "config.json").read_text(encoding="utf-8"))
        tokens, seconds = self.bench.sizes.tokens, seconds_of(result, LAYERS)
        lengths = [[len(row["input_ids"]) for row in step] for step in self.steps]
        flops = sum(
            sum(operations(
                Geometry.of({**config, "num_hidden_layers": LAYERS}), lengths=one,
                supervised=tokens // 2, r=RANK,
            ).values())
            for one in lengths
        ) / len(lengths)  # fmt: skip
        rate = card_rate(self.bench)
        return {
            "tokens_per_second_measured": tokens / result["step_seconds"],
            "tokens_per_second": tokens / seconds,
            "teraflops": flops / seconds / 1e12,
            "share_of_card": None if rate is None else flops / seconds / 1e12 / rate,
        }


def plain_name(mode: Mode) -> str:
    """Name the mode of a contestant whose kernels are its own."""
    return f"{mode.quantization}, {'recomputed' if mode.checkpointing else 'kept'}"


def best_attention(one: Contestant, bench: Bench) -> str | None:
    """Return flash attention for trainers without padding where its package is installed."""
    has_it = bench.is_cuda and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if one.kind == "trl" and has_it else None


def card_rate(bench: Bench) -> float | None:
    """Return the card's dense 16-bit rate from its data sheet, in 10^12 operations a second."""
    if not bench.is_cuda:
        return None
    found = torch.cuda.get_device_properties(bench.device)
    card = known_card(found.name, found.total_memory)
    return None if card is None else card.teraflops
