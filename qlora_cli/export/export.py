"""Write other forms of a model folder for serving: GGUF files, weights packed into 4 bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_cli._compat import quiet_libraries
from qlora_cli.common.digests import refuse_damaged
from qlora_cli.common.untrusted_files import read_object, refuse_foreign, refuse_no_safetensors
from qlora_cli.errors import RecipeError
from qlora_cli.export.bnb_4bit import export_4bit
from qlora_cli.export.gguf import export_gguf, require_gguf_tools
from qlora_cli.export.report import ExportReport
from qlora_cli.models.heads import read_head
from qlora_cli.models.shards import INDEX
from qlora_cli.recipe.load import load_recipe
from qlora_cli.runs.run_folder import RunFolder, is_run
from qlora_cli.types import HeadSpec


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
    refuse_head(read_head(read_object(folder / "config.json")), str(folder), gguf, bnb_4bit)
    require_gguf_tools(gguf)
    refuse_damaged(folder)
    return ExportReport(
        model=str(folder),
        gguf=export_gguf(folder, gguf) if gguf else [],
        bnb_4bit=None if bnb_4bit is None else export_4bit(folder, bnb_4bit, run),
    )


def require_gguf(run: Path, gguf: Sequence[str]) -> None:
    """Check that GGUF files of a run can be written, before a long merge.

    Raises:
        RecipeError: the run trains a head that scores rows, or a tool is missing.
    """
    if gguf and is_run(run):
        head = load_recipe(RunFolder(run).recipe).recipe.objective.head
        refuse_head(head, str(run), gguf, None)
    require_gguf_tools(gguf)


def refuse_head(
    head: HeadSpec | None, model: str, gguf: Sequence[str], bnb_4bit: Path | None
) -> None:
    """Refuse to export a model that scores rows.

    Args:
        model: the folder or run, for the message.

    Raises:
        RecipeError: it has such a head, and another form of it is asked for.
    """
    if head is None or not (gguf or bnb_4bit):
        return
    option, why = (
        (f"--gguf {gguf[0]}", "llama.cpp's converter does not write the head of a decoder")
        if gguf
        else ("--bnb-4bit", "the packed model is compared by the tokens that it predicts")
    )
    raise RecipeError(
        f"{option}: {model} scores rows ({', '.join(head.labels)}) and predicts no tokens; {why}",
        hint="serve the merged folder: transformers' AutoModelForSequenceClassification and vLLM "
        "load it; qlora predict applies it to a file",
    )
