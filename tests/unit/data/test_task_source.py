"""`data.repair` reaches the rows of evaluation tasks that have data of their own."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_cli.data.config import Data
from qlora_cli.data.sources import BadRows, Source


def test_rows_of_a_task_are_repaired_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    turns = [{"role": "Human", "content": "a"}, {"role": "bot", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    own = Source(path=str(path))
    bad = BadRows()
    data = Data(train=own, evaluation_share=0.5, repair=["role_names"])
    [row] = data.task_source(own).conversations(bad)
    assert [message.role for message in row.messages] == ["user", "assistant"]
    assert bad.repaired == {"role_names": 1}
    assert Data(train=own).task_source(own) is own
