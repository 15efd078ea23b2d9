"""GGUF files are unpacked once; what is left of a kill, or damaged, is unpacked anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from gguf import GGUFReader

from qlora_cli.errors import ModelError
from qlora_cli.models.base import BaseModelConfig
from qlora_cli.models.gguf import damaged_file
from tests.conftest import ROOT
from tests.damage import DAMAGE, flipped
from tests.tiny_gguf import write_gguf


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a tiny GGUF file, and begin with an empty cache."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, path)
    return path


def test_leftovers_of_a_killed_unpacking_are_removed(model: Path) -> None:
    config = BaseModelConfig(path=str(model))
    folder = config.locate()
    whole = {path.name for path in folder.iterdir()}
    folder.rename(folder.with_name(f".{folder.name}.unfinished"))
    folder.with_name(f".{folder.name}.alone").mkdir()
    assert config.locate() == folder
    assert {path.name for path in folder.iterdir()} == whole
    others = [folder.with_suffix(".json"), folder.with_suffix(".lock")]
    assert sorted(folder.parent.iterdir()) == [folder, *others]


def test_a_damaged_folder_is_unpacked_anew(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = BaseModelConfig(path=str(model))
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
    assert config.read_config()[1] == model.name
    added = folder / "chat_template.txt"
    added.write_text("x", encoding="utf-8")
    assert damaged_file(folder) == added.name
    added.unlink()
    weights = folder / "model.safetensors"
    written = weights.read_bytes()
    weights.write_bytes(DAMAGE["a bit flipped"](written))
    assert config.locate() == folder
    assert f"{folder}: damaged (model.safetensors); {model.name} is unpacked anew" in caplog.text
    assert weights.read_bytes() == written


def test_a_folder_without_digests_is_unpacked_anew(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier version kept none: nothing is damaged."""
    caplog.set_level("INFO")
    config = BaseModelConfig(path=str(model))
    folder = config.locate()
    assert "unpacking tiny.gguf" in caplog.text
    caplog.clear()
    written = (folder / "model.safetensors").read_bytes()
    for content in (written, flipped(written)):
        (folder / "model.safetensors").write_bytes(content)
        folder.with_suffix(".json").unlink()
        assert config.locate() == folder
        assert (folder / "model.safetensors").read_bytes() == written
        [line] = [record.message for record in caplog.records if record.name == "qlora"]
        assert line.startswith(
            f"{folder} was unpacked by an earlier version, which kept no digests"
        )
        caplog.clear()
        assert config.locate() == folder
        assert not caplog.records


@pytest.mark.slow
def test_two_processes_at_once_unpack_a_gguf_file_once(model: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from qlora_cli.models.base import BaseModelConfig",
    ]
    command[-1] += "; print(BaseModelConfig(path=sys.argv[1]).locate())"
    running = [
        subprocess.Popen([*command, str(model)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    found = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (folder,) = found
    assert [path for path in Path(folder).parent.iterdir() if path.is_dir()] == [Path(folder)]


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_model_larger_than_the_free_memory_is_refused(
    model: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(int(tensor.n_elements) for tensor in GGUFReader(model).tensors)
    free = SimpleNamespace(available=int(share * 2 * weights))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    config = BaseModelConfig(path=str(model))
    if share > 1:
        assert config.locate().is_dir()
        return
    with pytest.raises(ModelError, match="of memory and swap are free here") as caught:
        config.locate()
    assert "on a machine with more memory" in str(caught.value.hint)
    assert [path for path in (model.parent / "cache/gguf").iterdir() if path.is_dir()] == []
