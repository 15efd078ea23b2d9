"""The base model and its tokenizer."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import Field, model_validator

from qlora_cli._compat import keep_4bit_weights_trainable, restore_splitting
from qlora_cli.common.atomic_files import atomic_folder
from qlora_cli.common.cache_folder import cache_folder
from qlora_cli.common.config import Config
from qlora_cli.common.hashing import hash_file
from qlora_cli.common.jinja_sandbox import refuse_endless
from qlora_cli.common.untrusted_files import (
    read_object,
    refuse_code_elsewhere,
    refuse_foreign,
    refuse_no_safetensors,
)
from qlora_cli.errors import ModelError
from qlora_cli.models.heads import CAUSAL_LM
from qlora_cli.models.known_configs import find_known

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")

# What a model needs to be loaded without unpickling anything.
_WANTED_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*processor*.json",
    "LICENSE*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
]


class BaseModelConfig(Config):
    """Where the base model comes from."""

    path: str = Field(min_length=1)
    """Hub id, folder of safetensors, or GGUF file (dequantized when loaded)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. From the hub it needs `revision`, a full commit: a
    tag or branch can be moved to other code."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention back end; `auto` takes sdpa where the model has it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_pinned = self.revision is not None and re.fullmatch("[0-9a-f]{40}", self.revision)
        is_here = Path(self.path).expanduser().is_dir()
        if self.trust_remote_code and not is_pinned and not is_here:
            raise ValueError(
                "model.trust_remote_code (true) needs model.revision, a full commit (40 "
                f"hexadecimal digits; found {self.revision}): pin the code that you have read, or "
                "name a folder that it was downloaded to"
            )
        return self

    def locate(self) -> Path:
        """A local folder with the model: itself, unpacked from GGUF, or fetched from the hub.

        Raises:
            ModelError: there is no such model, or it has no safetensors.
        """
        path = Path(self.path).expanduser()
        if path.suffix == ".gguf":
            return _unpack_gguf(path)
        if path.is_file():
            raise ModelError(
                f"model.path: {self.path} is a file, and no GGUF file",
                hint="name the folder that holds config.json and safetensors weights; other files "
                "with weights in them (.bin, .pt, .ckpt) are pickles, which are never loaded",
            )
        folder = path if path.is_dir() else self._fetch()
        refuse_foreign(folder)
        refuse_no_safetensors(folder, f"model.path: {self.path}")
        if self.trust_remote_code:
            refuse_code_elsewhere(folder)
        return folder

    def load(self, load_options: dict[str, Any], device: torch.device) -> PreTrainedModel:
        """The base model on `device`, frozen, in training mode.

        Args:
            load_options: what `Nf4.load_options()` and its kin return.

        Raises:
            ModelError: the weights or the architecture cannot be loaded.
        """
        choice = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        model = load_model(
            self.locate(),
            device_map={"": device},
            trust_remote_code=self.trust_remote_code,
            **choice,
            **load_options,
        )
        # Recorded in every adapter as what it belongs to: the user's name for it, not a cache.
        model.name_or_path = model.config._name_or_path = self.path
        model.requires_grad_(False)
        keep_4bit_weights_trainable(model)
        # from_pretrained() returns eval mode, in which dropout and bitsandbytes act otherwise.
        model.train()
        return model

    def load_tokenizer(self, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        """The model's tokenizer, with the given chat template (Jinja text) if there is one.

        Raises:
            ModelError: it cannot be loaded, or gives no offsets.
        """
        folder = self.locate()
        refuse_prequantized(folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=self.trust_remote_code)
        if chat_template is not None:
            refuse_endless(chat_template, "data.chat_template")
            tokenizer.chat_template = chat_template
        return tokenizer

    def is_at_hand(self) -> bool:
        """Whether the model is a folder or file here."""
        return Path(self.path).expanduser().exists()

    def read_config(self) -> tuple[PretrainedConfig, str]:
        """What is known of the model without its weights, and where from.

        Raises:
            ModelError: there is no config.json to be had, or it cannot be used.
        """
        from transformers import AutoConfig

        path = Path(self.path).expanduser()
        try:
            if path.suffix == ".gguf" and path.is_file():
                if (unpacked := _unpacked_folder(path)).is_dir():
                    return AutoConfig.from_pretrained(unpacked, local_files_only=True), path.name
                config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
                return config, path.name
            if path.is_dir():
                refuse_prequantized(path)
                config = AutoConfig.from_pretrained(
                    path, local_files_only=True, trust_remote_code=self.trust_remote_code
                )
                return config, f"{path}/config.json"
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"model.path: {path} cannot be read: {error}") from error
        return self._read_config_by_name()

    def _read_config_by_name(self) -> tuple[PretrainedConfig, str]:
        """From the hub; from our own table where the hub cannot be asked.

        For what is in the table by its full name the hub is not asked, only what it gave before:
        where there is no network, that would be half a minute of trying.
        """
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from transformers import AutoConfig

        known = find_known(self.path)
        is_sure = known is not None and known[0].partition("/")[0] == self.path.partition("/")[0]
        try:
            file = huggingface_hub.hf_hub_download(
                self.path, "config.json", revision=self.revision, local_files_only=is_sure
            )
            refuse_prequantized(Path(file).parent)
            config = AutoConfig.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            if known is None:
                reason = str(error).strip().splitlines()[0]
                raise ModelError(
                    f"model.path: no config.json of {self.path} is to be had: {reason}",
                    hint="give a folder with a config.json, or the name of a well-known model",
                ) from error
            name, dimensions = known
            return AutoConfig.for_model(**dimensions), f"the dimensions of {name} known to qlora"
        return config, f"{self.path} on the hub"

    def _fetch(self) -> Path:
        import huggingface_hub
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        parent = Path(self.path).parent
        is_local = self.path.startswith((".", "/", "~")) or self.path.count("/") > 1
        if is_local or (parent != Path() and parent.is_dir()):
            raise ModelError(f"model.path: no such folder: {self.path}")
        wanted = [*_WANTED_FILES, "*.py"] if self.trust_remote_code else _WANTED_FILES
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.path, revision=self.revision, allow_patterns=wanted
                )
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"model.path: {self.path} is no local folder, and not to be had from the hub: "
                f"{reason}",
                hint="check the name, `hf auth login` for a gated model, or give a folder",
            ) from error


