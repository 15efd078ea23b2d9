from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qlora_cli.evaluate.evaluate import evaluate
from qlora_cli.export.merge import merge
from qlora_cli.runs.merge_report import MergeReport, UpdateReport
from qlora_cli.runs.model_card import model_card
from qlora_cli.runs.run_folder import RunFolder
from qlora_cli.train.train import train

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


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_example_for_an_adapter_runs(
    make_run: Callable[..., RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    quantization: str,
) -> None:
    run = make_run(quantization={"type": quantization})
    (code,) = codes((run.root / "last" / "README.md").read_text())
    monkeypatch.chdir(tiny_model.parent)
    (tiny_model.parent / "run").unlink(missing_ok=True)
    (tiny_model.parent / "run").symlink_to(run.root / "last")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].active_adapters == ["default"]
    assert names["tokenizer"].chat_template


def _proof() -> MergeReport:
    update = UpdateReport(
        updated=1, untrained=0, requantized=0, copied=1, norm=1.0, rounding_error=0.01,
        quantization_error=None,
    )  # fmt: skip
    return MergeReport(
        output="merged", weights="last", base="original", dtype="bfloat16", bytes=2**20,
        update=update, logit_error=None, kl=None, top1_agreement=None, comparison=None,
    )  # fmt: skip
