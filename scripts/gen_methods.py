"""Write docs/methods.md from what the classes of methods say of themselves; tests hold them to it.

python scripts/gen_methods.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from qlora_cli.model.adapters import AdapterConfig

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"

HEAD = """\
# Methods

Written by `python scripts/gen_methods.py` from the classes in `qlora_cli/model/adapters/`.
What each of them is held to, property by property, is in [the contract](contract.md); their
settings are in [the reference](reference/recipe.md), a recipe for each in `configs/methods/`.

| `adapter.type` | what it is | merge | quantized base |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_row(kind) for kind in get_args(get_args(AdapterConfig)[0]))


def _row(kind: Any) -> str:
    name = get_args(kind.model_fields["type"].annotation)[0]
    what = " ".join(kind.__doc__.split())
    merge = f"refused: {kind.no_merge}" if kind.no_merge else "yes"
    refused = kind.no_quantization
    held = [one for one in ("nf4", "fp4", "int8") if one not in refused]
    quantized = ", ".join(held) or "no"
    if refused:
        quantized += f"; not {', '.join(refused)}: {next(iter(refused.values()))}"
    return f"| `{name}` | {what} | {merge} | {quantized} |\n"


def main() -> None:
    """Write the page, or say that it is old."""
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/methods.md is not what the classes say: python scripts/gen_methods.py")


if __name__ == "__main__":
    main()
