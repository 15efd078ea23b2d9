from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoKrConfig, LoraConfig, PeftConfig

from qlora_cli.adapters.files import CONFIG, read_config
from qlora_cli.errors import ModelError


def read(config: PeftConfig, folder: Path, **settings: Any) -> PeftConfig:
    """Save PEFT's settings, change some of them in the file, and read it."""
    config.save_pretrained(str(folder))
    path = folder / CONFIG
    document = json.loads(path.read_text(encoding="utf-8")) | settings
    path.write_text(json.dumps(document), encoding="utf-8")
    return read_config(folder, {"a.lora_A.weight": (8, 16)})


@pytest.mark.parametrize("config", [LoraConfig(), LoKrConfig()], ids=lambda one: one.peft_type)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", True),
        ("r", "8"),
        ("inference_mode", []),
        ("inference_mode", "true"),
        ("inference_mode", 1),
        ("inference_mode", {"on": True}),
    ],
)
def test_switches_and_numbers_of_another_type_are_refused(
    config: PeftConfig, key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"{key} \(.*\) is not a valid setting of an adapter"):
        read(config, tmp_path, **{key: value})


@pytest.mark.parametrize("key", ["use_dora", "use_rslora", "lora_dropout", "qalora_group_size"])
@pytest.mark.parametrize("value", [[], [8], "no", {}])
def test_settings_of_lora_of_another_type_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{key} \(.*\) is not a valid setting of an adapter"):
        read(LoraConfig(), tmp_path, **{key: value})


def test_whole_numbers_with_a_point_and_null_are_read(tmp_path: Path) -> None:
    config: Any = read(LoraConfig(r=4), tmp_path, lora_alpha=16.0, use_dora=None)
    assert (config.r, config.lora_alpha, bool(config.use_dora)) == (4, 16, False)
