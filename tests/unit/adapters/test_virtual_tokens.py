"""Virtual tokens at the decoder: callers of the model need not know of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from qlora_cli.adapters import LoRA, PrefixTuning, PromptTuning
from qlora_cli.adapters.switch import AdapterSet
from qlora_cli.errors import DataError, ModelError
from qlora_cli.inference.sampling import Sampling, TextGenerator
from qlora_cli.inference.session import open_session
from qlora_cli.models.context import context_of
from qlora_cli.objectives.supervised import TokenLoss
from qlora_cli.plan.compatibility import refuse_long_rows
from qlora_cli.recipe.schema import Recipe
from qlora_cli.types import IGNORE_INDEX, Batch, ModelContext
from qlora_cli.types import Prompt as Question
from tests.conftest import make_tokenizer

NUMBER = 5
METHODS = [PromptTuning(num_virtual_tokens=NUMBER), PrefixTuning(num_virtual_tokens=NUMBER)]
each_method = pytest.mark.parametrize("method", METHODS, ids=["prompt", "prefix"])
IDS = torch.arange(1, 13).view(2, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def logits(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


@each_method
def test_plain_peft_computes_the_same_from_a_saved_folder(
    tiny_model: Path, method: Any, tmp_path: Path
) -> None:
    model = method.attach(load(tiny_model)).eval()
    method.save(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(load(tiny_model), tmp_path).eval()
    with torch.no_grad():
        options = {} if method.type == "prompt" else {"use_cache": True}
        expected = plain(input_ids=IDS, attention_mask=MASK, **options).logits[:, -6:]
    real = MASK.bool()
    torch.testing.assert_close(logits(model)[real], expected[real], rtol=0, atol=1e-5)
    assert logits(model).shape == (2, 6, 260)


@each_method
def test_a_row_without_a_mask_equals_the_row_in_a_batch(tiny_model: Path, method: Any) -> None:
    model = method.attach(load(tiny_model)).eval()
    alone = logits(model, IDS[1:, :4], None)
    torch.testing.assert_close(logits(model)[1:, :4], alone, rtol=0, atol=1e-5)


def test_a_prompt_initially_acts_like_words_before_the_row(tiny_model: Path) -> None:
    base = load(tiny_model)
    model = PromptTuning(num_virtual_tokens=3).attach(load(tiny_model)).eval()
    words = torch.tensor([7, 70, 170])
    table = base.get_input_embeddings().weight
    model.prompt_encoder["default"].embedding.weight.data.copy_(table[words])
    written = torch.cat([words.expand(2, -1), IDS], 1)
    expected = logits(base, written, None)[:, 3:]
    torch.testing.assert_close(logits(model, IDS, None), expected, rtol=0, atol=1e-5)


def test_a_prefix_initially_acts_like_words_before_the_row(tiny_model: Path) -> None:
    base = load(tiny_model)
    torch.manual_seed(3)
    model = PrefixTuning(num_virtual_tokens=3).attach(load(tiny_model)).eval()
    torch.manual_seed(3)
    # PEFT first draws values that are then replaced.
    torch.nn.Embedding(3, 2 * 2 * 16)
    words = torch.randint(260, (1, 3))
    written = torch.cat([words.expand(2, -1), IDS], 1)
    expected = logits(base, written, None)[:, 3:]
    torch.testing.assert_close(logits(model, IDS, None), expected, rtol=0, atol=1e-5)


@each_method
def test_a_disabled_adapter_computes_the_base(tiny_model: Path, method: Any) -> None:
    expected = logits(load(tiny_model))
    model = method.attach(load(tiny_model)).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected, atol=1e-2)


@each_method
def test_the_loss_uses_the_labels_unchanged(tiny_model: Path, method: Any) -> None:
    model = method.attach(load(tiny_model))
    labels = torch.where(MASK.bool(), IDS, IGNORE_INDEX)
    objective = TokenLoss(model, torch.float32)
    assert objective.token_losses.is_split
    loss, _ = objective(Batch(IDS, MASK, labels))
    expected = torch.nn.functional.cross_entropy(
        logits(model)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)


@each_method
def test_answers_equal_repeated_forwards(tiny_model: Path, method: Any) -> None:
    """Generate in a batch with left padding and a cache, and compare with plain forwards."""
    model = method.attach(load(tiny_model)).eval()
    tokenizer = make_tokenizer()
    questions = [Question(IDS[0].tolist(), "", ""), Question(IDS[1, :3].tolist(), "", "")]
    generator = TextGenerator(model, tokenizer, [259], torch.float32, torch.device("cpu"))
    found = generator.complete(questions, Sampling(max_new_tokens=6), batch_size=2)
    for index, answer in found:
        ids = list(questions[index].input_ids)
        for _ in range(6):
            ids.append(int(logits(model, torch.tensor([ids]), None)[0, -1].argmax()))
            if ids[-1] == 259:
                ids.pop()
                break
        written = tokenizer.decode(ids[len(questions[index].input_ids) :], skip_special_tokens=True)
        assert answer.text == written


@each_method
def test_several_can_be_swapped_on_one_base(tiny_model: Path, method: Any, tmp_path: Path) -> None:
    expected, base = {}, load(tiny_model)
    plain = logits(base)
    for name in ("one", "two"):
        model = method.attach(load(tiny_model)).eval()
        (tmp_path / name).mkdir()
        method.save(model, tmp_path / name)
        expected[name] = logits(model)
    adapters = AdapterSet(base)
    for name in expected:
        adapters.add(name, tmp_path / name)
    for name in ("two", "one", None, "two"):
        with adapters.using(name) as model:
            assert torch.equal(logits(model), plain if name is None else expected[name])
    assert not torch.allclose(expected["one"], expected["two"])


@each_method
def test_virtual_tokens_work_on_another_architecture(method: Any) -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=260)
    base = GPT2LMHeadModel(config).requires_grad_(False).eval()
    model = method.attach(base).eval()
    assert logits(model).shape == (2, 6, 260)
    alone = logits(model, IDS[1:, :4], None)
    torch.testing.assert_close(logits(model)[1:, :4], alone, rtol=0, atol=1e-5)


def tiny_gpt2() -> PreTrainedModel:
    """A model with a table of 32 positions."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=260, n_positions=32)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@pytest.mark.parametrize("number", [1, 5, 31])
