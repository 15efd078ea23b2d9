"""Verify on a CUDA card what could not be verified on a CPU, and print a table.

Exit status: 0 all checks passed, 1 at least one failed, 3 there is no CUDA card.

`--device cpu` tests the script itself on a machine without a card. It skips checks that need a card
and proves nothing about CUDA.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli._compat import quiet_libraries
from qlora_cli.data.batching.sampler import BatchStream
from qlora_cli.data.prepared.cache import read_data
from qlora_cli.distributed.world import World
from qlora_cli.kernels.attention import (
    DocumentBoundaries,
    PerDocumentAttention,
    VarlenAttention,
    attend,
    attend_backward,
    choose_attention,
)
from qlora_cli.kernels.cross_entropy import compiled_cross_entropy, cross_entropy
from qlora_cli.kernels.decoder_layer import Recompute, fuse_layers
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.kernels.offload import PinnedHostMemory, keep_on_host
from qlora_cli.kernels.selection import has_compiler
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.loop.setup import assemble
from qlora_cli.loop.step import train_step
from qlora_cli.models.base import start_checkpointing
from qlora_cli.models.loading import load_base
from qlora_cli.models.packed_attention import attend_by_document
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.plan.trace.memory_counter import MemoryCounter
from qlora_cli.plan.trace.traced_tensor import TracedTensor
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import Batch, TrainState

NO_CARD = 3
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class NotHere(Exception):
    """The check needs a GPU."""


class Bench:
    """A random model and training rows, in a temporary folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.model = folder / "model"
        self.rows = folder / "rows.jsonl"
        save_model(self.model, width=256, layers=4)
        words = [chr(97 + i) + chr(97 + (7 * i) % 26) for i in range(26)]
        rows = [
            {"prompt": f"say {word} {count}", "completion": " ".join([word] * count)}
            for word in words
            for count in range(1, 9)
        ]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def recipe(self, name: str, **sections: Any) -> Recipe:
        """Make the recipe of a short run. Keyword arguments replace or extend its sections."""
        source = {"path": str(self.rows), "format": {"type": "prompt_completion"}}
        document: dict[str, Any] = {
            "model": {"path": str(self.model)},
            "quantization": {"type": "nf4"},
            "adapter": {"type": "lora", "r": 8, "dropout": 0.05},
            "data": {"train": source, "evaluation": {**source, "limit": 48}, "max_length": 128},
            "training": {"max_steps": 12, "batch_size": 8, "micro_batch_size": 4},
            "optimizer": {"type": "paged_adamw_32bit", "learning_rate": 3e-3},
            "output": {"dir": str(self.folder / name)},
        }
        for section, values in sections.items():
            document[section] = {**document[section], **values}
        return Recipe.model_validate(document)

    def qlora(self, *arguments: object) -> Any:
        """Run a command in a separate process, as users do, and return its JSON."""
        command = [sys.executable, "-m", "qlora_cli", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"exit code {done.returncode}: {last_line(done.stderr)}"
        assert "warning" not in done.stderr.lower(), last_line(done.stderr)
        return json.loads(done.stdout)

    def train(self, name: str, **sections: Any) -> Path:
        """Train through the command line, and return the run folder."""
        path = self.folder / f"{name}.yaml"
        recipe = self.recipe(name, **sections).model_dump(mode="json")
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        self.qlora("train", path)
        return self.folder / name


def save_model(folder: Path, *, width: int, layers: int, vocabulary: int = 260) -> None:
    """Write a random Llama with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max())


def at_most(value: float, limit: float, name: str) -> str:
    assert value <= limit, f"{name} {value:.1e}, at most {limit:.0e} is allowed"  # NaN fails too
    return f"{name} {value:.1e}"


def metrics(run: Path, name: str) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


# The kernels of bitsandbytes.


def four_bit_product(bench: Bench, kind: str) -> str:
    """Compare Linear4bit with a product by the dequantized weight, for one token and many."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    worst = 0.0
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)):
        layer = Linear4bit(
            1024, 768, bias=False, compute_dtype=dtype, quant_type=kind, compress_statistics=True
        )
        layer = layer.to(bench.device)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        for tokens in (1, 7, 2048):
            x = torch.randn(tokens, 1024, device=bench.device, dtype=dtype)
            with torch.no_grad():
                error = relative_error(layer(x), x.float() @ weight.T)
            at_most(error, tolerance, f"{dtype}, {tokens} tokens: relative error")
            worst = max(worst, error)
    return f"relative error {worst:.1e}"


