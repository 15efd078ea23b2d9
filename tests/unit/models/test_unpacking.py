"""GGUF files are unpacked once; what is left of a kill, or damaged, is unpacked anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.gguf import damaged_file
from tests.conftest import MODEL, needs_model
from tests.damage import DAMAGE


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
    others = [folder.with_suffix(".json"), folder.with_suffix(".lock")]
    assert sorted(folder.parent.iterdir()) == [folder, *others]


@needs_model
@pytest.mark.slow
def test_a_damaged_folder_is_unpacked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    config = BaseModelConfig(path=str(MODEL))
    folder = config.locate()
    digests = folder.with_suffix(".json")
    for file in [digests, *sorted(folder.iterdir())]:
        written = file.read_bytes()
        for damage, change in DAMAGE.items():
            file.write_bytes(change(written))
            found = damaged_file(folder)
            assert found == file.name or (found and file == digests), f"{file.name} {damage}"
            if file.stat().st_size > 2**20:
                break
        file.write_bytes(written)
    assert damaged_file(folder) is None
    assert config.read_config()[1] == MODEL.name
    added = folder / "chat_template.txt"
    added.write_text("x", encoding="utf-8")
    assert damaged_file(folder) == added.name
    added.unlink()
    weights = folder / "model.safetensors"
    written = weights.read_bytes()
    weights.write_bytes(DAMAGE["a bit flipped"](written))
    assert config.locate() == folder
    assert f"{folder}: damaged (model.safetensors); {MODEL.name} is unpacked anew" in caplog.text
    assert weights.read_bytes() == written
