"""What a plan says is what a run takes: traced without data, and counted on real tensors."""

from __future__ import annotations

import gc
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_cli.data.batching.collate import full_batch
from qlora_cli.distributed.devices import Device, find_target, known_card
from qlora_cli.errors import DataError, ModelError, RecipeError
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.selection import Kernels
from qlora_cli.loop.fast_path import ComputeOptions
from qlora_cli.models.known_configs import KNOWN, find_known
from qlora_cli.optim.optimizers import OptimizerConfig
from qlora_cli.plan.analytic_memory import FORMULA, RANGE, Layer, by_formula
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP, dry_run
from qlora_cli.plan.estimate import assume_rows, forecast_recipe, foresee_kernels
from qlora_cli.plan.html import plan_page
from qlora_cli.plan.plan import plan, plan_table
from qlora_cli.plan.shrink_to_fit import _different, _levels, with_changes
from qlora_cli.plan.text import plan_text, set_line
from qlora_cli.plan.trace.libraries import collect_new_garbage_only, load_libraries
from qlora_cli.plan.trace.memory_counter import (
    ADAPTER,
    BUCKETS,
    GRADIENTS,
    HELD,
    STATES,
    Count,
    CountedHost,
    Segment,
)
from qlora_cli.plan.trace.meta_model import hold_model, outline
from qlora_cli.plan.trace.traced_tensor import TracedTensor, refuse_decisions
from qlora_cli.plan.traced_memory import Forecast, forecast
from qlora_cli.recipe.load import LoadedRecipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.train import train
from tests.conftest import exit_code, make_tokenizer, output_of

CPU = torch.device("cpu")

OPTIMIZERS = [one for one in get_args(get_args(OptimizerConfig)[0]) if one().unpaged is None]

RECIPES: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": {"type": "nf4"}},
    "nf4 checkpointed, 8-bit states": {
        "quantization": {"type": "nf4", "double_quant": False},
        "training": {"gradient_checkpointing": True, "micro_batch_size": 2},
        "optimizer": {"type": "adamw_8bit"},
    },
    "int8": {"quantization": {"type": "int8"}},
    "packed": {"quantization": {"type": "nf4"}, "data": {"packing": True}},
    "dora": {"adapter": {"use_dora": True, "dropout": 0.1}},
    "full": {"adapter": {"type": "full"}, "training": {"gradient_checkpointing": True}},
    "freeze": {"adapter": {"type": "freeze", "last_layers": 1, "patterns": ["norm"]}},
    "ia3": {"adapter": {"type": "ia3"}},
    "vera": {"adapter": {"type": "vera", "r": 8}},
    "loha": {"adapter": {"type": "loha", "r": 4}},
    "oft": {"adapter": {"type": "oft", "oft_block_size": 8}, "quantization": {"type": "nf4"}},
    "pissa": {"adapter": {"r": 4, "init": "pissa"}, "quantization": {"type": "nf4"}},
    "adalora": {"adapter": {"type": "adalora", "r": 4, "target_r": 2}},
    "prompt": {"adapter": {"type": "prompt"}, "training": {"gradient_checkpointing": True}},
    "prefix": {"adapter": {"type": "prefix"}, "quantization": {"type": "nf4"}},
    "bottleneck": {
        "adapter": {"type": "bottleneck", "size": 8},
        "quantization": {"type": "nf4"},
        "training": {"gradient_checkpointing": True},
    },
}


def counted(recipe: Recipe, dtype: torch.dtype, **batches: Any) -> Count:
    """What the same steps take with real tensors."""
    load_libraries()
    gc.collect()
    base = recipe.model.load(recipe.quantization.load_options(dtype), CPU)
    count = Count(vocabulary_size=base.config.vocab_size)
    hold_model(base, count)
    with collect_new_garbage_only(), count:
        dry_run(base, recipe, count, ComputeOptions(dtype), **batches)
    return count


def most(peaks: Any, stage: str) -> Any:
    return max((p for s, p in peaks.items() if s.stage == stage), key=lambda p: p.total)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_traced_is_what_real_tensors_take(
    tiny_recipe: Callable[..., Recipe], name: str, dtype: torch.dtype
) -> None:
    recipe = tiny_recipe(**RECIPES[name])
    config, _ = recipe.model.read_config()
    full = full_batch(2, 96, padding_free=recipe.data.packing)
    batches = {"steps": [[full, full]], "held_out": full_batch(2, 80, padding_free=False)}
    real = counted(recipe, dtype, **batches)
    traced = forecast(recipe, config, dtype, device="cpu", **batches)
    for stage in (FIRST, STEP, EVALUATION):
        found, truth = traced.peak(stage)[1], most(real.peaks, stage)
        assert found.total == pytest.approx(truth.total, rel=1e-3), stage
    assert traced.flops[STEP] == real.flops[STEP] > 0


