"""Factors computed from several tensors: PiSSA, OLoRA, LoRA-FA and AdaLoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.adapters import AdaLoRA, LoRA
from qlora_cli.adapters.layers.lora_init import (
    OffsetFactor,
    ScaledFactor,
    low_rank_layers,
    olora_factors,
    pissa_factors,
)
from qlora_cli.errors import ModelError
from qlora_cli.runs.checkpoint import _trained

IDS = torch.arange(1, 25).view(2, 12)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False)


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_training_equals_peft_on_a_changed_base(tiny_model: Path, init: Any, rslora: bool) -> None:
    adapter = LoRA(r=4, alpha=8, init=init, target_modules=TARGETS, use_rslora=rslora)
    ours = adapter.attach(load(tiny_model))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init, use_rslora=rslora
    )
    theirs = get_peft_model(load(tiny_model), config)
    found = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(trained(model), lr=0.005)
        for _ in range(4):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(logits(model))
    assert sum(map(torch.numel, trained(ours))) == sum(map(torch.numel, trained(theirs)))
    change = found[0] - logits(load(tiny_model))
    # PEFT rounds the residual of the base to float32, and the factors are large.
    assert (found[0] - found[1]).norm() < 1e-3 * change.norm()


def test_the_initial_factors_are_the_best_approximation_of_a_weight() -> None:
    weight = torch.randn(12, 8) @ torch.diag(torch.logspace(0, -3, 8)) @ torch.randn(8, 8)
    best = torch.linalg.svd(weight)
    expected = best.U[:, :3] @ torch.diag(best.S[:3]) @ best.Vh[:3]
    for steps in (None, 16):
        a, b = pissa_factors(weight, 3, 0.5, steps)
        torch.testing.assert_close(0.5 * b @ a, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    a, b = olora_factors(weight, 8)
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(8), rtol=0, atol=1e-5)


def test_a_checkpoint_has_the_initial_factors(tiny_model: Path) -> None:
    model = LoRA(r=4, init="pissa", target_modules=["q_proj"]).attach(load(tiny_model))
    kept = _trained(model)
    layers = dict(low_rank_layers(model))
    assert len(kept) == 4 * len(layers) == 8
    for name, layer in layers.items():
        for half in ("A", "B"):
            factor = layer.get_submodule(f"lora_{half}.default")
            assert isinstance(factor, OffsetFactor)
            place = f"base_model.model.{name}.lora_{half}.default.first"
            assert torch.equal(kept[place], factor.first)


def test_dropout_does_not_change_the_initial_model(tiny_model: Path) -> None:
    expected = logits(load(tiny_model))
    model = LoRA(r=4, init="pissa", dropout=0.5).attach(load(tiny_model)).train()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)


def test_the_saved_config_has_the_saved_rank(tiny_model: Path, tmp_path: Path) -> None:
    adapter = LoRA(r=4, alpha=8, init="olora", rank_pattern={"q_proj": 2})
    adapter.save(adapter.attach(load(tiny_model)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["rank_pattern"] == {"q_proj": 4}
    assert config["init_lora_weights"] is True
    shapes = {
        n: tuple(t.shape) for n, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (4, 32)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] == (64, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "pissa", "use_dora": True}, "does not work with use_dora"),
        ({"init": "olora", "freeze_a": True}, "does not work with freeze_a"),
        ({"init": "pissa", "init_from": "runs/x"}, "does not work with init_from"),
        ({"freeze_a": True, "init_from": "runs/x"}, "freeze_a does not work with init_from"),
        ({"init": "loftq"}, "needs the unquantized weights in addition to the quantized ones"),
        ({"init": "eva"}, "needs activations of the training data"),
    ],
)
def test_conflicting_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LoRA(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoRA(r=20, init="pissa"), r"adapter.r \(20\) is larger than the rank of .*k_proj \(16\)"),
        (LoRA(init="olora", target_modules=["embed_tokens"]), "embed_tokens is not one"),
        (AdaLoRA(target_modules=["embed_tokens"]), "embed_tokens is not one"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    tiny_model: Path, adapter: LoRA, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        adapter.attach(load(tiny_model))


def test_with_frozen_a_half_of_the_factors_are_trained(tiny_model: Path) -> None:
    model = LoRA(r=4, freeze_a=True, target_modules=TARGETS).attach(load(tiny_model))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all("lora_B" in name for name in names)


def test_the_omitted_correction_of_lora_fa_is_nearly_a_multiple_of_the_identity() -> None:
    """The correction is (A A^T)^-1, for A of 16 rows and 2048 columns as PEFT draws it."""
    a = torch.nn.Linear(2048, 16, bias=False).weight.detach()
    correction = torch.linalg.inv(a @ a.T)
    multiple = correction.diagonal().mean() * torch.eye(16)
    assert (correction - multiple).norm() < 0.15 * multiple.norm()


# --- AdaLoRA

STEPS = 10
SETTINGS = {"beta1": 0.8, "beta2": 0.7}


def peft_adalora(base: PreTrainedModel) -> Any:
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=16,
        tinit=1,
        tfinal=3,
        total_step=STEPS,
        deltaT=2,
        task_type="CAUSAL_LM",  # otherwise PEFT omits the penalty
        target_modules=TARGETS,
        orth_reg_weight=0.3,
        **SETTINGS,
    )
    return get_peft_model(base, config)


def our_adalora() -> AdaLoRA:
    return AdaLoRA(
        r=4,
        target_r=2,
        alpha=16,
        begin_at=0.1,
        end_at=0.7,
        allocate_every=2,
        orthogonality=0.3,
        target_modules=TARGETS,
        **SETTINGS,
    )


def train(model: Any, hooks: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    for step in range(steps):
        loss_of(model).backward()
        hooks.before_update()
        optimizer.step()
        hooks.after_update(step + 1)
        optimizer.zero_grad()


def test_ranks_are_allocated_as_by_peft(tiny_model: Path) -> None:
    theirs, ours = peft_adalora(load(tiny_model)), our_adalora().attach(load(tiny_model))
    pairs = []
    for (_, one), other in zip(
        low_rank_layers(ours), (m for m in theirs.modules() if hasattr(m, "ranknum")), strict=True
    ):
        factor, b = one.lora_A["default"], one.lora_B["default"].weight
        factor.directions.data.copy_(other.lora_A["default"])
        b.data.copy_(other.lora_B["default"])
        other.ranknum["default"].data.fill_(4 - 1e-5)  # PEFT adds 1e-5
        pairs.append((factor, b, other))
    hooks = our_adalora().step_hooks(ours, STEPS)
    optimizers = [torch.optim.SGD(trained(model), lr=0.5) for model in (theirs, ours)]
    left = []
    for step in range(STEPS):
        loss_of(theirs).backward()  # includes the penalty
        loss_of(ours).backward()
        hooks.before_update()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        hooks.after_update(step + 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for factor, b, other in pairs:
            torch.testing.assert_close(factor.values, other.lora_E["default"], rtol=0, atol=1e-5)
            torch.testing.assert_close(
                factor.directions, other.lora_A["default"], rtol=0, atol=1e-5
            )
            torch.testing.assert_close(b, other.lora_B["default"], rtol=0, atol=1e-5)
        left.append(sum(int((factor.values != 0).sum()) for factor, _, _ in pairs))
    assert left[0] == 16
    assert left[-1] == left[6] == 8
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


def test_remaining_ranks_are_saved_as_lora(tiny_model: Path, tmp_path: Path) -> None:
    adapter = our_adalora()
    model = adapter.attach(load(tiny_model))
    train(model, adapter.step_hooks(model, STEPS), STEPS)
    factors = [module for module in model.modules() if isinstance(module, ScaledFactor)]
    for factor in factors:
        factor.values.data *= 1000  # a few steps hardly change the logits
    factors[0].values.data.zero_()  # no rank remains
    adapter.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert min(config["rank_pattern"].values()) == 1
    restored = adapter.load(load(tiny_model), tmp_path)
    torch.testing.assert_close(logits(restored), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), logits(load(tiny_model)), atol=1e-3)


def test_a_checkpoint_has_the_state_of_the_allocation(tiny_model: Path) -> None:
    """A model that is restored in the middle ends like one that was trained without a break."""
    adapter = our_adalora()
    model = adapter.attach(load(tiny_model))
    hooks = adapter.step_hooks(model, STEPS)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)

    def go(steps: range) -> None:
        for step in steps:
            loss_of(model).backward()
            hooks.before_update()
            optimizer.step()
            hooks.after_update(step + 1)
            optimizer.zero_grad()

    go(range(5))
    kept = {name: tensor.clone() for name, tensor in _trained(model).items()}
    go(range(5, STEPS))
    expected = {name: tensor.clone() for name, tensor in _trained(model).items()}
    assert any(not torch.equal(kept[name], tensor) for name, tensor in expected.items())

    torch.manual_seed(1)
    model = adapter.attach(load(tiny_model))
    hooks = adapter.step_hooks(model, STEPS)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    for name, tensor in _trained(model).items():
        tensor.copy_(kept[name])
    go(range(5, STEPS))
    for name, tensor in _trained(model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "target_r": 4}, "target_r (4) must be less than r (4)"),
        ({"begin_at": 0.8}, "begin_at (0.8) must be before end_at (0.7)"),
    ],
)
def test_a_budget_that_cannot_fall_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdaLoRA(**settings)
    assert message in str(caught.value)
