"""A head beside each adapter against transformers' classifiers and PEFT, in a plain loop.

Then what the contract asks of any training: cuts of the batch, packing, resuming, saving, merging.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from qlora_cli.adapters import FullFineTune, LoRA
from qlora_cli.data.batching.collate import concatenate_batch, pad_batch
from qlora_cli.errors import ModelError
from qlora_cli.export.merge import merge
from qlora_cli.kernels.cross_entropy import cross_entropy
from qlora_cli.models.base import BaseModelConfig, load_model
from qlora_cli.models.heads import initialize_head, lacks_head
from qlora_cli.models.quantization import FourBit, Int8, Unquantized
from qlora_cli.objectives import Classify, Reward
from qlora_cli.train.train import train
from qlora_cli.types import Batch, Example, HeadSpec
from tests.conftest import make_tokenizer, save_tiny_model
from tests.contract.subjects import CLASSES, SUBJECTS

CPU = torch.device("cpu")
STEPS, ROWS = 10, 6
PAD = make_tokenizer().convert_tokens_to_ids("<|im_start|>")
LABELS = ["no", "maybe", "yes"]
OBJECTIVES = {
    "single": Classify(labels=LABELS),
    "multi": Classify(labels=LABELS, problem="multi"),
    "regression": Classify(problem="regression"),
}


def make_examples(problem: str, number: int = ROWS * STEPS) -> list[Example]:
    """Make rows of different lengths, with a label that depends on their tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(number):
        length = int(torch.randint(2, 20, (), generator=generator))
        ids = torch.randint(1, 250, (length,), generator=generator).tolist()
        value = ids[-1] % 3
        values = {
            "single": (float(value),),
            "multi": tuple(float(value >= k) for k in range(3)),
            "regression": (value - 1.3,),
        }[problem]
        examples.append(Example(ids, [-100] * length, values=values))
    return examples


def load_head(folder: Path, head: HeadSpec, quantization: Any = None) -> Any:
    """Load a base as a run does, with a head drawn from seed 0."""
    options = (quantization or Unquantized()).load_options(torch.float32)
    base = BaseModelConfig(path=str(folder)).load(options, CPU, head)
    base.config.pad_token_id = PAD
    torch.manual_seed(0)
    initialize_head(base)
    return base


def ours(
    folder: Path, config: Any, adapter: Any, cuts: int = 1, quantization: Any = None
) -> tuple[list[float], Any]:
    """Train ten steps with our objective, each step in equal parts."""
    base = load_head(folder, config.head, quantization)
    torch.manual_seed(1)
    model = adapter.attach(base)
    objective = config.build(model, torch.float32, cross_entropy)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    examples, losses = make_examples(config.problem), []
    for step in range(STEPS):
        some = examples[ROWS * step : ROWS * (step + 1)]
        size = ROWS // cuts
        batches = [pad_batch(some[at : at + size], PAD) for at in range(0, ROWS, size)]
        weight = sum(objective.weight(batch) for batch in batches)
        sums = [objective(batch)[0] for batch in batches]
        for total in sums:
            (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(total.item() for total in sums) / weight)
    return losses, model


def plain(folder: Path, config: Any, head: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """Train ten steps as anybody would write it with transformers and PEFT.

    In float64, so that what differs is our rounding alone.

    Args:
        head: the weight that the head begins with.
    """
    names = {"single": "single_label_classification", "multi": "multi_label_classification"}
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(config.head.labels),
        problem_type=names.get(config.problem, "regression"),
        pad_token_id=PAD,
        dtype=torch.float32,
    )
    with torch.no_grad():
        model.score.weight.copy_(head)
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, settings).train().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    examples, losses = make_examples(config.problem), []
    for step in range(STEPS):
        some = examples[ROWS * step : ROWS * (step + 1)]
        batch = pad_batch(some, PAD)
        values = torch.tensor([one.values for one in some], dtype=torch.float64)
        labels = values if config.problem == "multi" else values[:, 0]
        loss = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels.long() if config.problem == "single" else labels,
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", OBJECTIVES.values(), ids=OBJECTIVES)
def test_ten_steps_equal_transformers_and_peft(config: Any, tiny_model: Path) -> None:
    head = load_head(tiny_model, config.head).score.weight.detach().clone()
    wanted, weights = plain(tiny_model, config, head)
    found, model = ours(tiny_model, config, LoRA(r=4, alpha=8))
    cut, _ = ours(tiny_model, config, LoRA(r=4, alpha=8), cuts=3)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert cut == pytest.approx(found, rel=1e-6)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys()
    assert any("score" in name for name in trained)
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name].double(), weight, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [(FullFineTune(), None), (LoRA(r=4), FourBit()), (LoRA(r=4), Int8())],
    ids=["full", "nf4", "int8"],
)
def test_a_head_learns_on_any_base(adapter: Any, quantization: Any, tiny_model: Path) -> None:
    config = OBJECTIVES["single"]
    losses, model = ours(tiny_model, config, adapter, quantization=quantization)
    again, _ = ours(tiny_model, config, adapter, cuts=3, quantization=quantization)
    # With LLM.int8() the rows of a batch together decide how it is computed.
    bound = 1e-2 if isinstance(quantization, Int8) else 1e-6
    assert again == pytest.approx(losses, rel=bound)
    assert {p.dtype for n, p in model.named_parameters() if "score" in n} == {torch.float32}


