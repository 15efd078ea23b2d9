"""GGUF files are unpacked once, and what a kill left of it is removed by the next run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.models.base import BaseModelConfig
from tests.conftest import MODEL, needs_model


@needs_model
@pytest.mark.slow
def test_leftovers_of_a_killed_unpacking_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    config = BaseModelConfig(path=str(MODEL))
    folder = config.locate()
    whole = {path.name for path in folder.iterdir()}
    folder.rename(folder.with_name(f".{folder.name}.unfinished"))
    folder.with_name(f".{folder.name}.alone").mkdir()
    assert config.locate() == folder
    assert {path.name for path in folder.iterdir()} == whole
    assert sorted(folder.parent.iterdir()) == [folder, folder.with_suffix(".lock")]
