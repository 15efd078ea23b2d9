from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4TextConfig,
    ModernBertDecoderConfig,
    PretrainedConfig,
    ProphetNetConfig,
)

from qlora_cli.adapters import OFT, LoHa, LoKr, LoRA, OtherPeft
from qlora_cli.data.batching.sampler import eval_batches
from qlora_cli.kernels.cross_entropy import LossChunks
from qlora_cli.kernels.head_loss import head_loss
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.quantization import FourBit, Unquantized
from qlora_cli.objectives.base import evaluate_objective
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.objectives.token_losses import supervised_positions
from qlora_cli.types import IGNORE_INDEX, Batch, Example
from tests.conftest import save_tiny_model


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 250, (3, 12), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 9:] = 0
    labels = torch.where(torch.rand(3, 12, generator=generator) < 0.5, input_ids, IGNORE_INDEX)
    labels[mask == 0] = IGNORE_INDEX
    labels[:, 0] = input_ids[:, 0]  # a label that nothing predicts
    return Batch(input_ids, mask, labels)


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), reduction="sum"
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("adapter", [LoRA(r=4), LoRA(r=4, modules_to_save=["lm_head"])])
@pytest.mark.parametrize("chunk_rows", [1, 5, 10_000])
def test_equals_the_plain_loss_and_its_gradients(
    tiny_model: Path, adapter: LoRA, chunk_rows: int
) -> None:
    chunks = LossChunks(chunk_rows * 4 * 260)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = adapter.attach(model.requires_grad_(False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch()
    expected = plain_loss(model, batch)
    expected.backward()
    expected_gradients = gradients(model)

    objective = TokenLoss(model, torch.float32, chunks=chunks)
    assert objective.token_losses.is_split
    loss, _ = objective(batch)
    (loss * 0.5).backward()
    found = gradients(model)

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        # Float32 sums in another order.
        torch.testing.assert_close(2 * gradient, expected_gradients[name], rtol=1e-5, atol=1e-5)


HEAD = {"target_modules": ["lm_head"]}


@pytest.mark.parametrize("quantization", [Unquantized(), FourBit()], ids=["float32", "nf4"])
@pytest.mark.parametrize(
    ("adapter", "tied"),
    [
        (LoRA(r=4, trainable_token_indices=[256, 257]), True),
        (LoRA(r=4, trainable_token_indices=[0]), False),
        (LoRA(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 259]), True),
        (LoRA(r=4, **HEAD), False),
        (LoHa(r=4, **HEAD), False),
        (LoKr(r=4, **HEAD), False),
        (OFT(oft_block_size=8, **HEAD), False),
        (OtherPeft(peft_type="miss", config={"r": 4}, **HEAD), False),
    ],
    ids=lambda value: f"{value.type}" if hasattr(value, "type") else f"tied={value}",
)
def test_a_head_in_a_wrapper_has_the_plain_loss_and_its_gradients(
    tmp_path: Path, adapter: Any, tied: bool, quantization: Any
) -> None:
    base = BaseModelConfig(path=str(save_tiny_model(tmp_path / "m", tie_word_embeddings=tied)))
    options = quantization.load_options(torch.float32)
    model = adapter.attach(base.load(options, torch.device("cpu")))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    batch = make_batch()
    expected = plain_loss(model, batch)
    expected.backward()
    expected_gradients = gradients(model)

    objective = TokenLoss(model, torch.float32)
    loss, _ = objective(batch)
    loss.backward()
    found = gradients(model)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-4)
    assert objective.of_rows(batch).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_soft_cap_after_the_head_is_detected_and_applied() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=260,
        final_logit_softcapping=5.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    objective = TokenLoss(model, torch.float32)
    assert not objective.token_losses.is_split
    batch = make_batch()
    torch.testing.assert_close(objective(batch)[0], plain_loss(model, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        Llama4TextConfig(  # it does not name its decoder
            hidden_size=32, intermediate_size=32, intermediate_size_mlp=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=260,
            num_local_experts=2, pad_token_id=0,
        ),
        ModernBertDecoderConfig(  # its head is named `decoder`
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=260, pad_token_id=0,
        ),
        ProphetNetConfig(  # it ignores `logits_to_keep`
            hidden_size=32, vocab_size=260, num_decoder_layers=2, num_decoder_attention_heads=4,
            decoder_ffn_dim=64, is_decoder=True, dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0,
        ),
    ],
    ids=lambda config: str(config.model_type),
)  # fmt: skip
def test_a_model_that_cannot_be_split_has_the_plain_loss(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    objective = TokenLoss(model, torch.float32)
    assert not objective.token_losses.is_split
    batch = make_batch()
    expected = plain_loss(model, batch)
    torch.testing.assert_close(objective(batch)[0], expected, rtol=1e-6, atol=0)
    assert objective.of_rows(batch).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_are_computed_at_supervised_positions_only(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    objective = TokenLoss(model, torch.float32)
    seen: list[int] = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(output[..., 0].numel())
    )
    batch = make_batch()
    objective(batch)
    assert seen == [batch.num_supervised]


def test_no_supervised_token_gives_zero_loss_and_zero_gradients(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = LoRA(r=4).attach(model.requires_grad_(False))
    batch = make_batch()
    objective = TokenLoss(model, torch.float32)
    batch.labels.fill_(IGNORE_INDEX)
    loss, _ = objective(batch)
    loss.backward()
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_a_model_that_is_not_split_takes_part_without_rows(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = LoRA(r=4).attach(model.requires_grad_(False))
    objective = TokenLoss(model, torch.float32)
    objective.token_losses.is_split = False
    batch = make_batch()
    batch.labels.fill_(IGNORE_INDEX)
    loss, _ = objective(batch)
    loss.backward()
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_rows_are_shared_by_ranks_with_and_without_rows(
    tiny_model: Path, world_size: int, is_split: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    objective = TokenLoss(model, torch.float32)
    objective.token_losses.is_split = is_split
    batch = make_batch()
    rows = [
        Example(ids[:n], labels[:n])
        for ids, labels, n in zip(
            batch.input_ids.tolist(), batch.labels.tolist(), (12, 9, 12), strict=True
        )
    ]
    sums: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        sums.append(values)
        return torch.ones_like(values)  # a rank may have no rows

    for rank in range(world_size):
        mine = eval_batches(rows, batch_size=3, pad_token_id=0, rank=rank, world_size=world_size)
        evaluate_objective(objective, mine, torch.device("cpu"), keep)
    expected = [plain_loss(model, batch).item(), batch.num_supervised]
    assert torch.stack(sums).sum(0).tolist() == pytest.approx(expected, rel=1e-6)


def test_positions_come_one_before_their_targets() -> None:
    labels = torch.tensor([[7, IGNORE_INDEX, 8, 9], [IGNORE_INDEX, 5, IGNORE_INDEX, IGNORE_INDEX]])
    positions, targets = supervised_positions(labels)
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [8, 9, 5]


def test_bfloat16_head_loss_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 260, bias=False).bfloat16().requires_grad_(False)
    hidden = torch.randn(4000, 16).bfloat16()
    targets = torch.randint(0, 260, (4000,))
    loss = head_loss(hidden, targets, head)
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
