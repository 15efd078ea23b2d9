"""The folder for everything that can be computed or downloaded again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $QLORA_CACHE, or ~/.cache/qlora if it is not set."""
    return Path(os.environ.get("QLORA_CACHE", "~/.cache/qlora")).expanduser()