@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
def test_virtual_tokens_take_positions_of_a_table(kind: Any, number: int) -> None:
    model = kind(num_virtual_tokens=number).attach(tiny_gpt2()).eval()
    context = context_of(model)
    assert context == ModelContext(32 - number, is_table=True, virtual_tokens=number)
    assert logits(model, torch.ones(1, 32 - number, dtype=torch.long), None).isfinite().all()
    with pytest.raises(IndexError):
        logits(model, torch.ones(1, 33 - number, dtype=torch.long), None)
    with model.disable_adapter():
        assert context_of(model) == ModelContext(32, is_table=True)
    refuse_long_rows(model, 32 - number, number)
    with pytest.raises(ModelError, match=f"32 tokens .{number} of them virtual tokens") as caught:
        refuse_long_rows(model, 33 - number, number)
    assert caught.value.hint == f"--set data.max_length={32 - number}"


@each_method
def test_answers_end_where_the_context_without_virtual_tokens_is_full(method: Any) -> None:
    model = method.attach(tiny_gpt2()).eval()
    generator = TextGenerator(model, make_tokenizer(), [1000], torch.float32, torch.device("cpu"))

    def answer(length: int) -> int:
        prompts = [Question([65] * length, "", "")]
        [(_, found)] = generator.complete(prompts, Sampling(max_new_tokens=50), batch_size=1)
        return found.num_tokens

    assert [answer(length) for length in (20, 26)] == [7, 1]
    with pytest.raises(DataError, match=r"room for 27 tokens \(32 less 5 virtual tokens\)"):
        answer(27)


@each_method
def test_a_session_counts_virtual_tokens_for_each_model(
    tiny_model: Path, method: Any, tmp_path: Path
) -> None:
    method.save(method.attach(load(tiny_model)), tmp_path)
    session = open_session(str(tiny_model), adapters=[f"tuned={tmp_path}"])
    found = {name: one.context for name, one in session.models.items()}
    assert found["base"] == ModelContext(512, is_table=False)
    assert found["tuned"] == ModelContext(507, is_table=False, virtual_tokens=NUMBER)


@each_method
def test_packed_rows_are_refused(
    tiny_model: Path, tiny_recipe: Callable[..., Recipe], method: Any
) -> None:
    with pytest.raises(ValidationError, match="each example needs its own virtual tokens"):
        tiny_recipe(adapter={"type": method.type}, data={"packing": True})
    model = method.attach(load(tiny_model))
    packed = Batch(IDS.view(1, -1), None, IDS.view(1, -1), (6, 6))
    with pytest.raises(ValueError, match="this row has several examples"):
        model(**packed.inputs())


def test_virtual_tokens_cannot_be_swapped_with_lora(tiny_model: Path, tmp_path: Path) -> None:
    for name, method in {"a": LoRA(r=2), "b": PromptTuning(num_virtual_tokens=2)}.items():
        (tmp_path / name).mkdir()
        method.save(method.attach(load(tiny_model)), tmp_path / name)
    adapters = AdapterSet(load(tiny_model))
    adapters.add("a", tmp_path / "a")
    with pytest.raises(Exception, match="Cannot combine adapters with different peft types"):
        adapters.add("b", tmp_path / "b")
