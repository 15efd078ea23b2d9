import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from qlora_cli.adapters import BitFit, Bottleneck, Freeze, LoRA, OtherPeft
from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.peft_edits import MERGEABLE
from qlora_cli.common.config import Config
from qlora_cli.errors import ModelError
from qlora_cli.kernels.fusible import why_not_fused
from tests.conftest import save_tiny_model
from tests.contract.subjects import BASES, CLASSES, SUBJECTS, Subject

INPUT = torch.arange(1, 13)[None]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make random values independent of earlier tests."""
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


def test_names_are_saved_in_the_same_order_in_each_process(
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
        ({"target_modules": "*broken"}, "is not a valid regular expression", None),
        ({"exclude_modules": ["dwn_proj"]}, "adapter.exclude_modules: 'dwn_proj'", "down_proj"),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save: 'lm_haed'", "lm_head"),
        ({"rank_pattern": {"k_prj": 2}}, "adapter.rank_pattern: 'k_prj'", "k_proj"),
        ({"alpha_pattern": {"k_prj": 2}}, "adapter.alpha_pattern: 'k_prj'", "k_proj"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_similar_names(
    tiny_model: Path, changes: dict[str, object], message: str, hint: str | None
) -> None:
    with pytest.raises(ModelError) as caught:
        LoRA(**changes).attach(load(tiny_model))
    assert message in str(caught.value)
    assert hint is None or (caught.value.hint is not None and hint in caught.value.hint)


# PEFT warns of the missing tensors that these cases remove; our error is tested.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_proj"], "unexpected: .*v_proj"), (["q_proj", "v_proj", "k_proj"], "missing: .*k_proj")],
)
def test_an_adapter_whose_tensors_do_not_match_its_config_is_refused(
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


LLAMAS = {name: one for name, one in SUBJECTS.items() if one.base in ("llama", "biased")}


@pytest.mark.parametrize("subject", LLAMAS.values(), ids=LLAMAS)
def test_only_ordinary_lora_uses_fused_layers(subject: Subject, tmp_path: Path) -> None:
    adapter = subject.adapter
    model = adapter.attach(load(save_tiny_model(tmp_path / "model", **BASES[subject.base])))
    layers = [layer for layer in model.modules() if type(layer).__name__ == "LlamaDecoderLayer"]
    own = {id(p) for layer in layers for p in layer.parameters() if p.requires_grad}
    low_rank = {id(p) for n, p in model.named_parameters() if ".lora_" in n}
    dora = adapter.type == "lora" and adapter.use_dora
    is_ordinary = adapter.type in ("lora", "adalora") and not dora and own <= low_rank
    fused = sum(why_not_fused(layer) is None for layer in layers)
    touched = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]
    assert fused == (len(layers) if is_ordinary else len(layers) - len(touched))


@pytest.mark.parametrize("after", [["attention", "feed_forward"], ["feed_forward"]])
def test_a_bottleneck_has_as_many_weights_as_the_paper_says(after: list[Any]) -> None:
    """Houlsby et al., section 2.1: 2md + d + m weights per adapter, on 24 layers of width 1024.
    With 64 units that is the paper's 2.1 % (table 1) of the weights of such layers."""
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
        (
            OtherPeft(peft_type="miss", target_modules=["q_proj"], config={"rr": 2}),
            "'rr' is not a setting",
        ),
        (OtherPeft(peft_type="miss", config={"peft_type": "LORA"}), "'peft_type' is not a setting"),
        (BitFit(), "trains biases, and this model has none"),
        (Freeze(last_layers=3), "the model has 2 layers"),
        (Freeze(last_layers=0), "nothing would be trained"),
        (Freeze(patterns=["nomr"]), "'nomr' matches no weight"),
        (LoRA(layers_to_transform=[2]), "the model has no layer 2; its layers are 0 to 1"),
        (
            LoRA(layers_to_transform=[1], target_modules=".*q_proj"),
            "selects layers only for a list of names",
        ),
        (
            Bottleneck(layers_to_transform=[1], target_modules=".*o_proj"),
            "selects layers only for a list of names",
        ),
        (
            LoRA(layers_to_transform=[1], target_parameters=["q_proj.weight"]),
            "selects layers only for modules",
        ),
        (LoRA(freeze_a=True, target_modules=["q_proj", "embed_tokens"]), "embed_tokens is not one"),
        (LoRA(trainable_token_indices=[999]), "the model has no token 999"),
        (LoRA(target_parameters=["experts.up"]), "'experts.up' matches no"),
        (Bottleneck(target_modules=["q_porj"]), "'q_porj' matches no module"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    adapter: LoRA, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        adapter.attach(load(save_tiny_model(tmp_path / "model")))


def test_a_size_beyond_the_tensors_is_refused_before_it_takes_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = Bottleneck(size=4)
    adapter.save(adapter.attach(load(tiny_model)), tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "size": 2**40}), encoding="utf-8")
    with pytest.raises(ModelError, match="larger than any side of the tensors"):
        adapter.load(load(tiny_model), tmp_path)


def test_the_list_of_mergeable_types_matches_the_methods() -> None:
    fields = [
        method.model_fields.get("peft_type") or method.model_fields["type"]
        for method in CLASSES
        if method.peft_config is not AdapterMethod.peft_config and not method.no_merge
    ]
    assert sorted(n.upper() for f in fields for n in get_args(f.annotation)) == list(MERGEABLE)


@pytest.mark.parametrize("method", CLASSES)
def test_a_method_inherits_only_from_the_base_of_methods(method: type[Config]) -> None:
    assert method.__mro__[1:3] == (AdapterMethod, Config)


def test_the_page_of_methods_is_current() -> None:
    script = Path(__file__).parents[3] / "scripts" / "gen_methods.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
