"""Write other forms of a model folder for serving: GGUF files, weights packed into 4 bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.digests import refuse_damaged
from qlora_cli.common.untrusted_files import refuse_foreign, refuse_no_safetensors
from qlora_cli.errors import RecipeError
from qlora_cli.export.bnb_4bit import export_4bit
from qlora_cli.export.gguf import export_gguf, require_gguf_tools
from qlora_cli.export.report import ExportReport
from qlora_cli.models.shards import INDEX


def export(
    folder: Path,
    *,
    gguf: Sequence[str] = (),
    bnb_4bit: Path | None = None,
    run: Path | None = None,
) -> ExportReport:
    """Write other forms of a model folder, and compare each with it.

    Args:
        gguf: kinds of GGUF files to write into the folder.
        bnb_4bit: new folder for a model in bitsandbytes' NF4.
        run: the run that `folder` was merged from, to compare the 4-bit model with too.

    Raises:
        RecipeError: there is nothing to write, no such folder, an output exists already, or a tool
            is missing.
        ModelError: a written model does not compute what `folder` computes.
    """
    quiet_libraries()
    if not gguf and bnb_4bit is None:
        raise RecipeError("nothing to export", hint="give --gguf KIND, or --bnb-4bit DIR")
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{folder} is not a model folder", hint="qlora merge RUN --output DIR writes one"
        )
    refuse_foreign(folder)
    # Under these names: without them llama.cpp's converter would read pickles.
    refuse_no_safetensors(folder, str(folder), ["model.safetensors", INDEX])
    require_gguf_tools(gguf)
    refuse_damaged(folder)
    return ExportReport(
        model=str(folder),
        gguf=export_gguf(folder, gguf) if gguf else [],
        bnb_4bit=None if bnb_4bit is None else export_4bit(folder, bnb_4bit, run),
    )
