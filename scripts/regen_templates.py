"""Regenerate the stored outcomes of chat templates in tests/golden.

templates.json: the templates in the installed TRL. templates_packages.json: the templates of
axolotl and vLLM, if QLORA_TEMPLATES names a folder with one subfolder of `*.jinja` files (at any
depth) per package; without it, the file stays as it is. To get them:

    pip download --no-deps axolotl==0.19.0 vllm==0.33.0
    for wheel in *.whl; do unzip -q $wheel '*.jinja' -d templates; done
    export QLORA_TEMPLATES=$PWD/templates

The commit message has to say why an outcome changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A script can import only from its own folder, and the tests are elsewhere.
sys.path.insert(0, str(ROOT))

from tests.golden.templates import (  # noqa: E402
    GOLDEN,
    GOLDEN_PACKAGES,
    names,
    outcomes,
    packages,
)


def main() -> None:
    """Test every template and store the outcomes."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    found = {GOLDEN: names(), GOLDEN_PACKAGES: list(packages())}
    if not any(found.values()):
        sys.exit("no templates: install the development extra, which brings trl")
    for path, templates in found.items():
        if templates:
            _store(path, templates)
    print("now run python scripts/gen_docs.py")


def _store(path: Path, templates: Iterable[str]) -> None:
    kept = {name: outcomes(name) for name in templates}
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path.name}: {len(kept)} templates")


if __name__ == "__main__":
    main()