_UNPACKED = 3
"""Raised when GGUF files are unpacked otherwise than before."""


def _unpack_gguf(path: Path) -> Path:
    """Dequantize a GGUF file into a bfloat16 folder, once for each content of the file."""
    import filelock

    if not path.is_file():
        raise ModelError(f"model.path: no such file: {path}")
    folder = _unpacked_folder(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Processes that train together, or two runs at once: the first unpacks, the others wait.
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            log.info("unpacking %s to bfloat16 in %s (once)", path.name, folder)
            _write_unpacked(path, folder)
    return folder


def _unpacked_folder(path: Path) -> Path:
    """Where the content of a GGUF file lies, or will lie, unpacked."""
    return cache_folder() / "gguf" / f"{hash_file(path)[:32]}-{_UNPACKED}"


def _write_unpacked(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GgufConfig

    try:
        with atomic_folder(folder) as unfinished, TemporaryDirectory(prefix="qlora-") as made:
            # transformers would believe a config or tokenizer in the same folder, not the file.
            alone = Path(made)
            (alone / path.name).symlink_to(path.resolve())
            # Its progress bar cannot be switched off, and is not an error.
            with contextlib.redirect_stderr(io.StringIO()):
                model = CAUSAL_LM.auto_class().from_pretrained(
                    alone,
                    gguf_file=path.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.bfloat16,
                    local_files_only=True,
                )
            tokenizer = AutoTokenizer.from_pretrained(
                alone, gguf_file=path.name, local_files_only=True
            )
            restore_splitting(tokenizer, path)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    # A damaged file raises any kind of error, deep in the libraries that read it.
    except Exception as error:
        raise ModelError(f"model.path: {path} cannot be read as a model: {error}") from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model or adapter folder.

    Raises:
        ModelError: it cannot be loaded, leads out of its folder, or is not a fast one (masks need
            offsets into the text).
    """
    from transformers import AutoTokenizer

    refuse_foreign(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # A damaged file fails in any way; the tokenizers library raises Exception itself.
    except Exception as error:
        raise ModelError(f"no usable tokenizer in {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} in {folder} gives no offsets into the text")
    if tokenizer.pad_token_id is None:
        # Padding is masked by position and never by id, so sharing the id does no harm.
        tokenizer.pad_token = tokenizer.eos_token
    for template in _templates_of(tokenizer):
        refuse_endless(template, f"the chat template in {folder}")
    return cast("PreTrainedTokenizerFast", tokenizer)


def _templates_of(tokenizer: Any) -> list[str]:
    """A tokenizer has no chat template, one, or several by name."""
    found = tokenizer.chat_template or {}
    return list(found.values()) if isinstance(found, dict) else [found]


def load_model(folder: Path, **options: Any) -> PreTrainedModel:
    """A causal language model from a local folder of safetensors.

    Raises:
        ModelError: the weights or the architecture cannot be loaded.
    """
    refuse_foreign(folder)
    refuse_no_safetensors(folder, f"model.path: {folder}")
    refuse_prequantized(folder)
    try:
        loaded: Any = CAUSAL_LM.auto_class().from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    # Settings that do not belong together fail in any way, wherever they are used first.
    except Exception as error:
        raise ModelError(f"model.path: {folder} cannot be loaded: {error}") from error
    model, found = loaded
    # transformers gives a missing weight random values, with a warning at most.
    if missing := sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"])):
        raise ModelError(
            f"model.path: {folder} lacks {len(missing)} weights of a {type(model).__name__}: "
            f"{', '.join(missing[:5])}",
            hint="the download may be incomplete",
        )
    return cast("PreTrainedModel", model)


def refuse_prequantized(folder: Path) -> None:
    """Refuse weights that were quantized by somebody else: they could not be merged later.

    Raises:
        ModelError: there is no readable config.json, or it has a `quantization_config`.
    """
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: no readable config.json in {folder}: {error}") from error
    if "quantization_config" in config:
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else "unknown"
        raise ModelError(
            f"model.path: {folder} is already quantized ({method}), so an adapter trained on it "
            "could not be merged",
            hint="name the 16-bit model; quantization.type quantizes it when loaded",
        )


def start_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    Raises:
        ModelError: the architecture has no support for it.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"training.gradient_checkpointing: {error}",
            hint="--set training.gradient_checkpointing=false",
        ) from error
    # The enabling call also makes the embedding's output require a gradient, which only the
    # reentrant form needs; kept, it would backpropagate through every frozen layer for nothing.
    model.disable_input_require_grads()


def stop_token_ids(folder: Path) -> list[int]:
    """Where generation ends, as a folder of weights says; nothing if it does not say.

    Raises:
        ModelError: its generation_config.json cannot be read.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        found = as_ids(read_object(path).get("eos_token_id"))
        if not all(type(one) is int for one in found):
            raise ValueError(f"eos_token_id ({found}) holds no token ids")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return found


def as_ids(token_ids: int | list[int] | None) -> list[int]:
    """A generation config names no token, one, or several."""
    return token_ids if isinstance(token_ids, list) else [] if token_ids is None else [token_ids]


def set_stop_tokens(model: PreTrainedModel, stop_token_ids: Iterable[int]) -> None:
    """Let generation end at every token that training teaches as the end of an answer."""
    known = as_ids(model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = sorted({*known, *stop_token_ids})
