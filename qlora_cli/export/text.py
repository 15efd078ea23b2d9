"""Export reports as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.common.formatting import agreement_text, mib_text


def export_text(report: Mapping[str, Any]) -> str:
    """What was written, and how near it is to the model (`report` as `export` returns it)."""
    lines = []
    for file in report["gguf"]:
        check = file["check"]
        found = (
            "not checked (llama-cpp-python is not installed)"
            if check is None
            else f"in llama.cpp: {check['tokens']} token ids equal, {agreement_text(check)}"
        )
        lines.append(f"{file['path']}: {mib_text(file['bytes'])}; {found}")
    if packed := report["bnb_4bit"]:
        lines.append(f"{packed['path']}: {mib_text(packed['bytes'])}")
        lines.append(f"against the model before it was packed: {agreement_text(packed)}")
        if trained := packed["trained"]:
            lines.append(f"against what was trained: {agreement_text(trained)}")
        lines.append("nothing is lost with the base in 4 bit and the adapter beside it")
    return "\n".join(lines)
