"""Write docs/methods.md from what the classes of methods say of themselves; tests hold them to it.

python scripts/gen_methods.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from qlora_cli.adapters import AdapterConfig

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"

HEAD = """\
# Methods

Written by `python scripts/gen_methods.py` from the classes in `qlora_cli/model/adapters/`.
What each of them is held to, property by property, is in [the contract](contract.md); their
settings are in [the reference](reference/recipe.md), recipes in `configs/` and `configs/methods/`.

| `adapter.type` | what it is | merge | quantized base |
|---|---|---|---|
"""

NOTES = """
## Variants of LoRA

Each is an option of `lora`, or like one. All are saved as ordinary LoRA that belongs to the
unchanged base: other tools load it, it is merged, and it takes turns with others.

- **rsLoRA** (`use_rslora`), **DoRA** (`use_dora`), **LoRA+** (`optimizer.lora_plus_ratio`).
- **PiSSA and OLoRA** (`init: pissa`, `pissa_fast`, `olora`) begin with factors that are not zero.
  Others take what they begin as out of the base's weights, so that the adapter belongs to weights
  that are on no disk. Here the base stays as it is, quantized or not, and the update is
  B A - B0 A0, where A0 and B0 are what A and B began as: the same function and the same gradients
  (`test_factors_of_methods.py` holds them to PEFT's), and a saved rank of 2 r. On a quantized base
  this is LoRA on the quantized weights that begins in PiSSA's directions; it does not make the
  error of quantization smaller, as quantizing what PiSSA leaves of the weights does.
- **LoRA-FA** (`freeze_a`) trains B alone. The paper's later version corrects the gradient of B by
  the inverse of A A^T. That is left out: for A as it is drawn, with far fewer rows than columns,
  A A^T is nearly a multiple of the identity, and AdamW takes no notice of a multiple. Fewer weights
  have a gradient and states; activations are kept as for LoRA.
- **AdaLoRA** (`adapter.type: adalora`) does what PEFT's does, and is held to it by a test; what is
  saved has each update's own rank.

**Not here.** LoftQ begins with the error of quantization, so it needs the unquantized weights
beside the quantized ones while a method is attached. EVA begins with the singular vectors of
activations, so it needs batches of the data there. A method is given the loaded model and nothing
else, so `init` refuses both names.

## Virtual tokens

`prompt` and `prefix` put their tokens in at the decoder, and its output is without them: losses,
tasks and generation see a model like any other. Rows are padded and layers are transformers' own,
so a step is slower than one of LoRA. `data.packing` is refused. PEFT's own classes load what is
saved.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_row(kind) for kind in get_args(get_args(AdapterConfig)[0])) + NOTES


def _row(kind: Any) -> str:
    name = get_args(kind.model_fields["type"].annotation)[0]
    what = " ".join([*kind.__doc__.split(), *kind.first_change.split()])
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
