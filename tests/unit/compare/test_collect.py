"""Cells whose objectives measure different things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_cli.compare.collect import make_report
from qlora_cli.compare.grid import Cell
from qlora_cli.compare.store import ResultStore
from qlora_cli.evaluate.evaluate import choose_tasks
from qlora_cli.tasks.task import Outcome


def test_objectives_have_their_own_measures_and_their_own_base(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    pairs = {"path": "pairs.jsonl", "format": {"type": "preference"}}
    data = {"train": pairs, "evaluation": pairs}
    cells = [
        Cell(kind, "recipe", None, {"type": kind}, tiny_recipe(data=data, objective={"type": kind}))
        for kind in ("dpo", "reward")
    ]
    stores = [ResultStore(tmp_path, cell) for cell in cells]
    assert stores[0].base_name != stores[1].base_name
    columns = [
        {"loss": 1.0, "accuracy": 1.0, "margin": 1.0, "likelier": 1.0, "likelier_per_token": 1.0,
         "logp_difference": 1.0},
        {"loss": 2.0, "accuracy": 1.0, "margin": 3.0},
    ]  # fmt: skip
    for cell, store, values in zip(cells, stores, columns, strict=True):
        [task] = choose_tasks(cell.recipe, None, is_tuned=False)
        store.save_outcomes({task.label: [Outcome(f"{i}", "", "", "", values) for i in range(3)]})
        store.save_measurements({"plan": {}, "generation": None})
    dpo, reward = make_report(cells, tmp_path).cells
    assert dpo.results is not None
    assert {"loss", "loss.likelier"} <= dpo.results.keys()
    assert reward.results is not None
    assert reward.results.keys() == {"loss", "loss.accuracy", "loss.margin"}
    assert not reward.differences
    # A head writes no text, so its speed of generation is not waited for.
    assert not stores[0].is_done
    assert stores[1].is_done
