from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_cli.adapters import LoRA
from qlora_cli.data.batching.collate import proof_batches
from qlora_cli.data.batching.sampler import BatchStream, eval_batches
from qlora_cli.errors import ModelError
from qlora_cli.models.base import BaseModelConfig, start_checkpointing
from qlora_cli.models.packed_attention import NAME, attend_by_document, check_packing, skip_masks
from qlora_cli.models.quantization import Int8
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.plan.trace.memory_counter import LOGITS, UNQUANTIZED, MemoryCounter
from qlora_cli.types import IGNORE_INDEX, Batch, Example
from tests.conftest import save_tiny_model

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    # Shorter than the examples; the other half of the layers sees all of them.
    "Mistral": {"sliding_window": 5},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "ModernBertDecoder": {},  # its head is called `decoder`
}
LENGTHS = (9, 4, 14, 1, 7)


def make_model(architecture: str, attention: str, **changes: Any) -> Any:
    stem = f"{architecture}Text" if architecture == "Gemma3" else architecture
    settings = {**SIZE, **ARCHITECTURES.get(architecture, {}), **changes}
    config = getattr(transformers, f"{stem}Config")(**settings)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    attend_by_document(model)
    return model


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 100, (n,), generator=generator).tolist() for n in lengths]
    return [Example(row, row) for row in rows]


