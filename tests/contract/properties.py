"""The properties that every training method must have, for the tests and docs/contract.md.

A check returns an empty string if the property holds, or the reason if the package refuses the
combination. Otherwise it raises.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.errors import ModelError
from qlora_cli.evaluate.divergence import compare
from qlora_cli.export.merge import prepare
from qlora_cli.export.merge_files import verify_files, write_files
from qlora_cli.export.verify import MAX_KL
from qlora_cli.inference.sampling import Sampling, TextGenerator
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.models.base import load_model, start_checkpointing
from qlora_cli.models.loading import load_base
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.objectives.base import evaluate_objective
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP, dry_run
from qlora_cli.plan.trace.libraries import load_libraries
from qlora_cli.plan.trace.memory_counter import MemoryCounter
from qlora_cli.plan.trace.meta_model import count_model
from qlora_cli.plan.traced_memory import trace_memory
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train
from qlora_cli.types import Batch, Prompt
from tests.conftest import save_tiny_model
from tests.contract.subjects import BASES, Subject

CPU = torch.device("cpu")
MAX_QUANTIZED_KL = 1e-2
"""Between an adapted base in 4 or 8 bit and the dequantized one. 8-bit products round activations
too: measured up to 1.1e-3 (RandLora); 4-bit ones are equal."""
INPUT = torch.arange(1, 13)[None]  # (1, T)


@dataclass(frozen=True)
class Case:
    """A subject, with folders for its files."""

    subject: Subject
    bases: Path
    """Folder of the tiny models, each made once for all subjects."""
    folder: Path
    """An empty folder."""

    @property
    def adapter(self) -> Any:
        """The method with its settings."""
        return self.subject.adapter

    def base(self, *, tied: bool = False, dtype: str = "float32") -> Path:
        """Return the folder of the subject's tiny model."""
        folder = self.bases / f"{self.subject.base}-{dtype}{'-tied' * tied}"
        if not folder.exists():
            changes = BASES[self.subject.base]
            save_tiny_model(folder, dtype=dtype, tie_word_embeddings=tied, **changes)
        return folder

    def recipe(self, *, tied: bool = False, dtype: str = "float32", **sections: Any) -> Recipe:
        """Return a recipe of four steps in float32."""
        rows = self.bases / "rows.jsonl"
        if not rows.exists():
            rows.write_text("".join(_rows()), encoding="utf-8")
        training = {
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "gradient_checkpointing": False,
            **sections.pop("training", {}),
        }
        return Recipe.model_validate(
            {
                "model": {"path": str(self.base(tied=tied, dtype=dtype))},
                "adapter": self.adapter,
                "data": {"train": {"path": str(rows)}, "max_length": 64},
                "training": training,
                "optimizer": {"type": "adamw", "learning_rate": 1e-2},
                "output": {"dir": str(self.folder / "run")},
                **sections,
            }
        )

    def load(self, **base: Any) -> Any:
        """Load the tiny model in float32, frozen."""
        model = load_model(self.base(**base), dtype=torch.float32)
        return model.requires_grad_(False).eval()

    def attach(self, **base: Any) -> Any:
        """Load the tiny model and attach the method."""
        torch.manual_seed(0)
        return self.adapter.attach(self.load(**base))

    def save(self, model: Any) -> Path:
        """Save the trained weights, as a run does."""
        folder = self.folder / "trained"
        folder.mkdir()
        self.adapter.save(model, folder)
        model.generation_config.save_pretrained(folder)
        return folder

    def merge(self, recipe: Recipe, trained: Path) -> Any:
        """Merge as `qlora merge` does, and load the result in float32."""
        located, folder = recipe.model.locate(), self.folder / "merged"
        plan = prepare(recipe, located, trained, None)
        folder.mkdir()
        plan.verify(folder, plan.write(folder))
        tokenizer = load_tokenizer(located)
        write_files(located, trained, tokenizer, plan, folder)
        verify_files(located, trained, tokenizer, plan, folder)
        return load_model(folder, dtype=torch.float32).eval()


