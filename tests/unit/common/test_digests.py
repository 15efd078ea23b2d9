"""A folder of weights with a file that is not as it was written is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.common.digests import DIGESTS, refuse_damaged, write_digests
from qlora_cli.errors import ModelError
from tests.damage import DAMAGE

FILES = {
    "adapter_model.safetensors": b"\x08" + bytes(range(200)),
    "adapter_config.json": b'{"r": 8, "lora_alpha": 16}',
    "tokenizer.json": b"{}",
    "additional_chat_templates/rag.jinja": b"{{ x }}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "last"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_digests(folder)
    return folder


DATA = ["adapter_model.safetensors", "tokenizer.json"]
SETTINGS = [name for name in FILES if name not in DATA]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_name(
    folder: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    refuse_damaged(folder)
    (folder / name).write_bytes(change(FILES[name]))
    with pytest.raises(ModelError, match="is damaged: its SHA-256 is") as caught:
        refuse_damaged(folder, hint="merge again")
    assert str(caught.value).startswith(f"{folder / name} is damaged")
    assert str(caught.value.hint).startswith("merge again; if you changed it yourself, ")
    assert f"delete {folder / DIGESTS}" in str(caught.value.hint)


@pytest.mark.parametrize("name", SETTINGS)
def test_edited_settings_are_named_in_a_warning(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_damaged(folder)
    assert not caplog.records
    for change in DAMAGE.values():
        (folder / name).write_bytes(change(FILES[name]))
        refuse_damaged(folder)
    (folder / name).unlink()
    refuse_damaged(folder)
    *edited, removed = (record.message for record in caplog.records)
    assert len(edited) == len(DAMAGE)
    assert all(line.startswith(f"{folder / name} has changed since it was") for line in edited)
    assert removed.startswith(f"{folder / name} was removed since it was")


@pytest.mark.parametrize("name", DATA)
def test_a_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing: {DIGESTS} lists it"):
        refuse_damaged(folder)


def test_a_file_of_another_run_is_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(FILES["adapter_model.safetensors"][::-1])
    with pytest.raises(ModelError, match="is damaged"):
        refuse_damaged(folder)


def test_the_card_may_change_and_files_may_be_added(folder: Path) -> None:
    (folder / "README.md").write_text("mine", encoding="utf-8")
    write_digests(folder)
    (folder / "README.md").write_text("edited", encoding="utf-8")
    (folder / "model.q4_k_m.gguf").write_bytes(b"GGUF")
    refuse_damaged(folder)


def test_a_folder_without_digests_is_not_checked(folder: Path) -> None:
    (folder / DIGESTS).unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refuse_damaged(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": ', "\0", *(json.dumps({n: ""}) for n in ("../x", "/etc/passwd"))]
)
def test_digests_that_cannot_be_read_are_refused(folder: Path, text: str) -> None:
    (folder / DIGESTS).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=f"{DIGESTS} cannot be read"):
        refuse_damaged(folder)


def test_a_link_out_of_the_folder_is_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(FILES["tokenizer.json"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "other")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        refuse_damaged(folder)
