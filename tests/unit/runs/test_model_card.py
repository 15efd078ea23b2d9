from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from qlora_cli.evaluate.evaluate import evaluate
from qlora_cli.export.merge import merge
from qlora_cli.inference.session import open_session
from qlora_cli.runs.card_code import card_code
from qlora_cli.runs.merge_report import MergeReport, UpdateReport
from qlora_cli.runs.model_card import model_card
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.train import train
from qlora_cli.types import Message
from tests.conftest import CHATML, save_tiny_model
from tests.tiny_gguf import write_gguf

PATHS = ("/tmp", "/home", "/root", "/var", "/private")


@pytest.fixture
def make_run(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., RunFolder]:
    def make(**sections: Any) -> RunFolder:
        train(tiny_recipe(**sections))
        return RunFolder(tmp_path / "run")

    return make


def parse(text: str) -> ModelCard:
    """The card, read as the hub's own library reads it."""
    return ModelCard(text)


def codes(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_both_weights_of_a_run_have_a_card_in_place_of_the_blank_one(
    make_run: Callable[..., RunFolder],
) -> None:
    run = make_run(quantization={"type": "nf4"})
    last, best = ((run.root / name / "README.md").read_text() for name in ("last", "best"))
    for text in (last, best):
        assert "More Information Needed" not in text
        data = parse(text).data
        assert data.library_name == "peft"
        assert data.tags == ["lora", "qlora", "nf4"]
    assert "after the last step" in last
    assert "with the best loss" in best


def test_the_card_has_the_figures_of_the_run(make_run: Callable[..., RunFolder]) -> None:
    run = make_run()
    record = run.read_record()
    text = (run.root / "last" / "README.md").read_text()
    assert f"{record['trained_weights']:,} of {record['total_weights']:,}" in text
    assert f"{record['data']['training']['num_tokens']:,} tokens" in text
    assert f"{record['best']['eval_loss']:.4f} at step 4" in text
    assert f"torch {record['packages']['torch']}" in text
    assert "rows.jsonl: 16 rows" in text
    assert "target_modules all-linear, r 4, alpha 8" in text
    assert "learning_rate 0.01" in text


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"type": "paged_adamw_32bit"}}, "| optimizer | adamw: "),
        ({"optimizer": {"type": "paged_lion_8bit"}}, "| optimizer | lion_8bit: "),
        ({"optimizer": {"type": "adamw"}}, "| optimizer | adamw: "),
        ({"training": {"precision": "auto"}}, "| precision | {precision} |"),
    ],
    ids=str,
)
def test_the_card_says_what_ran(
    make_run: Callable[..., RunFolder], sections: dict[str, Any], said: str
) -> None:
    run = make_run(**{"training": {"max_steps": 1}, **sections})
    record = run.read_record()
    text = (run.root / "last" / "README.md").read_text()
    assert said.format(**record) in text
    wanted = sections.get("optimizer", {}).get("type", "")
    assert (f"(the recipe's {wanted} needs CUDA for paging)" in text) == wanted.startswith("paged_")