def save_qwen3(folder: Path) -> Path:
    """As `save_tiny_model`: layers that norm their heads."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(num_hidden_layers=2, pad_token_id=tokenizer.pad_token_id, **LAYERS)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_norm_their_heads_are_traced(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    dtype: torch.dtype,
    checkpointing: bool | str,
) -> None:
    recipe = tiny_recipe(
        model={"path": str(save_qwen3(tmp_path / "qwen3"))},
        quantization={"type": "nf4"},
        training={"gradient_checkpointing": checkpointing},
    )
    config, _ = recipe.model.read_config()
    full = full_batch(2, 96, padding_free=True)
    batches: dict[str, Any] = {"steps": [[full, full]], "held_out": None}
    real = counted(recipe, dtype, **batches)
    traced = forecast(recipe, config, dtype, device="cpu", **batches)
    for stage in (FIRST, STEP):
        truth = most(real.peaks, stage)
        assert traced.peak(stage)[1].total == pytest.approx(truth.total, rel=1e-3), stage
    assert traced.flops[STEP] == real.flops[STEP] > 0


def test_inputs_of_layers_on_the_host_are_no_memory_of_the_card(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    def traced(checkpointing: bool | str) -> Forecast:
        recipe = tiny_recipe(
            quantization={"type": "nf4"}, training={"gradient_checkpointing": checkpointing}
        )
        return forecast(
            recipe,
            LlamaConfig(num_hidden_layers=12, **LAYERS),
            torch.bfloat16,
            device="cuda",
            steps=[[full]],
            held_out=None,
        )

    full = full_batch(2, 96, padding_free=True)
    kept, moved = traced(True), traced("offload")
    size = 2 * 96 * 32 * 2
    assert kept.host_bytes == 0
    assert moved.host_bytes == 12 * 2 ** math.ceil(math.log2(size))
    # Behind all layers, when the backward pass begins.
    start = Segment(STEP, "backward", 1, None)
    assert kept.peaks[start].total - moved.peaks[start].total == 12 * size
    assert kept.flops == moved.flops


def test_real_inputs_are_counted_on_the_host(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(training={"gradient_checkpointing": "offload"})
    base = recipe.model.load(recipe.quantization.load_options(torch.bfloat16), CPU)
    count = Count(vocabulary_size=base.config.vocab_size)
    full = full_batch(2, 96, padding_free=True)
    with count:
        dry_run(
            base,
            recipe,
            count,
            ComputeOptions(torch.bfloat16, device=DeviceCapabilities(host=CountedHost(count))),
            steps=[[full]],
            held_out=None,
        )
    assert count.host_bytes == 2 * 2**14  # two layers of 192 x 32 values in two bytes, rounded up


def test_a_plan_says_what_offload_takes_of_the_host(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(
        quantization={"type": "nf4"},
        optimizer={"type": "paged_adamw_8bit"},
        training={"gradient_checkpointing": "offload"},
    )
    report = plan(recipe, device="RTX 4090")
    assert report["host"]["inputs_bytes"] > 0
    assert "for inputs of layers in a step" in plan_text(report)
    assert plan(recipe, device="cpu")["host"] == {}
    assert plan(recipe, device="0.1GiB", fit=True)["changes"] is None  # nothing less is known


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: one.__name__)
def test_the_states_of_each_optimizer_are_traced(
    tiny_recipe: Callable[..., Recipe], optimizer: Any
) -> None:
    """Of all weights: matrices of more than 4,096 (8 bit, where that is asked for), and norms.

    A paged one is traced as what it is unpaged.
    """
    name = optimizer.model_fields["type"].default
    recipe = tiny_recipe(adapter={"type": "full"}, optimizer={"type": name})
    config, _ = recipe.model.read_config()
    full = full_batch(1, 16, padding_free=False)
    batches: dict[str, Any] = {"steps": [[full]], "held_out": None}
    real = most(counted(recipe, torch.float32, **batches).peaks, STEP)
    traced = forecast(recipe, config, torch.float32, device="cpu", **batches).peak(STEP)[1]
    assert traced.kinds[STATES] == real.kinds[STATES] > 0
    assert traced.total == pytest.approx(real.total, rel=1e-3)
    on_card = forecast(recipe, config, torch.float32, device="cuda", **batches).peak(STEP)[1]
    # In steps of 512 bytes: of 21 tensors, six for each at most.
    assert 0 <= on_card.kinds[STATES] - real.kinds[STATES] < 512 * 6 * 21


@pytest.mark.parametrize("name", ["nf4", "packed", "int8"])
def test_a_run_takes_what_its_plan_says(
    tiny_recipe: Callable[..., Recipe], name: str, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]}
        for n in (60, 50, 40, 30, 20, 10)
    ] + [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]}
    ]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(path)}
    changes = RECIPES[name]
    recipe = tiny_recipe(
        **{**changes, "data": {**changes.get("data", {}), "train": source, "evaluation": source}}
    )
    load_libraries()
    report = plan(recipe, device="cpu")
    with Count() as count:
        train(recipe)
    real = max(peak.total for peak in count.peaks.values())
    # Of the base, what no operation looks at is not counted here: the embeddings.
    unseen = 260 * 32 * 4
    planned = report["peak"]["bytes"]
    if report["peak"]["stage"] == "packing proof":  # by formula: for examples of 64 tokens
        assert real + unseen < planned < 1.2 * real
    else:
        assert planned == pytest.approx(real + unseen, rel=1e-2)


def test_the_kinds_add_up_to_what_is_alive(tiny_recipe: Callable[..., Recipe]) -> None:
    missing = {"train": {"path": "nowhere.jsonl"}, "evaluation": None}
    report = plan(tiny_recipe(quantization={"type": "nf4"}, data=missing), device="cpu")
    for entry in report["stages"].values():
        assert sum(entry["kinds"].values()) == entry["bytes"]
    kinds = report["stages"]["step"]["kinds"]
    trained = 4 * report["model"]["trained"]
    assert kinds["trained weights"] == kinds["gradients"] == trained == report["adapter_bytes"]
    assert 2 * trained <= kinds["optimizer states"] <= 2.1 * trained
    # Half a byte for each of the weights in the two layers.
    assert kinds["quantized weights"] == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) // 2
    assert kinds["logits and loss"] > 0


LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=6, **LAYERS),
        # Every other layer is a local one; of nine, one is over.
        Gemma2Config(num_hidden_layers=9, sliding_window=16, **LAYERS),
        Qwen3Config(num_hidden_layers=5, **LAYERS),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_few_layers_say_what_many_take(
    tiny_recipe: Callable[..., Recipe],
    config: PretrainedConfig,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe(
        quantization={"type": "nf4"}, training={"gradient_checkpointing": checkpointing}
    )
    full = full_batch(2, 40, padding_free=False)
    batches: dict[str, Any] = {"steps": [[full, full]], "held_out": full}

    def traced() -> Forecast:
        return forecast(recipe, config, torch.bfloat16, device="cpu", **batches)

    few = traced()
    monkeypatch.setattr("qlora_cli.plan.traced_memory._period", lambda _: None)
    whole = traced()
    assert sum(few.traced_layers) < sum(whole.traced_layers) * 2
    assert len(few.traced_layers) == 2
    assert few.traced_layers[1] < config.num_hidden_layers == whole.traced_layers[0]
    for stage in ("load", FIRST, STEP, EVALUATION):
        assert few.peak(stage)[0] == whole.peak(stage)[0]
        assert few.peak(stage)[1].total == whole.peak(stage)[1].total
    assert few.flops == whole.flops
    assert few.trained_weights == whole.trained_weights


PEFTS_OWN = {"r": 4, "layers_to_transform": [8]}


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank_pattern": {"layers.3.self_attn.q_proj": 32}}},
        {"optimizer": {"groups": [{"match": r"layers\.8\.", "learning_rate": 1e-3}]}},
        {"adapter": {"layers_to_transform": [6, 7]}},
        {"adapter": {"type": "freeze", "last_layers": 3}},
        {"adapter": {"type": "freeze", "last_layers": 0, "patterns": [r"layers\.8\."]}},
        {"adapter": {"type": "peft", "peft_type": "miss", "config": PEFTS_OWN}},
    ],
    ids=["ranks", "groups", "layers", "last layers", "patterns", "PEFT's own"],
)
def test_a_pattern_that_names_a_layer_is_traced_whole(
    tiny_recipe: Callable[..., Recipe], sections: dict[str, Any]
) -> None:
    recipe = tiny_recipe(**sections)
    full = full_batch(1, 16, padding_free=False)
    found = forecast(
        recipe,
        LlamaConfig(num_hidden_layers=9, **LAYERS),
        torch.float32,
        device="cpu",
        steps=[[full]],
        held_out=None,
    )
    assert found.traced_layers == (9,)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_in_8_bit_are_counted(tiny_recipe: Callable[..., Recipe], device: Device) -> None:
    def operations(quantization: str) -> int:
        found = forecast(
            tiny_recipe(quantization={"type": quantization}),
            LlamaConfig(num_hidden_layers=3, **WIDE),
            torch.bfloat16,
            device=device,
            steps=[[full, full]],
            held_out=None,
            kernels="plain",
        )
        return found.flops[STEP]

    full = full_batch(2, 64, padding_free=False)
    assert operations("int8") == pytest.approx(operations("none"), rel=0.02)


def test_products_of_experts_are_counted(tiny_recipe: Callable[..., Recipe]) -> None:
    def operations(per_token: int) -> int:
        config = Qwen3MoeConfig(
            num_hidden_layers=1, moe_intermediate_size=128, num_experts=8,
            num_experts_per_tok=per_token, **WIDE,
        )  # fmt: skip
        recipe = tiny_recipe(adapter={"target_modules": ["q_proj"]})
        found = forecast(
            recipe, config, torch.bfloat16, device="cpu",
            steps=[[full]], held_out=None, kernels="plain",
        )  # fmt: skip
        return found.flops[STEP]

    full = full_batch(1, 64, padding_free=False)
    one, two = operations(1), operations(2)
    # Forward and back (to the input alone): gate, up and down of one more expert for each token.
    assert two - one == 2 * 2 * 64 * 3 * 256 * 128


# As their makers state them (safetensors' index, or the model card).
WEIGHTS = {
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b": 999_885_952,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/phi-4": 14_659_507_200,
    "openai/gpt-oss-20b": 20_914_757_184,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_dimensions_known_here_are_those_of_the_model(name: str) -> None:
    model = outline(AutoConfig.for_model(**KNOWN[name]), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == WEIGHTS[name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("somebody/Llama-3.1-8B-Poetry", None),
    ],
)
def test_a_model_is_found_by_its_name(path: str, name: str | None) -> None:
    found = find_known(path)
    assert (found and found[0]) == name


def test_of_a_model_in_the_table_the_hub_is_not_asked(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def have_no_network(*_: object, local_files_only: bool, **__: object) -> str:
        assert local_files_only
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", have_no_network)
    _, source = tiny_recipe(model={"path": "meta-llama/Llama-2-7b-chat-hf"}).model.read_config()
    assert source == "the dimensions of meta-llama/Llama-2-7b-hf known to qlora"


def test_a_model_of_which_nothing_is_known_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ModelError, match=r"no config.json of nobody/nothing"):
        plan(tiny_recipe(model={"path": "nobody/nothing"}), device="cpu")


def test_a_large_model_is_planned_from_its_name_alone(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(
        model={"path": "meta-llama/Llama-2-7b-hf"},
        quantization={"type": "nf4"},
        adapter={"type": "lora", "r": 64},
        data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 512},
        training={"gradient_checkpointing": True, "micro_batch_size": 1, "precision": "bf16"},
    )
    report = plan(recipe, device="RTX 4090")
    assert report["model"]["weights"] == WEIGHTS["meta-llama/Llama-2-7b-hf"]
    assert report["model"]["trained"] == 159_907_840
    assert "not at hand" in report["rows"]["from"]
    assert report["rows"]["micro_batches"] == [[[1, 512], [1, 512]]]
    # 3.238e9 = 224 matrices of 6,476,005,376 weights in four bits.
    assert report["peak"]["kinds"]["quantized weights"] == 6_476_005_376 // 2
    assert 6.0 < report["peak"]["bytes"] / 2**30 < 7.0
    assert report["fits"]["verdict"] == "yes"
    assert report["traced_layers"] == [2, 3]
    assert plan(recipe, device="6GiB")["fits"]["verdict"] == "no"


def test_paged_states_are_set_apart_on_cuda(tiny_recipe: Callable[..., Recipe]) -> None:
    paged = plan(tiny_recipe(optimizer={"type": "paged_adamw_32bit"}), device="24GiB")
    plain = plan(tiny_recipe(optimizer={"type": "adamw"}), device="24GiB")
    assert "optimizer states" not in paged["peak"]["kinds"]
    states = plain["stages"]["step"]["kinds"]["optimizer states"]
    assert paged["stages"]["step"]["paged_bytes"] == states
    assert plain["stages"]["step"]["bytes"] - paged["stages"]["step"]["bytes"] == states


def test_the_first_batches_of_a_plan_are_the_largest_of_the_data(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    report = plan(tiny_recipe(), device="cpu")
    assert report["rows"]["from"] == "the data"
    (rows, longest), (_, second) = report["rows"]["micro_batches"][0]
    assert rows == 1  # two examples, end to end
    assert 2 * 20 < second <= longest < 2 * 96
    assert report["rows"]["steps"] == 4
    assert report["rows"]["tokens"] > 4 * 4 * 20


@pytest.mark.parametrize(
    ("name", "gibibytes"),
    [("24GiB", 24), ("80 GB", 74.5), ("nvidia rtx 4090", 23.5), ("h100", 79.1)],
)
def test_a_device_is_a_card_or_an_amount_of_memory(name: str, gibibytes: float) -> None:
    memory = find_target(name).memory_bytes
    assert memory is not None
    assert memory / 2**30 == pytest.approx(gibibytes, abs=0.1)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(RecipeError, match="--device: abacus is unknown"):
        find_target("abacus")


@pytest.mark.parametrize(
    ("name", "gibibytes", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "A100"),
        ("NVIDIA A100-PCIE-40GB", 39, "A100 40GB"),
        ("Tesla V100-SXM2-16GB", 16, "V100 16GB"),
        ("NVIDIA A10", 22, "A10"),
        ("NVIDIA A10G", 22, "A10G"),
        ("NVIDIA L4", 22, "L4"),
        ("NVIDIA L40S", 44, "L40S"),
        ("NVIDIA A40", 44, "A40"),
        ("NVIDIA RTX A4000", 16, None),
        ("NVIDIA RTX A6000", 47, "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47, "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", 23, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA GeForce RTX 3090 Ti", 23, None),
        ("NVIDIA H100 80GB HBM3", 79, "H100"),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(
    name: str, gibibytes: int, card: str | None
) -> None:
    found = known_card(name, gibibytes * 2**30)
    assert (found and found.name) == card


def test_bf16_by_name_is_refused_for_a_card_without_it(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(training={"precision": "bf16"})
    with pytest.raises(RecipeError, match="bf16 is not available on T4"):
        plan(recipe, device="T4")
    assert plan(recipe, device="A10")["fits"]["verdict"] == "yes"


def test_the_least_harmful_change_that_suffices_is_found(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe(
        model={"path": "meta-llama/Llama-3.2-1B"},
        data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 512},
        training={"batch_size": 8, "micro_batch_size": 8, "precision": "bf16"},
    )

    def changes(device: str) -> dict[str, Any] | None:
        report = plan(recipe, device=device, fit=True)
        is_enough = report["changes"] is not None
        assert (report["fits"]["verdict"] == "yes") is is_enough
        found: dict[str, Any] | None = report["changes"]
        return found

    assert changes("80GiB") == {}
    less = changes("8GiB")
    assert less is not None
    assert set(less) == {"training.micro_batch_size"}
    much_less = changes("3GiB")
    assert much_less is not None
    assert much_less["training.gradient_checkpointing"] is True
    assert much_less["quantization.type"] == "nf4"
    assert not {"optimizer.type", "data.max_length"} & set(much_less)
    assert changes("1GiB") is None


@pytest.mark.parametrize(
    ("optimizer", "on_card", "on_cpu"),
    [
        ("adamw", "paged_adamw_8bit", "adamw_8bit"),
        ("adamw_8bit", "paged_adamw_8bit", None),
        ("paged_adamw_32bit", "paged_adamw_8bit", "paged_adamw_8bit"),
        ("paged_adamw_8bit", None, None),
        ("lion", "paged_lion_8bit", "lion_8bit"),
        ("lion_8bit", "paged_lion_8bit", None),
        ("ademamix", "paged_ademamix_8bit", "ademamix_8bit"),
        ("adafactor", None, None),
        ("sgd", None, None),
        ("schedule_free_adamw", None, None),
        ("muon", None, None),
    ],
)
def test_the_optimizer_stays_the_same_algorithm(
    tiny_recipe: Callable[..., Recipe], optimizer: str, on_card: str | None, on_cpu: str | None
) -> None:
    recipe = tiny_recipe(optimizer={"type": optimizer})
    for device, wanted in (("T4", on_card), ("cpu", on_cpu)):
        *_, last = _levels(recipe, find_target(device))
        assert last.get("optimizer.type") == wanted


def test_the_line_that_fit_prints_gives_the_recipe_of_the_report(
    load: Callable[..., LoadedRecipe], minimal: str
) -> None:
    text = f"""{minimal}
