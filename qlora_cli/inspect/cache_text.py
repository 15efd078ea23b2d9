"""The list of cached datasets as text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qlora_cli.common.formatting import age_text, size_text


def cache_text(report: Mapping[str, Any]) -> str:
    """List the cached datasets, or those just deleted (`report` as `qlora cache --json`)."""
    sets = report["sets"]
    total = f"{len(sets)} prepared sets, {size_text(sum(one['size'] for one in sets))}"
    if report["cleared"]:
        return f"deleted {total}"
    lines = [
        f"{size_text(one['size'])}  {one['num_rows']:>9,} rows  "
        f"used {age_text(time.time() - one['used'])}"
        f"  {' '.join(one['paths']) or 'unfinished'}"
        for one in sets
    ]
    return "\n".join([*lines, total])
