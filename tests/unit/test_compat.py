from pathlib import Path

import bitsandbytes.functional as bnb_functional
import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from qlora_cli.adapters import LoRA
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.quantization import FourBit, Int8
from tests.conftest import save_tiny_model

INPUT = torch.arange(1, 13)[None]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough, and in bfloat16, for the inference kernel to take its weights."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return save_tiny_model(folder, dtype="bfloat16", hidden_size=128, intermediate_size=256)


def gradient_norms(folder: Path, *, evaluate: bool, is_cured: bool) -> list[float]:
    model = BaseModelConfig(path=str(folder)).load(
        FourBit().load_options(torch.bfloat16), torch.device("cpu")
    )
    for module in model.modules():
        if isinstance(module, Linear4bit) and not is_cured:
            module.support_avx512bf16_for_cpu = bnb_functional.has_avx512bf16()
    torch.manual_seed(0)
    # The other layers are bitsandbytes' own, and the gradient passes them.
    adapted = LoRA(r=4, target_modules=["q_proj"]).attach(model)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if evaluate:
        adapted.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            adapted(input_ids=INPUT)
        adapted.train()
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=INPUT, labels=INPUT).loss.backward()
    return [float(p.grad.norm()) for p in adapted.parameters() if p.grad is not None]


def test_an_evaluation_does_not_change_the_gradients_of_a_4_bit_model(wide_model: Path) -> None:
    before = gradient_norms(wide_model, evaluate=False, is_cured=True)
    after = gradient_norms(wide_model, evaluate=True, is_cured=True)
    assert after == before


@pytest.mark.skipif(
    not bnb_functional.has_avx512bf16(), reason="the fault is in a kernel for AVX512-BF16"
)
# torch warns that this kernel has no gradient, which is the fault itself.
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit.*:UserWarning")
def test_the_shim_is_still_needed(wide_model: Path) -> None:
    before = gradient_norms(wide_model, evaluate=False, is_cured=False)
    after = gradient_norms(wide_model, evaluate=True, is_cured=False)
    assert after != before, "bitsandbytes is mended: delete keep_4bit_weights_trainable()"


def test_dora_in_8_bit_still_needs_a_layer_of_ours(tiny_model: Path) -> None:
    """With ours it trains, as the contract shows."""
    model = BaseModelConfig(path=str(tiny_model)).load(
        Int8().load_options(torch.float32), torch.device("cpu")
    )
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"])
    )
    adapted(input_ids=INPUT)
    with pytest.raises(AttributeError, match="unsqueeze"):
        adapted(input_ids=INPUT)
