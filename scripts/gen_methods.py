"""Write docs/methods.md from the classes of the training methods.

    python scripts/gen_methods.py [--check]

With --check it writes nothing, and fails if the page is not current.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from qlora_cli.adapters import AdapterConfig

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"

HEAD = """\
# Training methods

Choose a method by `adapter.type`. The settings of each are in
[the reference](reference/recipe.md), and recipes are in `configs/` and `configs/methods/`. The
tests hold each method to [the contract](contract.md), property by property.

This page is written by `python scripts/gen_methods.py` from the classes in `qlora_cli/adapters/`.

| `adapter.type` | method | can be merged | quantized base |
|---|---|---|---|
"""

NOTES = """
## Variants of LoRA

Each is an option of `lora` or a method like it. All of them are saved as ordinary LoRA for the
unchanged base, so other tools load them, you can merge them, and `qlora chat` can swap them.

- **rsLoRA**: `use_rslora`. **DoRA**: `use_dora`. **LoRA+**: `optimizer.lora_plus_ratio`.
- **PiSSA and OLoRA** (`init: pissa`, `pissa_fast`, `olora`) start with factors that are not zero.
  Other implementations subtract the initial update from the base's weights, so the adapter belongs
  to weights that are not on any disk. Here the base stays unchanged, quantized or not, and the
  update is B A - B0 A0, where A0 and B0 are the initial factors. Function and gradients are the
  same (`test_lora_init.py` compares them with PEFT's), and the saved rank is 2 r. On a quantized
  base this is LoRA on the quantized weights that starts in PiSSA's directions. It does not reduce
  the quantization error, as quantizing the residual of PiSSA does.
- **LoRA-FA** (`freeze_a`) trains only B. The paper's later version multiplies the gradient of B by
  the inverse of A A^T, which is left out here: for a random A with far fewer rows than columns,
  A A^T is nearly a multiple of the identity, and AdamW is invariant to such a factor. Fewer weights
  need gradients and optimizer states; the activations take as much memory as with LoRA.
- **AdaLoRA** (`adapter.type: adalora`) computes what PEFT's does (a test compares them). Each
  update is saved with its own remaining rank.

**Not supported.** LoftQ starts from the quantization error, so it needs the unquantized weights in
addition to the quantized ones. EVA starts with the singular vectors of activations, so it needs
batches of data. A method gets only the loaded model, so `init` refuses both names.

## Virtual tokens

`prompt` and `prefix` insert their tokens at the decoder and remove them from its output, so losses,
tasks and generation work as with any other model. Rows are padded, and the layers are those of
transformers, so a step is slower than with LoRA. `data.packing` is refused. PEFT's own classes load
the saved adapter.
"""


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(_row(kind) for kind in get_args(get_args(AdapterConfig)[0])) + NOTES


def _row(kind: Any) -> str:
    name = get_args(kind.model_fields["type"].annotation)[0]
    description = " ".join([*kind.__doc__.split(), *kind.first_change.split()])
    merge = f"no: {kind.no_merge}" if kind.no_merge else "yes"
    refused = kind.no_quantization
    supported = [one for one in ("nf4", "fp4", "int8") if one not in refused]
    quantized = ", ".join(supported) or "no"
    if refused:
        quantized += f"; not {', '.join(refused)}: {next(iter(refused.values()))}"
    return f"| `{name}` | {description} | {merge} | {quantized} |\n"


def main() -> None:
    """Write the page, or check that it is current."""
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/methods.md is not current: run python scripts/gen_methods.py")


if __name__ == "__main__":
    main()
