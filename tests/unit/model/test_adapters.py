import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.kernels.decoder_layer import can_fuse
from qlora_cli.model.adapters import (
    IA3,
    OFT,
    AdapterConfig,
    AnyOfPeft,
    BitFit,
    Bottleneck,
    Freeze,
    FullFineTune,
    LoHa,
    LoKr,
    LoRA,
    VeRA,
)
from qlora_cli.model.base import BaseModelConfig, start_checkpointing
from qlora_cli.model.edits import build_skeleton
from qlora_cli.model.names import Names
from qlora_cli.model.quantization import Fp4, Int8, Nf4
from qlora_cli.model.shards import Shards
from qlora_cli.recipe import Recipe
from tests.conftest import save_tiny_model

KINDS = {"nf4": Nf4(), "fp4": Fp4(), "int8": Int8()}
INPUT = torch.arange(1, 13)[None]


def peft_method(peft_type: Any, **config: Any) -> AnyOfPeft:
    return AnyOfPeft(peft_type=peft_type, target_modules=["q_proj", "down_proj"], config=config)


# One instance of each class of the union, and of each option that changes the mathematics.
ADAPTERS = {
    "full": FullFineTune(),
    "lora": LoRA(r=4),
    "lora-regex": LoRA(r=4, target_modules=r".*self_attn\.(q|v)_proj"),
    "lora-excluded": LoRA(r=4, exclude_modules=["down_proj"]),
    "rslora": LoRA(r=4, use_rslora=True),
    "dora": LoRA(r=4, use_dora=True),
    "patterns": LoRA(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 5}),
    "modules-to-save": LoRA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "lora-layers": LoRA(r=4, layers_to_transform=[1]),
    "freeze": Freeze(last_layers=1, patterns=["norm", "lm_head"]),
    "bitfit": BitFit(),
    "ia3": IA3(),
    "vera": VeRA(r=8),
    "loha": LoHa(r=4),
    "lokr": LoKr(r=4, decompose_factor=4),
    "oft": OFT(oft_block_size=8),
    "houlsby": Bottleneck(size=4),
    "pfeiffer": Bottleneck(size=4, after=["feed_forward"], activation="relu"),
    "tokens": LoRA(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "randlora": peft_method("randlora", r=4),
    "fourierft": peft_method("fourierft", n_frequency=16, init_weights=True),
    "miss": peft_method("miss", r=4),
    "road": peft_method("road", group_size=16),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("biased") / "model"
    return save_tiny_model(folder, attention_bias=True, mlp_bias=True)


@pytest.fixture
def tiny_model(request: pytest.FixtureRequest, tiny_model: Path, biased_model: Path) -> Path:
    """The usual one, but for what trains biases: it has none."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return biased_model if isinstance(parameters.get("adapter"), BitFit) else tiny_model


@pytest.fixture(autouse=True)
def seed() -> None:
    """What is drawn does not depend on the tests before."""
    torch.manual_seed(0)


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=INPUT).logits
    return result


def train_a_little(model: torch.nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(2):
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_class_of_the_union_is_under_contract() -> None:
    assert {type(a) for a in ADAPTERS.values()} == set(get_args(get_args(AdapterConfig)[0]))


@each_adapter
def test_attaching_changes_nothing_yet(tiny_model: Path, adapter: LoRA) -> None:
    before = logits(load(tiny_model))
    after = logits(adapter.attach(load(tiny_model)).eval())
    # DoRA recomputes the norm of each weight row: float32 rounding.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@each_adapter
def test_only_trained_weights_change_and_all_of_them_do(tiny_model: Path, adapter: LoRA) -> None:
    model = adapter.attach(load(tiny_model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_a_little(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed


@each_adapter
def test_trained_weights_are_float32_on_a_bfloat16_base(tiny_model: Path, adapter: LoRA) -> None:
    model = adapter.attach(load(tiny_model).bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@each_adapter
def test_what_is_saved_is_what_is_loaded(tiny_model: Path, adapter: LoRA, tmp_path: Path) -> None:
    model = adapter.attach(load(tiny_model))
    train_a_little(model)
    adapter.save(model, tmp_path)
    restored = adapter.load(load(tiny_model), tmp_path).eval()
    assert torch.equal(logits(restored), logits(model.eval()))


@each_adapter
def test_edits_keep_the_function(tiny_model: Path, adapter: LoRA, tmp_path: Path) -> None:
    model = adapter.attach(load(tiny_model))
    train_a_little(model)
    adapter.save(model, tmp_path)
    if adapter.no_merge:
        with pytest.raises(ModelError, match=adapter.no_merge):
            adapter.edits(load(tiny_model), Any, tmp_path)
        return
    plain = load(tiny_model)
    weights = dict(plain.named_parameters())
    skeleton = build_skeleton(tiny_model, trust_remote_code=False)
    names = Names(skeleton, Shards(tiny_model).tensors)
    edits = adapter.edits(skeleton, names, tmp_path)
    changed = {name: edits.apply(name, lambda name: weights[name].clone()) for name in edits.names}
    assert not edits.unused()
    for name, value in changed.items():
        weights[name].data.copy_(value)
    torch.testing.assert_close(logits(plain), logits(model.eval()), rtol=0, atol=2e-5)


def test_names_are_saved_in_an_order_that_each_process_comes_to(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = LoRA(exclude_modules=["lm_head", "up_proj", "embed_tokens"])
    adapter.save(adapter.attach(load(tiny_model)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(config["target_modules"]) == 14
    for key in ("target_modules", "exclude_modules"):
        assert config[key] == sorted(config[key])


def test_plain_peft_loads_a_saved_adapter(tiny_model: Path, tmp_path: Path) -> None:
    adapter = LoRA(r=4, use_rslora=True)
    model = adapter.attach(load(tiny_model))
    train_a_little(model)
    adapter.save(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(load(tiny_model), tmp_path)
    assert torch.equal(logits(plain.eval()), logits(model.eval()))


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"target_modules": ["q_porj"]}, "adapter.target_modules: 'q_porj' matches no", "q_proj"),
        ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no module", None),
        ({"target_modules": r".*\.qproj"}, r"'.*\\.qproj' matches no module", None),
        ({"target_modules": "*broken"}, "is no regular expression", None),
        ({"exclude_modules": ["dwn_proj"]}, "adapter.exclude_modules: 'dwn_proj'", "down_proj"),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save: 'lm_haed'", "lm_head"),
        ({"rank_pattern": {"k_prj": 2}}, "adapter.rank_pattern: 'k_prj'", "k_proj"),
        ({"alpha_pattern": {"k_prj": 2}}, "adapter.alpha_pattern: 'k_prj'", "k_proj"),
    ],
)
def test_a_name_that_matches_nothing_stops_and_lists_near_names(
    tiny_model: Path, changes: dict[str, object], message: str, hint: str | None
) -> None:
    with pytest.raises(ModelError) as caught:
        LoRA(**changes).attach(load(tiny_model))
    assert message in str(caught.value)
    assert hint is None or (caught.value.hint is not None and hint in caught.value.hint)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_proj"], "unexpected: .*v_proj"), (["q_proj", "v_proj", "k_proj"], "missing: .*k_proj")],
)
def test_an_adapter_whose_tensors_and_config_disagree_is_refused(
    tiny_model: Path, tmp_path: Path, targets: list[str], message: str
) -> None:
    adapter = LoRA(r=4, target_modules=["q_proj", "v_proj"])
    adapter.save(adapter.attach(load(tiny_model)), tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "target_modules": targets}), encoding="utf-8")
    with pytest.raises(ModelError, match=f"does not fit the base model; {message}"):
        adapter.load(load(tiny_model), tmp_path)


def test_modules_trained_in_full_on_a_16_bit_base_are_loaded_unrounded(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = LoRA(r=4, modules_to_save=["lm_head"])
    model = adapter.attach(load(tiny_model).bfloat16())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter) * 1e-3)
    adapter.save(model, tmp_path)
    restored = adapter.load(load(tiny_model).bfloat16(), tmp_path)
    for (name, before), (_, after) in zip(
        model.named_parameters(), restored.named_parameters(), strict=True
    ):
        assert torch.equal(before, after), name


@each_adapter
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_base_trains_and_is_loaded_again_or_is_refused(
    tiny_model: Path, adapter: LoRA, quantization: str, tmp_path: Path
) -> None:
    def base() -> Any:
        options = KINDS[quantization].load_options(torch.float32)
        return BaseModelConfig(path=str(tiny_model)).load(options, torch.device("cpu"))

    if quantization in adapter.no_quantization:
        sections = {
            "model": {"path": "x"},
            "data": {"train": {"path": "x"}},
            "output": {"dir": "x"},
        }
        with pytest.raises(ValidationError, match=adapter.no_quantization[quantization]):
            Recipe.model_validate(
                {**sections, "adapter": adapter, "quantization": {"type": quantization}}
            )
        return
    if adapter.type == "freeze" or (adapter.type == "lora" and adapter.use_dora):
        adapter = adapter.model_copy(update={"last_layers": 0, "use_dora": False})
    model = adapter.attach(base())
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_a_little(model)
    for name, weight in model.named_parameters():
        assert name not in trained or not torch.equal(weight, trained[name]), name
    adapter.save(model, tmp_path)
    restored = adapter.load(base(), tmp_path).eval()
    assert torch.equal(logits(restored), logits(model.eval()))


@each_adapter
def test_checkpointing_gives_the_same_gradients(tiny_model: Path, adapter: LoRA) -> None:
    def gradients(*, checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = load(tiny_model).train()
        model = adapter.attach(base)
        train_a_little(model)  # else some are still zero
        if checkpointing:
            start_checkpointing(base)
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@each_adapter
def test_fused_layers_are_for_ordinary_lora_alone(tiny_model: Path, adapter: LoRA) -> None:
    model = adapter.attach(load(tiny_model))
    layers = [layer for layer in model.modules() if type(layer).__name__ == "LlamaDecoderLayer"]
    own = {id(p) for layer in layers for p in layer.parameters() if p.requires_grad}
    low_rank = {id(p) for n, p in model.named_parameters() if ".lora_" in n}
    is_ordinary = adapter.type == "lora" and not adapter.use_dora and own <= low_rank
    fused = sum(can_fuse(layer) for layer in layers)
    touched = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]
    assert fused == (len(layers) if is_ordinary else len(layers) - len(touched))


# PEFT warns of any adapter near tied weights; that they stay tied is what is shown.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@each_adapter
def test_tied_weights_stay_tied(tmp_path: Path, adapter: LoRA) -> None:
    tied = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    folder = save_tiny_model(tmp_path / "tied", **tied)
    model = adapter.attach(load(folder))
    train_a_little(model)
    saved = tmp_path / "saved"
    saved.mkdir()
    adapter.save(model, saved)
    restored = adapter.load(load(folder), saved).eval()
    assert torch.equal(logits(restored), logits(model.eval()))


@pytest.mark.parametrize("after", [["attention", "feed_forward"], ["feed_forward"]])
def test_a_bottleneck_has_as_many_weights_as_the_paper_says(after: list[Any]) -> None:
    """Section 2.1 of Houlsby et al.: 2md + d + m for each adapter, on 24 layers of width 1024. With
    64 units that is the paper's 2.1 % (table 1) of what such layers have."""
    config = GPT2Config(n_layer=24, n_embd=1024, n_head=16)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    own = sum(p.numel() for p in base.transformer.h.parameters())
    model = Bottleneck(size=64, after=after).attach(base)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 24 * len(after) * (2 * 64 * 1024 + 64 + 1024)
    assert round(100 * trained / own, 1) == (2.1 if len(after) == 2 else 1.0)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (AnyOfPeft(peft_type="miss", target_modules=["q_proj"], config={"rr": 2}), "no 'rr'"),
        (AnyOfPeft(peft_type="miss", config={"peft_type": "LORA"}), "no 'peft_type'"),
        (BitFit(), "trains biases, and this model has none"),
        (Freeze(last_layers=3), "the model has 2 layers"),
        (Freeze(last_layers=0), "nothing would be trained"),
        (Freeze(patterns=["nomr"]), "'nomr' is found in no weight"),
        (LoRA(layers_to_transform=[2]), "the model has no layer 2; it has 0 to 1"),
        (LoRA(trainable_token_indices=[999]), "there is no token 999"),
        (LoRA(target_parameters=["experts.up"]), "'experts.up' matches no"),
        (Bottleneck(target_modules=["q_porj"]), "'q_porj' matches no module"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    adapter: LoRA, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        adapter.attach(load(save_tiny_model(tmp_path / "model")))


def test_a_number_beyond_the_tensors_is_refused_before_it_takes_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = Bottleneck(size=4)
    adapter.save(adapter.attach(load(tiny_model)), tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "size": 2**40}), encoding="utf-8")
    with pytest.raises(ModelError, match="more than any side of the tensors"):
        adapter.load(load(tiny_model), tmp_path)


def test_the_page_of_methods_is_what_the_classes_say() -> None:
    script = Path(__file__).parents[3] / "scripts" / "gen_methods.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