def four_bit_values(bench: Bench, kind: str) -> str:
    """Check that a weight quantized on GPU and CPU dequantizes to the same values."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(768, 1024)
    here, there = (
        dequantize_4bit(*quantize_4bit(weight.to(d), quant_type=kind, compress_statistics=True))
        for d in (bench.device, torch.device("cpu"))
    )
    differing = float(((here.cpu() - there).abs() > 1e-3 * there.abs().max()).float().mean())
    return at_most(differing, 1e-3, "share of values that differ")


def eight_bit_product(bench: Bench) -> str:
    """Compare LLM.int8 with float32, and check a gradient through it."""
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    plain = nn.Linear(1024, 768, bias=False)
    layer = Linear8bitLt(1024, 768, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(bench.device)
    x = torch.randn(64, 1024, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    weight = plain.weight.to(bench.device)
    error = relative_error(y.detach(), x.detach().float() @ weight.T)
    y.float().sum().backward()
    assert x.grad is not None
    gradient_error = relative_error(x.grad, weight.sum(0).expand_as(x))
    return at_most(max(error, gradient_error), 5e-2, "relative error")


# Gradients and optimizers.


def gradients(
    bench: Bench, kind: str, *, checkpointing: bool, fused: bool = False, offload: bool = False
) -> dict[str, Tensor]:
    """Return the adapter's gradients for one batch without padding."""
    recipe = bench.recipe(
        "gradients", quantization={"type": kind}, adapter={"dropout": 0.0}, training={"seed": 1}
    )
    world = World()
    dtype = world.compute_dtype("auto")
    base = load_base(recipe.model, recipe.quantization, dtype, bench.device)
    assert attend_by_document(base)
    torch.manual_seed(1)
    model = recipe.adapter.attach(base).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of the other half
            nn.init.normal_(parameter, std=0.02)
    if fused:
        recompute: Recompute = "all" if checkpointing else "none"
        attention = choose_attention(bench.device, dtype)
        number = fuse_layers(model, recompute, Elementwise(), attention)
        layers = base.config.num_hidden_layers
        assert number == layers, f"{number} of {layers} layers are one function"
    elif checkpointing:
        start_checkpointing(base)
    if offload:
        keep_on_host(base.get_decoder(), base.get_input_embeddings(), PinnedHostMemory())
    batch = stream(recipe).micro_batches(0)[0]
    TokenLoss(model, dtype)(batch.to(bench.device))[0].backward()
    return {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


def stream(recipe: Recipe) -> BatchStream:
    tokenizer = recipe.model.load_tokenizer()
    rows = read_data("training", recipe.data, recipe.data.train_sources, tokenizer).examples
    return BatchStream(
        rows,
        batch_size=recipe.training.batch_size,
        micro_batch_size=recipe.training.fixed_micro_batch_size,
        seed=0,
        epochs=1,
        pad_token_id=tokenizer.pad_token_id,
        padding=False,
    )


def gradients_agree(bench: Bench, kind: str) -> str:
    """Check that all adapter gradients are finite, and equal with and without checkpointing."""
    plain = gradients(bench, kind, checkpointing=False)
    checkpointed = gradients(bench, kind, checkpointing=True)
    assert len(plain) == 2 * 7 * 4, f"{len(plain)} gradients, {2 * 7 * 4} expected"
    for name, gradient in plain.items():
        assert bool(gradient.isfinite().all()), f"{name}: the gradient is not finite"
        assert bool(gradient.any()), f"{name}: the gradient is zero"
    error = max(relative_error(checkpointed[name], plain[name]) for name in plain)
    return at_most(error, 1e-3, f"{len(plain)} tensors; relative difference")


def fused_layers_agree(bench: Bench, kind: str) -> str:
    """Compare gradients of fused layers with plain ones, recomputed or not."""
    plain = gradients(bench, kind, checkpointing=False)
    found = [gradients(bench, kind, checkpointing=again, fused=True) for again in (False, True)]
    error = max(relative_error(each[name], plain[name]) for each in found for name in plain)
    return at_most(error, 5e-2, f"{len(plain)} tensors; relative difference")


def offload_agrees(bench: Bench, kind: str) -> str:
    """Check that offloaded layer inputs return unchanged."""
    found = []
    for fused in (False, True):
        plain = gradients(bench, kind, checkpointing=True, fused=fused)
        moved = gradients(bench, kind, checkpointing=True, fused=fused, offload=True)
        found += [relative_error(moved[name], plain[name]) for name in plain]
    return at_most(max(found), 1e-3, "relative difference")


def attention_at_once_agrees(bench: Bench, dtype: torch.dtype) -> str:
    """Compare one attention call over all documents with separate calls, and its memory.

    What a plan says of it goes by the source of the kernel; a card is the first to tell.
    """
    if isinstance(choose_attention(bench.device, dtype), PerDocumentAttention):
        raise NotHere
    lengths, heads, groups, size, scale = (1, 300, 77, 2048), 16, 4, 64, 0.125
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    documents = DocumentBoundaries(lengths, ends.to(bench.device))
    torch.manual_seed(0)
    tokens, ops = sum(lengths), Elementwise()
    options: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    q, grad = torch.randn(2, tokens, heads, size, **options)
    k, v = torch.randn(2, tokens, groups, size, **options)
    each = attend(q, k, v, lengths, scale)
    expected = attend_backward(grad, (q, k, v), each, lengths, scale, ops)
    one = VarlenAttention().forward(q, k, v, documents, scale)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = VarlenAttention().backward(grad, (q, k, v), one, documents, scale, ops)
    taken = torch.cuda.max_memory_allocated() - before
    traced = [TracedTensor(x.to("meta")) for x in (grad, q, k, v, one.output, one.normalizers[0])]
    with torch.no_grad(), MemoryCounter("cuda", granularity=512) as count:
        torch.ops.torch_attn._varlen_attn_backward(
            *traced, ends, ends, max(lengths), max(lengths), True, traced[0], scale, [-1, 0]
        )
    counted = max(peak.total for peak in count.peaks.values())
    pairs = zip((one.output, *found), (each.output, *expected), strict=True)
    error = max(relative_error(*pair) for pair in pairs)
    figures = f"backward takes {taken / 2**20:.1f} MiB, counted {counted / 2**20:.1f}"
    assert abs(taken - counted) <= 0.1 * taken, figures
    return f"{at_most(error, 2e-2, 'relative difference')}; {figures}"


def compiled_kernels_agree(bench: Bench) -> str:
    """Compare compiled element-wise kernels and cross-entropy with uncompiled ones."""
    if not has_compiler(bench.device.type):
        raise NotHere
    torch.manual_seed(0)
    compiled, plain = Elementwise.compiled(), Elementwise()
    gate_up = torch.randn(300, 512, device=bench.device, dtype=torch.bfloat16)
    logits = torch.randn(64, 5000, device=bench.device, dtype=torch.bfloat16)
    targets = torch.arange(64, device=bench.device)
    pairs = [
        (compiled.swiglu(gate_up), plain.swiglu(gate_up)),
        (compiled_cross_entropy()(logits, targets)[1], cross_entropy(logits, targets)[1]),
    ]
    return at_most(max(relative_error(*pair) for pair in pairs), 2e-2, "relative difference")


def paged_optimizer(bench: Bench, bits: int) -> str:
    """Compare twenty steps of the paged optimizer with the unpaged one."""
    import bitsandbytes.optim

    if bench.device.type != "cuda":
        raise NotHere
    names = {32: ("PagedAdamW32bit", "AdamW32bit"), 8: ("PagedAdamW8bit", "AdamW8bit")}[bits]
    results, states = [], []
    for name in names:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(512, 1024, device=bench.device))
        optimizer = getattr(bitsandbytes.optim, name)([weight], lr=1e-2)
        target = torch.randn_like(weight)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(weight, target, reduction="sum").backward()
            optimizer.step()
        results.append(weight.detach())
        states.append(optimizer.state[weight]["state1"])
    # Only paged tensors carry the mark.
    assert hasattr(states[0], "is_paged"), "the states are not paged"
    return at_most(relative_error(*results), 1e-6, "states are paged; relative difference")