def packed(some: list[Example]) -> Batch:
    """In the order given, which a stream would change."""
    ids = [token for example in some for token in example.input_ids]
    labels = [t for e in some for t in (IGNORE_INDEX, *e.labels[1:])]
    documents = tuple(len(example.input_ids) for example in some)
    return Batch(torch.tensor([ids]), None, torch.tensor([labels]), documents)


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    return model(**batch.inputs(), use_cache=False).logits[0]


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of queries of each call of scaled dot-product attention."""
    seen: list[int] = []
    original = F.scaled_dot_product_attention

    def watch(query: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(query.shape[2])
        return original(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_examples_are_computed_as_if_alone(architecture: str, attention: str) -> None:
    model = make_model(architecture, attention)
    assert model.config._attn_implementation == {"eager": "eager", "sdpa": NAME}[attention]
    plain = make_model(architecture, "eager")
    together = logits(model, packed(examples())).split(LENGTHS)
    for found, example in zip(together, examples(), strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            alone = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        if len(ids[0]) > 1:
            losses = [F.cross_entropy(x[:-1], ids[0, 1:], reduction="none") for x in (found, alone)]
            torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_changing_one_example_changes_no_other(architecture: str, attention: str) -> None:
    model = make_model(architecture, attention)
    batch = packed(examples())
    before = logits(model, batch).split(LENGTHS)
    for changed in range(len(LENGTHS)):
        some = examples()
        some[changed] = Example([5] * LENGTHS[changed], [5] * LENGTHS[changed])
        after = logits(model, packed(some)).split(LENGTHS)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(len(LENGTHS))]


class Reads(TorchDispatchMode):
    """Count the reads of values by the host: on a GPU each waits for all work before it."""

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_pass_reads_no_value_to_make_its_masks(architecture: str) -> None:
    model = make_model(architecture, "sdpa")
    batch = packed(examples())
    with Reads() as before:
        expected = logits(model, batch)
    skip_masks(model)
    with Reads() as after:
        found = logits(model, batch)
    assert torch.equal(found, expected)
    assert after.number == 0 < before.number
    # Padded batches get their masks as before, after a packed one too.
    ids = torch.arange(1, 9)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits
        plain = make_model(architecture, "eager")(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1, :5], plain[1, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
def test_nothing_is_computed_for_what_is_masked(architecture: str, queries: list[int]) -> None:
    logits(make_model(architecture, "sdpa"), packed(examples()))
    assert queries == [*LENGTHS, *LENGTHS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batches_are_computed_as_by_plain_sdpa(architecture: str) -> None:
    model, plain = make_model(architecture, "sdpa"), make_model(architecture, "eager")
    plain.set_attn_implementation("sdpa")
    [padded] = eval_batches(examples(), batch_size=len(LENGTHS), pad_token_id=0)
    assert padded.attention_mask is not None
    assert padded.attention_mask.min() == 0
    for batch in (padded.inputs(), {"input_ids": padded.input_ids}):
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, plain(**batch).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(**padded.inputs(), **options), plain.generate(**padded.inputs(), **options)
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_pass_the_isolation_check(architecture: str, attention: str) -> None:
    model = make_model(architecture, attention).train()
    check = check_packing(model, *proof_batches(examples(), pad_token_id=0), torch.float32)
    assert check.leak == check.gradient_leak == 0
    assert check.difference < 1e-5
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "packing checked" in check.summary()


def refused(model: Any) -> str:
    with pytest.raises(ModelError) as caught:
        check_packing(model, *proof_batches(examples(), pad_token_id=0), torch.float32)
    assert "data.packing=false" in caught.value.hint
    return str(caught.value)


def test_a_convolution_across_the_boundary_of_examples_is_refused() -> None:
    settings = {
        **SIZE,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    }
    settings.pop("head_dim")
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**settings))
    message = refused(model)
    assert "data.packing: lfm2 with attention sdpa lets packed examples see each other" in message


def test_a_recurrent_state_is_refused() -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**settings))
    assert "data.packing: mamba" in refused(model)


def test_sdpa_over_all_examples_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_boundaries(batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}

    model = make_model("Llama", "sdpa")
    monkeypatch.setattr(Batch, "inputs", without_boundaries)
    assert "see each other: changing one example changes the logits of another by" in refused(model)


@pytest.fixture
def eight_bit(tmp_path: Path) -> Any:
    """A model with outliers, which decide together how all rows are quantized."""
    folder = save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    options = Int8(outlier_threshold=3).load_options(torch.float32)
    model = BaseModelConfig(path=str(folder)).load(options, torch.device("cpu"))
    attend_by_document(model)
    return model


def test_8_bit_models_pass_the_isolation_check_despite_shared_outliers(eight_bit: Any) -> None:
    check = check_packing(eight_bit, *proof_batches(examples(), pad_token_id=0), torch.float32)
    assert check.leak > 0.01
    assert check.gradient_leak == 0


def test_a_leak_below_the_noise_of_8_bit_is_refused(eight_bit: Any) -> None:
    def blend(module: Any, arguments: Any, hidden: Tensor) -> Tensor:
        """A little of the token before, whichever example that is from."""
        return hidden + 0.01 * F.pad(hidden, (0, 0, 1, -1))

    eight_bit.model.layers[0].register_forward_hook(blend)
    message = refused(eight_bit)
    figures = re.findall(r"by (\S+) .*?tolerance ([^)]+)\)", message)
    assert len(figures) == 2
    assert all(float(found) < float(allowed) for found, allowed in figures)
    assert re.search(r"the gradient between examples is [1-9]", message)


def test_a_model_that_has_no_sdpa_keeps_its_soft_cap() -> None:
    model = make_model("Gemma2", "eager", sliding_window=5)
    assert model.config._attn_implementation == "eager"
    check = check_packing(model, *proof_batches(examples(), pad_token_id=0), torch.float32)
    assert check.leak == 0
    assert check.difference < 1e-5


@pytest.mark.parametrize(("name", "value"), [("s_aux", torch.ones(4)), ("softcap", 50.0)])
def test_options_that_sdpa_would_ignore_are_refused(name: str, value: Any) -> None:
    module = make_model("Llama", "sdpa").model.layers[0].self_attn
    attend = transformers.AttentionInterface()[NAME]
    states = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match=f"does not support {name}"):
        attend(module, states, states[:, :2], states[:, :2], None, (3, 2), **{name: value})


def test_a_sliding_window_only_in_the_mask_is_refused() -> None:
    attend = transformers.AttentionInterface()[NAME]
    module = make_model("Mistral", "sdpa").model.layers[0].self_attn
    states = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match=r"not given the sliding_window \(5\)"):
        attend(module, states, states[:, :2], states[:, :2], None, (7, 2))


def test_flash_attention_is_given_the_boundaries_that_it_would_find() -> None:
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    inputs = packed(examples()).inputs()
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(inputs["position_ids"])
    assert torch.equal(inputs["cu_seq_lens_q"], ends)
    assert torch.equal(inputs["cu_seq_lens_k"], ends)
    assert inputs["cu_seq_lens_q"].dtype == ends.dtype
    assert inputs["max_length_q"] == inputs["max_length_k"] == longest


def gradients_of(stream: BatchStream, model: Any, make: Callable[[Any], Any]) -> dict[str, Tensor]:
    objective = make(model)
    loss = sum(objective(batch) for batch in stream.micro_batches(0))
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.quick_every(5)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_step_are_those_without_packing(
    architecture: str, attention: str, checkpointing: bool
) -> None:
    model = LoRA(r=4).attach(make_model(architecture, attention).requires_grad_(False)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        start_checkpointing(model.get_base_model())

    def gradients(max_length: int | None, micro_batch_size: int) -> dict[str, Tensor]:
        stream = BatchStream(
            examples((9, 4, 14, 2, 7, 20, 3, 8)),
            batch_size=8,
            micro_batch_size=micro_batch_size,
            seed=0,
            epochs=1,
            pad_token_id=0,
            max_length=max_length,
        )
        assert stream.num_steps == 1
        return gradients_of(stream, model, lambda m: lambda b: TokenLoss(m, torch.float32)(b)[0])

    expected = gradients(None, 3)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for micro_batch_size in (1, 8):
        found = gradients(24, micro_batch_size)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-4)


def test_the_check_holds_few_logits_at_a_time() -> None:
    vocabulary = 50_000
    model = make_model("Llama", "sdpa", vocab_size=vocabulary, tie_word_embeddings=True)
    attend_by_document(model)
    batches = proof_batches(examples(), pad_token_id=0)
    with MemoryCounter(vocabulary_size=vocabulary) as count:
        count.hold(model.parameters(), UNQUANTIZED)
        check_packing(model, *batches, torch.float32)
    logits = max(peak.kinds.get(LOGITS, 0) for peak in count.peaks.values())
    # Those of three examples of 16 tokens, of two of them once more, and a few while comparing.
    assert 4 * vocabulary * 5 * 16 <= logits <= 4 * vocabulary * (5 * 16 + 4)