@pytest.mark.parametrize("config", [*OBJECTIVES.values(), Reward()], ids=lambda one: one.type)
def test_a_score_does_not_depend_on_padding_packing_or_the_batch(
    config: Any, tiny_model: Path
) -> None:
    from qlora_cli.models.packed_attention import attend_by_document
    from qlora_cli.objectives.head_outputs import HeadOutputs

    base = load_head(tiny_model, config.head).eval()
    attend_by_document(base)
    examples = make_examples("single", 8)
    outputs = HeadOutputs(base, torch.float32)
    # The pad token inside and at the end of rows is a token like any other.
    ids = [PAD, *examples[1].input_ids, PAD]
    examples[1] = Example(ids, [-100] * len(ids), values=(0.0,))
    alone = torch.cat([outputs(pad_batch([one], PAD)) for one in examples])
    right = pad_batch(examples, PAD)
    mask = right.attention_mask
    assert mask is not None
    left = Batch(right.input_ids.clone(), mask.flip(1), right.labels)
    for at, one in enumerate(examples):
        left.input_ids[at] = PAD
        left.input_ids[at, -len(one.input_ids) :] = torch.tensor(one.input_ids)
    bound = 1e-6 * float(alone.abs().max().detach())
    for batch in (right, left, concatenate_batch(examples, PAD)):
        torch.testing.assert_close(outputs(batch), alone, rtol=0, atol=bound)


def with_head() -> list[str]:
    """Return one subject of each method that a head can be trained with."""
    seen: dict[Any, str] = {}
    for name, subject in SUBJECTS.items():
        # A model with a head that scores rows has no other one to train.
        names_lm_head = "lm_head" in str(subject.adapter.model_dump())
        if not subject.adapter.no_head and not names_lm_head:
            seen.setdefault(type(subject.adapter), name)
    return list(seen.values())


def test_each_method_trains_a_head_or_says_why_not() -> None:
    names = with_head()
    refused = [kind for kind in CLASSES if kind.model_fields and kind.no_head]
    assert len(names) + len(refused) == len(CLASSES)
    assert all(kind.no_head.startswith("PEFT does not") for kind in refused)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from tests.contract.subjects import BASES

    root = tmp_path_factory.mktemp("bases")
    return lambda name: (
        root / name if (root / name).exists() else save_tiny_model(root / name, **BASES[name])
    )