# The commands.


def command_train(bench: Bench, kind: str, precision: str) -> str:
    """Check that a short run through the command line lowers the held-out loss."""
    run = bench.train(
        f"{kind}-{precision}",
        quantization={"type": kind},
        training={"precision": precision},
    )
    before, after = metrics(run, "eval_loss")
    assert after < 0.9 * before, f"held-out loss from {before:.3f} to {after:.3f}"
    return f"held-out loss {before:.3f} -> {after:.3f}"


def eval_reproduces(bench: Bench) -> str:
    """`qlora eval` gives the loss that training logged for base and tuned model."""
    run = bench.train("eval")
    models = bench.qlora("eval", run)["models"]
    before, after = metrics(run, "eval_loss")
    pairs = (("base", before), ("tuned", after))
    error = max(abs(models[name]["loss"]["value"] - logged) for name, logged in pairs)
    return at_most(error, 1e-4, "difference of the loss")


def merge_is_faithful(bench: Bench, kind: str) -> str:
    """`qlora merge` passes its own comparison with base plus adapter."""
    run = bench.train(f"merge-{kind}", quantization={"type": kind})
    report = bench.qlora("merge", run, "--output", run / "merged")
    return f"KL {report['kl']:.1e}, same next token {report['top1_agreement']:.1%}"