@pytest.mark.parametrize("has_held_out", [True, False])
def test_the_card_does_not_compare_losses_of_single_batches(
    make_run: Callable[..., RunFolder], has_held_out: bool
) -> None:
    data = {} if has_held_out else {"evaluation": None}
    run = make_run(data=data, training={"max_steps": 12})
    lines = (run.root / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    text = (run.root / "last" / "README.md").read_text()
    if has_held_out:
        [first, *_, last] = [row for row in rows if "eval_loss" in row]
        said = (
            f"| held-out loss | {first['eval_loss']:.4f} before training, "
            f"{last['eval_loss']:.4f} after step 12 |"
        )
    else:
        losses = [row["loss"] for row in rows if "loss" in row]
        said = (
            f"| training loss | mean {sum(losses[:10]) / 10:.4f} over the first 10 logged steps, "
            f"{sum(losses[-10:]) / 10:.4f} over the last 10;"
        )
    assert said in text
    assert ("training loss" in text) != has_held_out


def test_an_evaluation_is_added_to_the_card_of_the_weights_that_were_measured(
    make_run: Callable[..., RunFolder],
) -> None:
    run = make_run()
    report = evaluate(run.root, weights="best").to_json()
    last, best = ((run.root / name / "README.md").read_text() for name in ("last", "best"))
    assert f"{report['models']['tuned']['loss']['value']:.4f}" in best.partition("## Evaluation")[2]
    assert "## Evaluation" not in last


def test_a_card_contains_no_path_of_this_machine(
    make_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = make_run(quantization={"type": "nf4"})
    evaluate(run.root, weights="last")
    proof = merge(run.root, tmp_path / "merged", weights="last")
    for text in (
        (run.root / "last" / "README.md").read_text(),
        model_card(run, "last", name="merged", proof=proof),
    ):
        assert not any(place in text for place in (*PATHS, str(tmp_path), str(Path.home())))
        assert "Linux" not in text


def test_a_merged_model_is_a_model_of_its_own_with_its_proof(
    make_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = make_run()
    proof = merge(run.root, tmp_path / "merged", weights="last")
    card = parse(model_card(run, "last", name="merged", proof=proof))
    assert card.data.library_name == "transformers"
    assert f"{proof.kl:.1e}" in card.text.partition("## Merge")[2]
    assert "PeftModel" not in card.text


def test_a_base_and_data_of_the_hub_are_named_for_its_index(
    make_run: Callable[..., RunFolder],
) -> None:
    run = make_run()
    text = run.recipe.read_text()
    text = re.sub(r"(?m)^  path: .*model$", "  path: org/base-1B", text)
    text = re.sub(r"(?m)^    path: .*rows.jsonl$", "    path: org/rows", text)
    run.recipe.write_text(text)
    data = parse(model_card(run, "last", name="mine")).data
    assert (data.base_model, data.datasets) == ("org/base-1B", ["org/rows"])
    assert data.get("base_model_relation") == "adapter"
    data = parse(model_card(run, "last", name="mine", proof=_proof())).data
    assert data.get("base_model_relation") == "finetune"


def test_a_local_base_has_no_name_on_the_hub(make_run: Callable[..., RunFolder]) -> None:
    run = make_run()
    data = parse((run.root / "last" / "README.md").read_text()).data
    assert data.base_model is None
    assert data.datasets is None


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_the_example_holds_the_base_as_in_training(
    make_run: Callable[..., RunFolder], quantization: str
) -> None:
    run = make_run(quantization={"type": quantization}, training={"precision": "bf16"})
    (code,) = codes((run.root / "last" / "README.md").read_text())
    ast.parse(code)
    assert ("load_in_4bit=True" in code) == (quantization in ("nf4", "fp4"))
    assert ("load_in_8bit=True" in code) == (quantization == "int8")
    assert 'dtype="bfloat16"' in code


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_example_computes_in_the_precision_that_ran(
    make_run: Callable[..., RunFolder], quantization: str
) -> None:
    run = make_run(
        quantization={"type": quantization}, training={"precision": "auto", "max_steps": 1}
    )
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    (code,) = codes((run.root / "last" / "README.md").read_text())
    assert f'dtype="{names[run.read_record()["precision"]]}"' in code
    for precision, dtype in names.items():
        run.update_record(precision=precision)
        (code,) = codes(model_card(run, "last", name="mine"))
        others = [name for name in names.values() if name != dtype]
        assert not any(f'"{other}"' in code or f"'{other}'" in code for other in others)
        assert f'dtype="{dtype}"' in code


@pytest.fixture
def run_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Run the code of a card where the base and the folder of the card are."""

    def run(folder: Path, base: Path, *, place: str = "") -> dict[str, Any]:
        (code,) = codes((folder / "README.md").read_text())
        here = tmp_path / "here"
        (here / place).mkdir(parents=True)
        (here / place / base.name).symlink_to(base)
        name = re.search(r'folder = "(.*?)"', code)
        assert name
        (here / name[1]).symlink_to(folder)
        monkeypatch.chdir(here)
        capsys.readouterr()
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["tokenizer"].chat_template
        assert names["inputs"]["input_ids"].shape[1] > 20
        assert capsys.readouterr().out.endswith("\n")
        return names

    return run


@pytest.mark.parametrize(
    ("quantization", "adapter"),
    [
        ("nf4", {"type": "lora"}),
        ("none", {"type": "lora"}),
        ("none", {"type": "bitfit"}),
        ("none", {"type": "bottleneck", "size": 4}),
        pytest.param("int8", {"type": "lora"}, marks=pytest.mark.slow),
        pytest.param("none", {"type": "full"}, marks=pytest.mark.slow),
        pytest.param("none", {"type": "freeze"}, marks=pytest.mark.slow),
        pytest.param("none", {"type": "prompt"}, marks=pytest.mark.slow),
        pytest.param("none", {"type": "prefix"}, marks=pytest.mark.slow),
    ],
)
def test_the_example_runs_on_a_local_folder(
    make_run: Callable[..., RunFolder],
    run_code: Callable[..., dict[str, Any]],
    tiny_model: Path,
    quantization: str,
    adapter: dict[str, Any],
) -> None:
    base = tiny_model
    if adapter["type"] == "bitfit":
        base = save_tiny_model(tiny_model.parent / "biased", attention_bias=True)
    run = make_run(model={"path": str(base)}, quantization={"type": quantization}, adapter=adapter)
    names = run_code(run.root / "last", base)
    assert ("the path of your copy" in (run.root / "last" / "README.md").read_text()) == (
        adapter["type"] != "full"
    )
    if adapter["type"] == "lora":
        assert names["model"].active_adapters == ["default"]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_example_unpacks_a_gguf_base(
    make_run: Callable[..., RunFolder],
    run_code: Callable[..., dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    quantization: str,
) -> None:
    file, template = tmp_path / "tiny.gguf", tmp_path / "chatml.jinja"
    write_gguf(tiny_model, file)
    template.write_text(CHATML, encoding="utf-8")
    run = make_run(
        model={"path": str(file)},
        quantization={"type": quantization},
        data={"chat_template": str(template)},
        training={"precision": "bf16"},
    )
    names = run_code(run.root / "last", file, place="gguf")
    with torch.no_grad():
        found = names["model"](**names["inputs"]).logits.float()
    session = open_session(str(run.root))
    with torch.no_grad(), session.use(session.default) as generator:
        wanted = generator.model(**names["inputs"]).logits.float()
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize(
    ("format", "wanted"),
    [
        ({"type": "messages"}, '[{"role": "user", "content": "What is'),
        (
            {"type": "template", "system": "calm", "user": "Q: {{ q }}", "assistant": "{{ a }}"},
            '[{"role": "system", "content": "calm"}, {"role": "user", "content": "Q: What is',
        ),
        (
            {"type": "template", "user": '{{ q }} \\ "{{ c }}"', "assistant": "{{ a }}"},
            r'[{"role": "user", "content": "{{ q }} \\ \"{{ c }}\""}]',
        ),
        ({"type": "text"}, 'inputs = tokenizer("The capital'),
        ({"type": "prompt_completion", "as_chat": False}, 'inputs = tokenizer("The capital'),
    ],
    ids=str,
)
def test_the_example_asks_in_the_form_of_the_training_rows(
    tiny_recipe: Callable[..., Any],
    format: dict[str, Any],
    wanted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tiny_recipe(data={"train": {"path": "rows.jsonl", "format": format}})
    code = "\n".join(card_code(recipe, "mine", is_whole=False))
    ast.parse(code)
    assert wanted in code
    assert not caplog.records


def test_the_example_declares_tools_if_the_rows_do(
    make_run: Callable[..., RunFolder],
    run_code: Callable[..., dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools | tojson if tools }}" + CHATML, encoding="utf-8")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["tools"] = [{"name": "add", "description": "Add.", "parameters": {"type": "object"}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = make_run(
        data={"chat_template": str(template), "evaluation": None, "max_length": 400},
        training={"max_steps": 1},
    )
    assert run.read_record()["data"]["training"]["num_with_tools"] == len(rows)
    names = run_code(run.root / "last", tiny_model)
    prompt = names["tokenizer"].decode(names["inputs"]["input_ids"][0])
    assert "Look up the capital of a country." in prompt
    # Of a run, and of a run as an adapter over a recipe, or over a model folder.
    adapters = [f"mine={run.root}"]
    for target, others in ((run.root, []), (run.recipe, adapters), (tiny_model, adapters)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            session = open_session(str(target), adapters=others)
            session.reader().conversation([Message("user", "hi", train=False)])
        assert "the training rows declare tools, and this prompt has none" in caplog.text, target


def test_the_example_pins_the_revision_of_a_base_on_the_hub(
    tiny_recipe: Callable[..., Any],
) -> None:
    model = {"path": "org/base-1B", "revision": "0" * 40, "trust_remote_code": True}
    code = "\n".join(card_code(tiny_recipe(model=model), "mine", is_whole=False))
    ast.parse(code)
    assert f'revision="{"0" * 40}"' in code
    assert "trust_remote_code=True" in code
    assert "your copy" not in code


def _proof() -> MergeReport:
    update = UpdateReport(
        updated=1, untrained=0, requantized=0, copied=1, norm=1.0, rounding_error=0.01,
        quantization_error=None,
    )  # fmt: skip
    return MergeReport(
        output="merged", weights="last", base="original", dtype="bfloat16", bytes=2**20,
        update=update, logit_error=None, kl=None, top1_agreement=None, comparison=None,
    )  # fmt: skip