def _rows() -> Iterator[str]:
    for word in ("ab", "cd", "ef", "gh"):
        for count in (1, 2, 3):
            user = {"role": "user", "content": f"say {word} {count}"}
            answer = {"role": "assistant", "content": " ".join([word] * count)}
            yield json.dumps({"messages": [user, answer]}) + "\n"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits (1, T, V) of `INPUT` in float32."""
    found: Tensor = model(input_ids=INPUT, use_cache=False).logits
    return found.float()


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that get a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_a_little(model: nn.Module, loss: Callable[[], Tensor] | None = None) -> set[str]:
    """Train two steps. Return the names of the weights that had a gradient other than zero."""
    weights = trained_weights(model)
    # Adam's steps have one size, whatever the gradient is: bfloat16 would round small updates
    # away, and with very large ones the test would measure rounding instead of the method.
    optimizer = torch.optim.Adam(weights.values(), lr=0.05)
    reached: set[str] = set()
    for _ in range(2):
        found = model(input_ids=INPUT, labels=INPUT).loss if loss is None else loss()
        found.backward()
        reached |= {n for n, p in weights.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    return reached


def _batch() -> Batch:
    ids = torch.cat([INPUT, INPUT.flip(1)])  # (B, T)
    return Batch(ids, torch.ones_like(ids), ids)


def _loss(model: Any, dtype: torch.dtype) -> float:
    """Return the loss as an evaluation measures it."""
    return evaluate_objective(TokenLoss(model, dtype), [_batch()], CPU)["loss"]


def starts_as_the_base(case: Case) -> str:
    """Before the first step, the outputs are those of the base."""
    before, after = logits(case.load()), logits(case.attach().eval())
    if reason := case.adapter.first_change:
        is_same = before.shape == after.shape and torch.allclose(after, before, rtol=0, atol=1e-5)
        assert not is_same, "it starts as the base, but declares a `first_change`"
        return reason
    # DoRA recomputes the norm of each weight row: float32 rounding.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    return ""


def trains_only_its_weights(case: Case) -> str:
    """Training changes only trained weights; other weights and all buffers stay the same."""
    model = case.attach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = trained_weights(model)
    train_a_little(model)
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed <= trained.keys(), changed - trained.keys()
    return ""


def reaches_each_weight(case: Case) -> str:
    """Each trained weight gets a gradient and changes within two steps."""
    model = case.attach()
    weights = trained_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    reached = train_a_little(model)
    assert reached == weights.keys(), weights.keys() - reached
    same = [name for name, weight in weights.items() if torch.equal(weight, before[name])]
    assert not same, same
    assert weights
    return ""


def is_saved_completely(case: Case) -> str:
    """After saving and loading, the logits are the same bit for bit."""
    model = case.attach()
    train_a_little(model)
    restored = case.adapter.load(case.load(), case.save(model)).eval()
    assert torch.equal(logits(restored), logits(model.eval()))
    return ""


def resumes_exactly(case: Case) -> str:
    """A run of four steps, and one resumed after two, have the same losses and write the same
    bytes; with dropout if the method has it."""
    recipe = case.recipe(training={"save_every": 2})
    adapter = case.adapter
    if "dropout" in type(adapter).model_fields and not getattr(adapter, "target_parameters", []):
        recipe = recipe.model_copy(update={"adapter": adapter.model_copy(update={"dropout": 0.1})})
    run = case.folder / "run"

    def found() -> tuple[list[float], dict[str, bytes]]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        files = {file.name: file.read_bytes() for file in (run / "last").glob("*.safetensors")}
        return losses, files

    train(recipe)
    whole = found()
    shutil.rmtree(run / "last")
    train(recipe, resume="2")
    assert found() == whole
    assert len(whole[0]) == 4
    assert whole[1]
    return ""


def is_merged(case: Case) -> str:
    """The merged model has the logits of base plus adapter."""
    return _merges(case, tied=False)


def keeps_tied_weights(case: Case) -> str:
    """The same holds for a model whose head is tied to its embedding: saving, loading, merging."""
    model = case.attach(tied=True)
    train_a_little(model)
    trained = case.save(model)
    restored = case.adapter.load(case.load(tied=True), trained).eval()
    assert torch.equal(logits(restored), logits(model.eval()))
    shutil.rmtree(trained)
    return _merges(case, tied=True)


def _merges(case: Case, *, tied: bool) -> str:
    model = case.attach(tied=tied)
    train_a_little(model)
    trained, recipe = case.save(model), case.recipe(tied=tied)
    if reason := case.adapter.no_merge:
        try:
            case.merge(recipe, trained)
        except ModelError as error:
            # Not `pytest.raises`: the reason is also the result in the table.
            assert reason in str(error)  # noqa: PT017
            return f"no merge: {reason}"
        raise AssertionError("it was merged, but declares `no_merge`")
    found = case.merge(recipe, trained)
    torch.testing.assert_close(logits(found), logits(model.eval()), rtol=0, atol=5e-5)
    return ""


def on_a_quantized_base(kind: str) -> Callable[[Case], str]:
    """Return the check for a `quantization.type`."""

    def check(case: Case) -> str:
        try:
            recipe = case.recipe(quantization={"type": kind})
        except ValidationError as error:
            reason: str = case.adapter.no_quantization[kind]
            assert reason in str(error)  # noqa: PT017  as above
            assert fails_without_refusal(case, kind), (
                "the recipe is refused although training works"
            )
            return reason
        try:
            model = _attached(case, recipe)
        except ModelError as error:
            said = " ".join(str(error).split())
            # A user should hear of it when the recipe is read, and not once the model is loaded.
            assert "PEFT refuses it" not in said, (
                f"declare {kind} in `no_quantization` of {type(case.adapter).__name__}: {said}"
            )
            return said
        trained = _trains_in_bfloat16(case, recipe, model)
        distance = _distance_to_dequantized(case, recipe, trained)
        assert distance <= MAX_QUANTIZED_KL, "more than MAX_QUANTIZED_KL from the dequantized base"
        if not case.adapter.no_merge:
            expected = _on_dequantized(case, recipe, trained)
            found = case.merge(recipe, trained)
            torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=5e-5)
        return ""

    check.__doc__ = (
        f"On a base in `{kind}` it trains in bfloat16 with its own weights in float32; loss and "
        "answers are the same after saving and loading; adapted and merged model have the logits "
        "of the dequantized base plus adapter."
    )
    return check


def _on_dequantized(case: Case, recipe: Recipe, trained: Path) -> Any:
    """Load saved weights onto the dequantized base, in float32."""
    quantized = load_base(recipe.model, recipe.quantization, torch.float32, CPU)
    return case.adapter.load(recipe.quantization.restore(quantized), trained).eval()


def _distance_to_dequantized(case: Case, recipe: Recipe, trained: Path) -> float:
    """Return the KL divergence between saved weights on the dequantized base and on the quantized.

    A method that reads quantized weights as numbers trains, is saved and loaded, and is wrong.
    """
    expected = logits(_on_dequantized(case, recipe, trained))
    base = load_base(recipe.model, recipe.quantization, torch.float32, CPU)
    return compare(expected, logits(case.adapter.load(base, trained).eval()))["kl"]


def _attached(case: Case, recipe: Recipe) -> Any:
    """Attach the method to the base, quantized as the recipe says, for steps in bfloat16."""
    torch.manual_seed(0)
    return case.adapter.attach(load_base(recipe.model, recipe.quantization, torch.bfloat16, CPU))


def _trains_in_bfloat16(case: Case, recipe: Recipe, model: Any) -> Path:
    """Train under autocast, as most runs do. Return the folder of the saved weights."""
    dtype = torch.bfloat16
    weights = trained_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    objective = TokenLoss(model, dtype)
    train_a_little(model, lambda: objective(_batch())[0] / _batch().num_supervised)
    for name, weight in trained_weights(model).items():
        assert weight.dtype == torch.float32, name
        assert not torch.equal(weight, before[name]), name
    trained = case.save(model)
    restored = case.adapter.load(load_base(recipe.model, recipe.quantization, dtype, CPU), trained)
    assert _loss(restored, dtype) == _loss(model, dtype)
    assert _written(restored, case, dtype) == _written(model, case, dtype)
    return trained


def fails_without_refusal(case: Case, kind: str) -> bool:
    """Tell whether a refused combination fails or is wrong; otherwise the refusal is wrong."""
    other = case.recipe().model_dump(mode="json")
    changes = {"adapter": {"type": "lora"}, "quantization": {"type": kind}}
    recipe = Recipe.model_validate({**other, **changes})
    try:
        model = case.adapter.attach(
            load_base(recipe.model, recipe.quantization, torch.float32, CPU)
        )
        train_a_little(model)
        return _distance_to_dequantized(case, recipe, case.save(model)) > MAX_QUANTIZED_KL
    # Libraries raise all of these for shapes and dtypes that they do not support.
    except (ModelError, RuntimeError, TypeError, ValueError):
        return True


def on_a_16_bit_base(case: Case) -> str:
    """The same holds on a base in bfloat16; the merged model is base plus adapter, rounded."""
    held = {"type": "none", "dtype": "bfloat16"}
    recipe = case.recipe(dtype="bfloat16", quantization=held, training={"precision": "auto"})
    # A CPU that is slow in bfloat16 computes in float32, but not on such a base.
    assert recipe.quantization.compute_in(torch.float32) == torch.bfloat16
    trained = _trains_in_bfloat16(case, recipe, _attached(case, recipe))
    if not case.adapter.no_merge:
        base = load_model(case.base(dtype="bfloat16"), dtype=torch.float32)
        expected = case.adapter.load(base.requires_grad_(False), trained).eval()
        found = case.merge(recipe, trained)
        assert compare(logits(expected), logits(found))["kl"] <= MAX_KL
    return ""


def _written(model: Any, case: Case, dtype: torch.dtype) -> list[str]:
    tokenizer = load_tokenizer(case.base())
    prompts = [Prompt([70, 71, 72], ""), Prompt([80, 81], "")]
    generator = TextGenerator(model.eval(), tokenizer, [tokenizer.eos_token_id], dtype, CPU)
    found = generator.complete(prompts, Sampling(max_new_tokens=3), batch_size=2)
    return [answer.text for _, answer in sorted(found, key=lambda pair: pair[0])]


def is_recomputed_alike(case: Case) -> str:
    """Gradients are the same with and without `training.gradient_checkpointing`."""

    def gradients(*, checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        base = case.load().train()
        model = case.adapter.attach(base)
        train_a_little(model)  # otherwise some gradients are zero
        if checkpointing:
            start_checkpointing(base)
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    return ""


def is_planned_right(case: Case) -> str:
    """`qlora plan` predicts the peak bytes of tensors, in steps and in an evaluation, to within
    1 %."""
    # The largest deviation is LoKr's: half a per cent too much.
    recipe = case.recipe()
    full = full_batch(2, 24, padding_free=False)
    batches: dict[str, Any] = {"steps": [[full, full]], "held_out": full}
    config, _ = recipe.model.read_config()
    load_libraries()
    base = recipe.model.load(recipe.quantization.load_options(torch.float32), CPU)
    count = MemoryCounter(vocabulary_size=base.config.vocab_size)
    count_model(base, count)
    torch.manual_seed(0)
    with count:
        dry_run(base, recipe, count, ComputeOptions(torch.float32), **batches)
    try:
        planned = trace_memory(recipe, config, torch.float32, device="cpu", **batches)
    except ModelError as error:
        return str(error)
    for stage in (FIRST, STEP, EVALUATION):
        taken = max(peak.total for key, peak in count.peaks.items() if key.stage == stage)
        assert abs(planned.peak(stage)[1].total - taken) <= 1e-2 * taken, stage
    return ""


@dataclass(frozen=True)
class Property:
    """A property: a column of the table."""

    name: str
    check: Callable[[Case], str]

    @property
    def description(self) -> str:
        """The property in one sentence."""
        return " ".join((self.check.__doc__ or "").split())


_CHECKS: dict[str, Callable[[Case], str]] = {
    "start": starts_as_the_base,
    "frozen": trains_only_its_weights,
    "gradient": reaches_each_weight,
    "saved": is_saved_completely,
    "resumed": resumes_exactly,
    "merged": is_merged,
    "tied": keeps_tied_weights,
    "nf4": on_a_quantized_base("nf4"),
    "fp4": on_a_quantized_base("fp4"),
    "int8": on_a_quantized_base("int8"),
    "16 bit": on_a_16_bit_base,
    "recomputed": is_recomputed_alike,
    "planned": is_planned_right,
}
PROPERTIES = [Property(name, check) for name, check in _CHECKS.items()]
"""All properties, in the order of the columns."""