def resume_is_exact(bench: Bench) -> str:
    """Check that an interrupted and resumed run equals an uninterrupted one."""
    whole = bench.train("whole", training={"save_every": 6})
    cut = bench.folder / "cut"
    recipe = bench.folder / "cut.yaml"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000012")
    text = bench.recipe("cut", training={"save_every": 6}).model_dump(mode="json")
    recipe.write_text(json.dumps(text), encoding="utf-8")
    bench.qlora("train", recipe, "--resume", "auto")
    expected, found = (metrics(run, "loss")[-6:] for run in (whole, cut))
    error = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    return at_most(error, 1e-6, "difference of the loss")


# Speed and memory.


def one_host_sync(bench: Bench, checkpointing: bool | str) -> str:
    """Check that a training step syncs with the GPU once, before the update."""
    if bench.device.type != "cuda":
        raise NotHere
    recipe = bench.recipe(
        "sync",
        optimizer={"type": "adamw"},
        adapter={"dropout": 0.0},
        training={"gradient_checkpointing": checkpointing},
    )
    world = World()
    dtype = world.compute_dtype("auto")
    base = load_base(recipe.model, recipe.quantization, dtype, bench.device)
    assert attend_by_document(base)
    model = recipe.adapter.attach(base)
    options = ComputeOptions(dtype, "fused", DeviceCapabilities.of(bench.device, dtype))
    setup = assemble(recipe, base, model, options, stream(recipe), world, max_steps=10)
    assert setup.kernels == "fused", setup.kernels
    setup.objective.train()
    state = TrainState()

    def step() -> None:
        train_step(setup, recipe.training, state)
        state.step += 1

    step()  # the first makes the optimizer's states and chooses kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]
    return f"{len(setup.batches.micro_batches(1))} micro-batches"


