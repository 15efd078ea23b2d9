"""Checks of commands, each in a process of its own: train, resume, eval, generate, merge."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import OutOfMemory
from qlora_cli.inference.sampling import Completion, GumbelSampler, Sampling, TextGenerator
from qlora_cli.types import Prompt
from scripts.gpu.bench import Bench, byte_tokenizer, last_line, metrics
from scripts.gpu.bitsandbytes_checks import milliseconds
from scripts.gpu.training import Mode, load


def long_sections(bench: Bench) -> dict[str, Any]:
    """Return the sections of a run on long documents with the fastest kernels."""
    return {
        "is_long": True,
        "data": {"max_length": bench.sizes.long + 200, "evaluation": None},
        "training": {
            "kernels": "compiled" if bench.is_cuda else "fused",
            "save_every": 6,
            "batch_size": 4,
            "micro_batch_size": 2,
        },
        "optimizer": {"type": "paged_adamw_32bit" if bench.is_cuda else "adamw"},
    }


def resume_is_close(bench: Bench) -> str:
    """Compare an interrupted and resumed run on documents of 2,048 tokens with a whole one.

    Expect losses within 1e-3. They are not bit for bit equal on a card: flash attention adds up the
    gradient of the queries by atomic operations, in an order that differs from run to run.
    """
    whole = bench.train("whole", **long_sections(bench))
    cut = bench.folder / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000012")
    bench.qlora("train", bench.write_recipe("cut", **long_sections(bench)), "--resume", "auto")
    expected, found = (metrics(run, "loss")[-6:] for run in (whole, cut))
    kernels = json.loads((whole / "run.json").read_text(encoding="utf-8")).get("kernels")
    bench.note("kernels", kernels)
    error = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    return f"kernels {kernels}; {bench.at_most(error, 1e-3, 'difference of the loss')}"


def command_train(bench: Bench, kind: str, precision: str) -> str:
    """Expect a short run to lower the held-out loss by a tenth, and metrics of its memory."""
    run = trained(bench, kind, precision)
    before, after = metrics(run, "eval_loss")
    bench.note("losses", [before, after])
    if bench.is_cuda:
        bench.note("allocated_bytes", metrics(run, "peak_memory_bytes")[-1])
        bench.note("reserved_bytes", metrics(run, "reserved_memory_bytes")[-1])
    assert after < 0.9 * before, f"held-out loss from {before:.3f} to {after:.3f}"
    return f"held-out loss {before:.3f} -> {after:.3f}"


def trained(bench: Bench, kind: str, precision: str) -> Path:
    """Return a trained run; each is made once."""
    name = f"{kind}-{precision}"
    if not (bench.folder / name / "run.json").exists():
        bench.train(
            name,
            quantization={"type": kind},
            adapter={"dropout": 0.05},
            training={"precision": precision},
        )
    return bench.folder / name


def eval_reproduces(bench: Bench) -> str:
    """Expect the loss that training logged for base and tuned model."""
    run = trained(bench, "nf4", best_precision(bench))
    models = bench.qlora("eval", run)["models"]
    before, after = metrics(run, "eval_loss")
    pairs = (("base", before), ("tuned", after))
    error = max(abs(models[name]["loss"]["value"] - logged) for name, logged in pairs)
    return bench.at_most(error, 1e-4, "difference of the loss")


def command_generate(bench: Bench) -> str:
    """Expect an answer for each prompt, and the same answers in batches of one and of eight."""
    run = trained(bench, "nf4", best_precision(bench))
    prompts = bench.folder / "prompts.jsonl"
    lines = bench.rows().read_text(encoding="utf-8").splitlines()[:8]
    rows = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = []
    for batch_size in (1, 8):
        output = bench.folder / f"answers-{batch_size}.jsonl"
        bench.qlora(
            *("generate", run, "--prompts", prompts, "--output", output),
            *("--batch-size", batch_size, "--max-new-tokens", 16),
        )
        answers.append(output.read_text(encoding="utf-8").splitlines())
    assert [len(one) for one in answers] == [8, 8]
    different = bench.note("different", sum(a != b for a, b in zip(*answers, strict=True)))
    # Sums in another order may turn a tie.
    assert different <= 2, f"{different} of 8 answers differ"
    return f"{different} of 8 answers differ"


def best_precision(bench: Bench) -> str:
    """Return bf16, or fp16 on cards without it."""
    has_it = not bench.is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp16"


def merge_is_faithful(bench: Bench, kind: str) -> str:
    """Expect `qlora merge` to pass its own comparison with base plus adapter."""
    run = trained(bench, kind, best_precision(bench))
    report = bench.qlora("merge", run, "--output", run / "merged")
    bench.note("kl", report["kl"])
    return f"KL {report['kl']:.1e}, same next token {report['top1_agreement']:.1%}"


def out_of_memory(bench: Bench) -> str:
    """End the memory of a run after four steps. Expect exit code 6, a checkpoint and a hint."""
    # A small model would fit into what the allocator has left over.
    sections = long_sections(bench) | {"model": bench.large_model(bench.sizes.layers // 2)}
    sections["training"] = {
        "kernels": "fused",
        "max_steps": 8,
        "batch_size": 2,
        "micro_batch_size": 2,
    }
    recipe = bench.write_recipe("memory", **sections)
    done = bench.command("train", recipe, options=("--memory-after", 4))
    end = last_line(done.stderr)
    assert done.returncode == OutOfMemory.exit_code, f"exit code {done.returncode}: {end}"
    assert "Traceback" not in done.stderr, end
    saved = sorted(path.name for path in (bench.folder / "memory" / "checkpoints").iterdir())
    assert saved, "there is no checkpoint"
    assert "--set" in done.stderr or "hint" in done.stderr.lower(), end
    bench.note("checkpoints", saved)
    return f"exit code {done.returncode}, {saved[-1]}; {end[:80]}"


def sampling_noise(bench: Bench) -> str:
    """Time the noise of sampling for 16 rows of 128,256 logits. Expect at most 3 ms on a card.

    Expect also the same noise for a row whatever the other rows are.
    """
    settings, size = Sampling(temperature=1.0), 128_256 if bench.is_cuda else 320
    scores = torch.zeros(16, size, device=bench.device)
    ids = torch.zeros(16, 1, dtype=torch.long, device=bench.device)
    first = GumbelSampler(settings, range(16), bench.device)(ids, scores)
    alone = GumbelSampler(settings, [7], bench.device)(ids[:1], scores[:1])
    assert torch.equal(first[7], alone[0]), "a row's noise depends on the other rows"
    sampler = GumbelSampler(settings, range(16), bench.device)
    taken = bench.note("milliseconds", milliseconds(bench, lambda: sampler(ids, scores)))
    figures = f"{taken:.2f} ms for 16 rows of {size:,}"
    bench.needs_card()
    assert taken <= 3, figures
    return figures


def generation(bench: Bench, num_rows: int) -> str:
    """Time greedy generation of the large model. Expect the same answer for equal prompts."""
    mode = Mode("nf4")
    recipe = bench.recipe("generation", model=bench.large_model(), **mode.sections())
    _, model = load(bench, recipe, mode)
    tokenizer = byte_tokenizer()
    new = 64 if bench.is_cuda else 4
    stops = [tokenizer.eos_token_id]
    generator = TextGenerator(model, tokenizer, stops, mode.dtype, bench.device)
    prompts = [Prompt(list(range(1, 200)), "")] * num_rows

    def answers(number: int) -> list[Completion]:
        sampling = Sampling(max_new_tokens=number)
        return [one for _, one in generator.complete(prompts, sampling, batch_size=num_rows)]

    answers(2)
    bench.synchronize()
    started = time.perf_counter()
    found = answers(new)
    bench.synchronize()
    seconds = time.perf_counter() - started
    texts = {one.text for one in found}
    rate = bench.note("tokens_per_second", sum(one.num_tokens for one in found) / seconds)
    bench.note("layers", bench.sizes.layers)
    assert len(found) == num_rows
    assert len(texts) == 1, f"{len(texts)} different answers to one prompt"
    return (
        f"{rate:,.0f} tokens/s, {1000 * seconds / new:.1f} ms a step, {bench.sizes.layers} layers"
    )