@pytest.mark.parametrize("name", with_head())
def test_a_head_is_saved_loaded_and_missed(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    subject, config = SUBJECTS[name], OBJECTIVES["single"]
    folder, adapter = bases(subject.base), subject.adapter
    model = adapter.attach(load_head(folder, config.head))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    [weight] = [p for n, p in trained.items() if "score" in n]
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    adapter.save(model, tmp_path)
    batch = pad_batch(make_examples("single", 4), PAD)

    def scores(some: Any) -> Tensor:
        from qlora_cli.objectives.head_outputs import HeadOutputs

        with torch.no_grad():
            return HeadOutputs(some.eval(), torch.float32)(batch)

    base = BaseModelConfig(path=str(folder)).load({"dtype": torch.float32}, CPU, config.head)
    assert lacks_head(base)
    assert torch.equal(scores(adapter.load(base, tmp_path)), scores(model))

    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    [key] = [key for key in tensors if "score" in key]
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    base = BaseModelConfig(path=str(folder)).load({"dtype": torch.float32}, CPU, config.head)
    with pytest.raises(ModelError, match=r"score\.weight"):
        adapter.load(base, tmp_path)


def test_a_model_folder_without_a_head_is_an_error(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks 1 weights.*score\.weight"):
        load_model(tiny_model, OBJECTIVES["single"].head)


@pytest.mark.parametrize("labels", [["yes", "maybe", "no"], ["no", "yes"], [*LABELS, "other"]])
def test_a_head_with_other_labels_is_refused(
    labels: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    head = OBJECTIVES["single"].head
    load_head(tiny_model, head).save_pretrained(tmp_path)
    assert not lacks_head(load_model(tmp_path, head))
    with pytest.raises(ModelError, match="has the labels no, maybe, yes, and the objective"):
        load_model(tmp_path, Classify(labels=labels).head)


# End to end: from rows to a merged folder.


@pytest.fixture
def head_recipe(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Make a recipe with labelled rows, or with pairs for `reward`."""

    def make(objective: dict[str, Any], **sections: Any) -> Any:
        words = [(word, n) for word in ("ab", "cd", "ef") for n in (1, 2, 3, 5)]
        rows: list[dict[str, Any]] = [
            {"text": " ".join([word] * n), "label": LABELS[n % 3]} for word, n in words
        ]
        kind = "labelled"
        if objective["type"] == "reward":
            kind = "preference"
            rows = [{"prompt": f"{w} {n}", "chosen": w * n, "rejected": "x" * n} for w, n in words]
        path = tmp_path / "labelled.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"path": str(path), "format": {"type": kind}}
        data = {"train": source, "evaluation": source, **sections.pop("data", {})}
        return tiny_recipe(data=data, objective=objective, **sections)

    return make


def check_card(folder: Path, run: Path, base: Path, place: Path) -> None:
    """Assert that the code of a model card gives the scores of `predict`."""
    import contextlib

    import qlora_cli

    text = (folder / "README.md").read_text("utf-8")
    assert "pipeline_tag: text-classification" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    name = code.partition('folder = "')[2].partition('"')[0]
    place.mkdir()
    (place / base.name).symlink_to(base)
    (place / name).symlink_to(folder)
    names: dict[str, Any] = {}
    with contextlib.chdir(place):
        exec(code, names)
    row: Any = "The food was cold."
    if "messages" in names:
        row = {"messages": names["messages"]}
    [found] = qlora_cli.load(str(run)).predict([row])
    outputs = names["outputs"][0]
    wanted = [found["value"]] if "value" in found else list(found["probabilities"].values())
    got = outputs if "value" in found else outputs.softmax(-1)
    assert got.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "sections"),
    [
        ({"type": "classify", "labels": LABELS}, {"data": {"packing": True}}),
        ({"type": "classify", "labels": LABELS}, {"adapter": {"type": "full"}}),
        ({"type": "classify", "labels": LABELS}, {"adapter": {"type": "freeze"}}),
        ({"type": "reward"}, {"quantization": {"type": "nf4"}}),
    ],
    ids=["lora", "full", "freeze", "reward-nf4"],
)
def test_a_merged_folder_computes_what_was_trained(
    objective: dict[str, Any], sections: Any, head_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    if "adapter" in sections:
        recipe = head_recipe(objective)
        recipe = recipe.model_validate({**recipe.model_dump(exclude_unset=True), **sections})
    else:
        recipe = head_recipe(objective, **sections)
    train(recipe)
    run = Path(recipe.output.dir)
    report = merge(run, tmp_path / "merged", weights="last")
    assert report.logit_error is not None
    assert report.logit_error < 1e-5
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(found.values())
    for folder in (run / "last", tmp_path / "merged"):
        check_card(folder, run, Path(recipe.model.path), tmp_path / f"card-{folder.name}")
    assert list(model.config.id2label.values()) == list(recipe.objective.head.labels)
    assert model.config.pad_token_id == PAD
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_resumed_run_ends_with_the_same_bits(
    head_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    objective = {"type": "classify", "labels": LABELS}
    settings = {"save_every": 2, "max_steps": 4, "eval_every": 2}
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        train(head_recipe(objective, training=settings, output={"dir": str(folder)}))
    recipe = head_recipe(objective, training=settings, output={"dir": str(folders[1])})
    before = load_file(folders[0] / "last" / "adapter_model.safetensors")
    train(recipe, resume="2")
    after = load_file(folders[1] / "last" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("score" in name for name in before)


def test_measures_of_the_head_choose_the_best_weights(head_recipe: Callable[..., Any]) -> None:
    recipe = head_recipe(
        {"type": "classify", "labels": LABELS},
        training={"eval_every": 2, "patience": 3},
        evaluation={"best_by": "macro_f1"},
    )
    train(recipe)
    lines = (Path(recipe.output.dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if "eval_loss" in row]
    assert {"eval_accuracy", "eval_macro_f1", "eval_auroc"} <= found[-1].keys()
    record = json.loads((Path(recipe.output.dir) / "run.json").read_text("utf-8"))
    best = max(found[1:], key=lambda row: row["eval_macro_f1"])
    assert record["best"]["step"] == best["step"]


def test_a_head_starts_from_the_adapter_of_a_run_on_answers(
    head_recipe: Callable[..., Any], tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    train(tiny_recipe(output={"dir": str(tmp_path / "answers")}))
    recipe = head_recipe(
        {"type": "classify", "labels": LABELS},
        adapter={"type": "lora", "r": 4, "alpha": 8, "init_from": str(tmp_path / "answers")},
        training={"max_steps": 1},
        optimizer={"type": "sgd", "learning_rate": 1e-30},
    )
    train(recipe)
    before = load_file(tmp_path / "answers" / "last" / "adapter_model.safetensors")
    after = load_file(Path(recipe.output.dir) / "last" / "adapter_model.safetensors")
    added = after.keys() - before.keys()
    assert [name.rpartition(".score.")[2] for name in added] == ["weight"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_summary_of_labelled_rows_says_what_is_read(head_recipe: Callable[..., Any]) -> None:
    from qlora_cli.loop.run_data import read_recipe_data

    recipe = head_recipe({"type": "classify", "labels": LABELS})
    summary = read_recipe_data(recipe).training.summary()
    assert summary.endswith("longest 15; the last token of each row is read")
    assert "supervised" not in summary