def peak_memory(bench: Bench, kind: str, *, checkpointing: bool, offload: bool = False) -> float:
    """Measure the peak MiB of one step of a 200M model on 4 x 512 tokens."""
    folder = bench.folder / "large"
    if not folder.exists():
        save_model(folder, width=1024, layers=16, vocabulary=32000)
    recipe = bench.recipe("memory", model={"path": str(folder)}, quantization={"type": kind})
    gc.collect()  # the model before this one is in cycles of PEFT's
    before = torch.cuda.memory_allocated()
    dtype = World().compute_dtype("auto")
    base = load_base(recipe.model, recipe.quantization, dtype, bench.device)
    model = recipe.adapter.attach(base)
    if checkpointing:
        start_checkpointing(base)
    if offload:
        keep_on_host(base.get_decoder(), base.get_input_embeddings(), PinnedHostMemory())
    objective = TokenLoss(model, dtype).train()
    input_ids = torch.randint(0, 256, (4, 512))
    batch = Batch(input_ids, torch.ones_like(input_ids), input_ids)
    torch.cuda.reset_peak_memory_stats()
    objective(batch.to(bench.device))[0].backward()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory_is_saved(bench: Bench) -> str:
    """Check that 4-bit, checkpointing and offload each reduce the peak memory."""
    if bench.device.type != "cuda":
        raise NotHere
    sixteen = peak_memory(bench, "none", checkpointing=True)
    four = peak_memory(bench, "nf4", checkpointing=True)
    unchecked = peak_memory(bench, "nf4", checkpointing=False)
    moved = peak_memory(bench, "nf4", checkpointing=True, offload=True)
    figures = (
        f"nf4 {four:,.0f} MiB, 16 bit {sixteen:,.0f}, nf4 without checkpointing {unchecked:,.0f}, "
        f"with offload {moved:,.0f}"
    )
    assert moved < four < min(sixteen, unchecked), figures
    return figures


Check = Callable[[Bench], str]


def checks() -> Iterator[tuple[str, Check]]:
    """Yield the checks in order: name and function."""
    for kind in ("nf4", "fp4"):
        yield f"{kind}: product against dequantized", lambda b, k=kind: four_bit_product(b, k)
        yield f"{kind}: values as on the CPU", lambda b, k=kind: four_bit_values(b, k)
    yield "int8: product and gradient", eight_bit_product
    for kind in ("nf4", "int8", "none"):
        yield f"{kind}: gradients, checkpointed or not", lambda b, k=kind: gradients_agree(b, k)
    for kind in ("nf4", "none"):
        yield f"{kind}: layers as one function", lambda b, k=kind: fused_layers_agree(b, k)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield f"attention at once, {name}", lambda b, d=dtype: attention_at_once_agrees(b, d)
    yield "inputs of layers on the host", lambda b: offload_agrees(b, "nf4")
    yield "compiled kernels", compiled_kernels_agree
    for bits in (32, 8):
        yield f"paged AdamW, {bits} bit", lambda b, n=bits: paged_optimizer(b, n)
    for kind, precision in (
        ("nf4", "bf16"), ("nf4", "fp16"), ("nf4", "fp32"), ("fp4", "bf16"), ("int8", "bf16"),
        ("int8", "fp16"), ("none", "bf16"), ("none", "fp16"),
    ):  # fmt: skip
        yield (
            f"qlora train, {kind} in {precision}",
            lambda b, k=kind, p=precision: command_train(b, k, p),
        )
    yield "qlora eval repeats the logged loss", eval_reproduces
    yield "qlora train --resume auto is exact", resume_is_exact
    for kind in ("nf4", "int8", "none"):
        yield f"qlora merge, {kind}", lambda b, k=kind: merge_is_faithful(b, k)
    for kept in (True, "offload"):
        yield (
            f"a step waits for the card once, {str(kept).lower()}",
            lambda b, c=kept: one_host_sync(b, c),
        )
    yield "peak memory", memory_is_saved


def run_check(bench: Bench, check: Check) -> tuple[str, str]:
    """Run a check; return its result and figure. An exception is a failed check."""
    try:
        return "pass", check(bench)
    except NotHere:
        return "not here", "needs a card"
    except AssertionError as error:
        return "FAIL", str(error)
    # One failing check must not hide the results of the others.
    except Exception as error:
        return "FAIL", f"{type(error).__name__}: {last_line(str(error))}"


def print_machine(device: torch.device) -> None:
    import bitsandbytes
    import peft
    import transformers

    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        print(f"{card.name}, compute capability {card.major}.{card.minor}, ", end="")
        print(f"{card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}")
    print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA card here (torch.cuda.is_available() is false): nothing was checked")
        return NO_CARD
    quiet_libraries()
    print_machine(device)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device)
        for name, check in checks():
            result, figure = run_check(bench, check)
            results.append(result)
            print(f"{name:<40}  {result:<8}  {figure}", flush=True)
    failed = results.count("FAIL")
    print(
        f"\n{results.count('pass')} passed, {failed} failed, {results.count('not here')} left out"
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