optimizer:
  type: adamw
  learning_rate: 1e-5
  weight_decay: 0.1
  eps: 1e-9
  beta2: 0.95
  groups: [{{match: "it's|lora_A$", learning_rate: 3e-5}}]
"""
    recipe = load(text).recipe
    wanted = {
        "training.gradient_checkpointing": True,
        "quantization.type": "nf4",
        "optimizer.type": "paged_adamw_8bit",
        "training.micro_batch_size": 1,
    }
    options = shlex.split(set_line(_different(recipe, wanted)))
    assert options[::2] == ["--set"] * (len(options) // 2)
    found = load(text, *options[1::2]).recipe
    assert found == with_changes(recipe, wanted)
    assert found.optimizer.learning_rate == 1e-5
    assert found.optimizer.groups == recipe.optimizer.groups
    assert _different(recipe, {"optimizer.type": "adamw"}) == {}


def test_rows_are_not_cut_below_what_may_be_lost(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a" * 600}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 4, encoding="utf-8")
    data = {"train": {"path": str(path)}, "evaluation": None, "max_length": 1024}
    report = plan(tiny_recipe(data=data, training={"precision": "auto"}), device="0.1GiB", fit=True)
    assert report["changes"] is None
    assert report["rows"]["micro_batches"][0][0][1] > 600
    assert report["no_shorter"].startswith("data.max_length 512: ")
    assert "rows cannot be shorter: data.max_length 512" in plan_text(report)
    # What the recipe itself loses is an error, as it is in a run.
    with pytest.raises(DataError, match="answers are lost"):
        plan(tiny_recipe(data={**data, "max_length": 256}), device="0.1GiB", fit=True)


def test_to_fit_a_device_its_memory_has_to_be_known(tiny_recipe: Callable[..., Recipe]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the memory of the card here is known")
    with pytest.raises(RecipeError, match="not known how much memory"):
        plan(tiny_recipe(), device="cuda", fit=True)


def test_the_command_prints_a_plan(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(quantization={"type": "nf4"})
    report = output_of(capsys, "plan", path, "--device", "T4")
    assert report["device"]["name"] == "T4"
    assert report["peak"]["bytes"] == max(stage["bytes"] for stage in report["stages"].values())
    assert exit_code("plan", path, "--device", "T4") == 0
    text = capsys.readouterr().out
    assert "at the peak" in text
    assert "fits: yes" in text
    assert json.dumps(report["model"]["path"])[1:-1] in text


def test_auto_is_the_largest_micro_batch_that_fits(tiny_recipe: Callable[..., Recipe]) -> None:
    def planned(size: int | str, device: str) -> dict[str, Any]:
        recipe = tiny_recipe(
            data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 512},
            training={"batch_size": 12, "micro_batch_size": size},
        )
        return plan(recipe, device=device)

    four = planned(4, "80GiB")
    report = planned("auto", f"{four['process']['high'] / 2**30 + 1e-5:.6f}GiB")
    assert report["micro_batch"] == {"rows": 4, "is_auto": True}
    assert report["fits"]["verdict"] == "yes"
    assert report["rows"] == four["rows"]
    assert report["peak"]["bytes"] == four["peak"]["bytes"]
    assert "micro_batch_size: auto is 4" in plan_text(report)
    assert planned("auto", "0.1GiB")["micro_batch"]["rows"] == 1
    assert planned("auto", "80GiB")["micro_batch"]["rows"] == 12


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_one_of_several_holds_what_gradients_are_exchanged_in(
    tiny_recipe: Callable[..., Recipe], micro_batch_size: int
) -> None:
    """In place of the gradients, once the last micro-batch of a step has some."""
    settings = {"batch_size": 8, "micro_batch_size": micro_batch_size}
    recipe = tiny_recipe(adapter={"type": "full"}, training=settings)
    config, _ = recipe.model.read_config()
    target = find_target("T4", 2)
    rows = assume_rows(recipe, "a test", padding_free=False)
    rows = replace(rows, steps=[[rows.steps[0][0]] * (4 // micro_batch_size)])
    alone = forecast_recipe(recipe, config, replace(target, number=1), rows).peaks
    shared = forecast_recipe(recipe, config, target, rows).peaks
    assert shared.keys() == alone.keys()
    for segment, peak in shared.items():
        before = alone[segment]
        assert peak.total == sum(peak.kinds.values())
        if segment.stage not in (FIRST, STEP, EVALUATION):
            assert peak == before
            continue
        assert peak.kinds[BUCKETS] == peak.kinds[ADAPTER]
        if segment.part == "update":
            assert peak.total == before.total
        elif micro_batch_size == 2:
            assert peak.total == before.total + peak.kinds[BUCKETS]
        elif segment.part == "backward":
            assert peak.total <= before.total + peak.kinds[BUCKETS]
            assert peak.kinds[GRADIENTS] == 0


def choose_rows(_: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return rows[rows > 0]


def branch(self: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.up_proj(rows)) if rows.mean() > 0 else rows


def look_up(self: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return rows * [1.0, 2.0][int(rows.argmax())]


def list_them(_: LlamaMLP, rows: torch.Tensor) -> torch.Tensor:
    return rows * len(rows.tolist())


UNTRACEABLE = [choose_rows, branch, look_up, list_them]


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda one: one.__name__)
def test_what_cannot_be_traced_goes_by_a_formula_and_says_so(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, forward: Any
) -> None:
    recipe = tiny_recipe(quantization={"type": "nf4"}, training={"kernels": "plain"})
    traced = plan(recipe, device="T4")
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    report = plan(recipe, device="T4")
    assert traced["formula"] is None
    assert report["formula"]["why"].startswith("in LlamaMLP, it ")
    assert report["traced_layers"] == []
    assert report["model"] == traced["model"]
    assert report["adapter_bytes"] == traced["adapter_bytes"]
    assert report["checkpoint_bytes"] == traced["checkpoint_bytes"]
    # What goes by the shapes of weights is counted, and the same.
    step, truth = report["stages"]["step"], traced["stages"]["step"]
    counted = {*HELD, GRADIENTS}
    assert {k: v for k, v in step["kinds"].items() if k in HELD} == {
        k: v for k, v in truth["kinds"].items() if k in HELD
    }
    assert step["kinds"][GRADIENTS] == step["kinds"][ADAPTER]
    assert report["stages"]["load"] == traced["stages"]["load"]
    assert step["by_formula"]
    assert {*step["by_formula"]} == {*step["kinds"]} - counted
    assert truth["by_formula"] == []
    for moment in report["timeline"]:
        assert bool(moment["by_formula"]) == (
            moment["during"] != "update" and moment["stage"] != "load"
        )
    # The margin is wider, by the range that the formula has.
    stated = sum(step["kinds"][kind] for kind in step["by_formula"])
    low, high = (step["bytes"] + (end - 1) * stated for end in RANGE)
    assert report["process"]["low"] == pytest.approx(1.02 * low + 200 * 2**20, abs=2)
    assert report["process"]["high"] == pytest.approx(1.12 * high + 800 * 2**20, abs=2)


def test_what_goes_by_a_formula_is_marked_in_text_and_picture(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", choose_rows)
    recipe, page = write_recipe(training={"kernels": "plain"}), tmp_path / "plan.html"
    assert exit_code("plan", recipe, "--device", "T4", "--html", page) == 0
    text = capsys.readouterr().out
    assert "not traced: in LlamaMLP, it chooses rows by what it has computed" in text
    marked = [line for line in text.splitlines() if line.endswith("by formula")]
    assert any("saved activations" in line for line in marked)
    assert not any("gradients" in line for line in marked)
    drawn = ElementTree.fromstring(page.read_text().removeprefix("<!doctype html>"))
    cells = [["".join(cell.itertext()) for cell in row] for row in drawn.iter("tr")]
    known = {row[0]: row[3] for row in cells[1:] if len(row) > 3}
    assert known["saved activations"] == "a formula"
    assert known["trained weights"] == "the trace"
    assert "LlamaMLP" in "".join(drawn.itertext())
    assert exit_code("plan", recipe, "--device", "T4", "--table") == 0
    table = capsys.readouterr().out
    assert "~ partly by a formula, as the model cannot be traced: in LlamaMLP" in table


# Wide enough that activations are most of it, as in models that anybody trains.
WIDE = {**LAYERS, "hidden_size": 256, "intermediate_size": 688, "head_dim": 64, "vocab_size": 4000}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=4, **WIDE),
        Gemma2Config(num_hidden_layers=4, sliding_window=16, **WIDE),
        GPTNeoXConfig(
            num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
            vocab_size=4000,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_formula_is_in_its_range(
    tiny_recipe: Callable[..., Recipe],
    config: PretrainedConfig,
    checkpointing: bool,
    adapter: str,
) -> None:
    recipe = tiny_recipe(
        adapter={"type": adapter},
        training={"gradient_checkpointing": checkpointing, "kernels": "plain"},
    )
    full = full_batch(2, 256, padding_free=False)
    batches: dict[str, Any] = {"steps": [[full, full]], "held_out": full}
    traced = forecast(recipe, config, torch.bfloat16, device="cpu", kernels="plain", **batches)
    said = by_formula(recipe, config, torch.bfloat16, device="cpu", why="of a test", **batches)
    _, found = said.peak(STEP)
    stated = sum(found.kinds[kind] for kind in FORMULA if kind in found.kinds)
    truth = traced.peak(STEP)[1].total - (found.total - stated)
    assert RANGE[0] <= truth / stated <= RANGE[1]
    assert said.trained_weights == traced.trained_weights
    assert said.flops[STEP] == pytest.approx(traced.flops[STEP], rel=0.3)


def test_of_the_experts_of_a_mixture_a_token_meets_some() -> None:
    config = Qwen3MoeConfig(
        num_hidden_layers=1, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, **WIDE
    )
    model = outline(config, torch.bfloat16)
    layer = Layer.of(model.model.layers[0], config, scored=0)
    attention = 2 * (256 + 256) + 2 * (256 + 128)  # q and out; k and v: two heads of 64
    experts = 2 * ((256 + 2 * 128) + (128 + 256))  # gate and up in one, and down
    assert layer.values == attention + experts + (256 + 8)
    assert layer.weights == 2 * 256 * 256 + 2 * 256 * 128 + 2 * 3 * 256 * 128 + 256 * 8
    assert layer.normed == 2 * 256 + 2 * 64


def test_of_a_model_that_cannot_even_be_built_nothing_is_said(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: LlamaMLP, _: LlamaConfig) -> None:
        super(LlamaMLP, self).__init__()
        raise ValueError("no such activation")

    monkeypatch.setattr(LlamaMLP, "__init__", build)
    with pytest.raises(ModelError, match="in LlamaMLP, no such activation") as caught:
        plan(tiny_recipe(), device="T4")
    assert "nothing is estimated in its place" in str(caught.value.hint)


def test_steps_may_read_what_a_model_may_not() -> None:
    model = torch.nn.Linear(4, 4)
    refuse_decisions(model)
    some = TracedTensor(torch.ones(2, device="meta"))
    assert some.tolist() == [1.0, 1.0]
    model.register_forward_pre_hook(lambda *_: some.tolist() and None)
    with pytest.raises(NotImplementedError, match="by the values"):
        model(torch.ones(1, 4))
    assert float(some.sum()) == 1.0


@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
def test_compiled_kernels_take_less_than_fused_ones(
    tiny_recipe: Callable[..., Recipe], checkpointing: bool | str
) -> None:
    """Held against the allocator in `benchmarks/plan_validation.md`."""
    recipe = tiny_recipe(training={"gradient_checkpointing": checkpointing})
    config = LlamaConfig(num_hidden_layers=3, **WIDE)
    full = full_batch(2, 256, padding_free=True)

    def peak(kernels: Kernels) -> int:
        found = forecast(
            recipe, config, torch.bfloat16, device="cpu",
            steps=[[full, full]], held_out=None, kernels=kernels,
        )  # fmt: skip
        return found.peak(STEP)[1].total

    assert peak("compiled") < peak("fused")


def test_kernels_are_those_that_a_run_of_this_length_gets(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_cli.kernels.selection.has_compiler", lambda _: True)
    recipe = tiny_recipe()
    config, _ = recipe.model.read_config()
    target = find_target("cpu")
    rows = assume_rows(recipe, "a test", padding_free=True)

    def kernels(tokens: int | None, wanted: str = "auto") -> str:
        one = tiny_recipe(training={"kernels": wanted})
        return foresee_kernels(one, config, target, replace(rows, tokens=tokens))

    assert kernels(1000) == "fused"
    assert kernels(10**12) == "compiled"
    assert kernels(None) == "fused"
    assert kernels(10**12, "plain") == "plain"
    assert kernels(1, "compiled") == "compiled"


def test_time_is_a_range_of_a_rate_and_no_less_than_reading_the_weights(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    def seconds(size: int) -> list[float]:
        recipe = tiny_recipe(
            model={"path": "meta-llama/Llama-3.2-1B"},
            data={"train": {"path": "nowhere.jsonl"}, "evaluation": None, "max_length": 8},
            training={"batch_size": 8, "micro_batch_size": size, "max_steps": 10},
            quantization={"type": "none"},
        )
        report = plan(recipe, device="H100")
        assert report["rate"] == {"flops": 989e12, "used": (0.15, 0.45), "is_measured": False}
        assert "15% to 45% of" in plan_text(report)
        found: list[float] = report["seconds_of_training"]
        return found

    # Rows of eight tokens are little to compute: the weights are read once more for each.
    for one, two in zip(seconds(1), seconds(2), strict=True):
        assert one == pytest.approx(2 * two)


def test_auto_needs_a_device_of_known_memory(tiny_recipe: Callable[..., Recipe]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the memory of the card here is known")
    with pytest.raises(RecipeError, match="auto goes by the memory"):
        plan(tiny_recipe(training={"micro_batch_size": "auto"}), device="cuda")


def test_the_picture_is_of_the_figures_of_the_plan(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe(
        quantization={"type": "nf4"}, optimizer={"type": "paged_adamw_8bit"}, data={"packing": True}
    )
    page = tmp_path / "plan.html"
    report = output_of(capsys, "plan", recipe, "--device", "T4", "--html", page)
    for stage, entry in report["stages"].items():
        moments = [m for m in report["timeline"] if m["stage"] == stage]
        assert max(m["bytes"] for m in moments) == entry["bytes"]
        assert all(sum(m["kinds"].values()) == m["bytes"] for m in moments)
    parts = [m["during"] for m in report["timeline"] if (m["stage"], m["turn"]) == ("step", 1)]
    assert parts == sorted(parts, key=["forward", "backward", "between", "update"].index)

    text = page.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    assert not [one.tag for one in root.iter() if one.tag in ("script", "link", "img")]
    assert "http:" not in text
    assert "https:" not in text
    cells = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    sizes = {row[0]: int(row[2].replace(",", "")) for row in cells[1:]}
    assert sizes.pop("all tensors") == sum(sizes.values()) == report["peak"]["bytes"]
    assert {k: v for k, v in sizes.items() if v} == report["peak"]["kinds"]
    drawn = {shape.findtext("title") for shape in root.iter("polygon")}
    assert set(report["peak"]["kinds"]) <= drawn <= set(sizes)
    assert "T4 has 14.60 GiB, which is beyond the picture" in text
    told = root.find(".//desc")
    assert told is not None
    assert str(report["peak"]["stage"]) in str(told.text)


def test_the_highest_point_of_the_picture_is_the_peak(tiny_recipe: Callable[..., Recipe]) -> None:
    report = plan(tiny_recipe(), device="T4")
    memory = report["peak"]["bytes"] * 2
    root = ElementTree.fromstring(
        plan_page(
            {**report, "device": {**report["device"], "bytes": memory}}, title="t"
        ).removeprefix("<!doctype html>")
    )
    ys = [float(c.split(",")[1]) for p in root.iter("polygon") for c in p.attrib["points"].split()]
    zero, peak, device = (float(line.attrib["y1"]) for line in root.iter("line"))
    assert min(ys) == peak
    assert max(ys) == zero
    assert zero - device == pytest.approx(2 * (zero - peak), rel=1e-2)


def test_a_table_compares_methods(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = output_of(capsys, "plan", write_recipe(), "--device", "24GiB", "--table")
    assert list(report["methods"]) == ["full", "LoRA", "8-bit LoRA", "QLoRA", "bottleneck"]
    for cells in report["methods"].values():
        sizes = [cell["tensors"] for cell in cells.values()]
        assert len(sizes) == 4
        assert sizes == sorted(sizes)
    assert report["methods"]["full"]["512"]["tensors"] > report["methods"]["LoRA"]["512"]["tensors"]


def test_a_table_is_made_of_a_recipe_whose_groups_are_those_of_its_adapter(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_cli.plan.plan.LENGTHS", (64,))
    group = {"match": "lora_A", "learning_rate": 1e-3}
    recipe = tiny_recipe(optimizer={"type": "adamw", "lora_plus_ratio": 16, "groups": [group]})
    methods = plan_table(recipe, device="24GiB")["methods"]
    sizes = {method: cells[64]["tensors"] for method, cells in methods.items()}
    assert sizes["full"] > sizes["LoRA"] > sizes["QLoRA"] > 0


@pytest.mark.parametrize("option", ["--fit", "--gpus", "--html"])
def test_what_a_table_would_drop_is_refused_beside_it(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    option: str,
) -> None:
    values: dict[str, list[object]] = {"--gpus": [2], "--html": [tmp_path / "plan.html"]}
    value = values.get(option, [])
    assert exit_code("plan", write_recipe(), "--device", "24GiB", "--table", option, *value) == 2
    assert f"{option}: a table " in capsys.readouterr().err
