"""Find and load the base model."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import Field, model_validator

from qlora_cli._compat import keep_4bit_weights_trainable
from qlora_cli.common.config import Config, UserPath
from qlora_cli.common.digests import refuse_damaged
from qlora_cli.common.formatting import first_names, value_text
from qlora_cli.common.jinja_sandbox import refuse_endless
from qlora_cli.common.untrusted_files import (
    read_object,
    refuse_code_elsewhere,
    refuse_foreign,
    refuse_no_safetensors,
)
from qlora_cli.common.user_paths import missing_path_hint
from qlora_cli.errors import ModelError
from qlora_cli.models.context import read_context
from qlora_cli.models.gguf import unpack_gguf, unpacked_config
from qlora_cli.models.heads import (
    SCORE_WEIGHT,
    add_placeholder,
    config_settings,
    head_kind,
    refuse_other_labels,
    refuse_without_class,
    require_score,
)
from qlora_cli.models.known_configs import find_known
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.models.vocabulary import check_vocabulary, embedding_rows
from qlora_cli.types import HeadSpec, ModelContext

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")

# Files that are needed to load a model; none of them is a pickle.
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
    """The base model."""

    path: UserPath = Field(min_length=1)
    """Hub id, folder with safetensors weights, or GGUF file (dequantized when loaded)."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. From the Hub this needs `revision`, a full commit:
    a tag or branch can be moved to other code."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention backend; `auto` is sdpa if the model supports it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_pinned = self.revision is not None and re.fullmatch("[0-9a-f]{40}", self.revision)
        is_here = Path(self.path).is_dir()
        if self.trust_remote_code and not is_pinned and not is_here:
            raise ValueError(
                "model.trust_remote_code (true) needs model.revision, a full commit (40 "
                f"hexadecimal digits; found {value_text(self.revision)}): pin the code that you "
                "have read, or give the path of a downloaded folder"
            )
        return self

    def locate(self) -> Path:
        """Return a local folder with the model: `path` itself, unpacked from GGUF, or downloaded.

        Raises:
            ModelError: the model is not found, or has no safetensors weights.
        """
        path = Path(self.path)
        if path.suffix == ".gguf":
            return unpack_gguf(path)
        if path.is_file():
            raise ModelError(
                f"model.path: {self.path} is a file, but not a GGUF file",
                hint="give the folder with config.json and safetensors weights; other weight files "
                "(.bin, .pt, .ckpt) are pickles, which are never loaded",
            )
        folder = path if path.is_dir() else self._fetch()
        refuse_foreign(folder)
        refuse_no_safetensors(folder, f"model.path: {self.path}")
        if self.trust_remote_code:
            refuse_code_elsewhere(folder)
        return folder

    def load(
        self, load_options: dict[str, Any], device: torch.device, head: HeadSpec | None = None
    ) -> PreTrainedModel:
        """Load the base model on `device`, frozen, in training mode.

        Args:
            load_options: what `load_options()` of the quantization returns.
            head: the head that scores rows; None is the one that predicts tokens. If the base does
                not have it, it is a placeholder (`heads.add_placeholder`).

        Raises:
            ModelError: the weights or the architecture cannot be loaded.
        """
        choice = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        model = load_model(
            self.locate(),
            head,
            may_lack_head=True,
            device_map={"": device},
            trust_remote_code=self.trust_remote_code,
            **choice,
            **load_options,
        )
        # PEFT saves this in each adapter as its base: the user's name for it, not a cache folder.
        model.name_or_path = model.config._name_or_path = self.path
        model.requires_grad_(False)
        keep_4bit_weights_trainable(model)
        # from_pretrained() returns it in eval mode, which changes dropout and bitsandbytes.
        model.train()
        return model

    def load_tokenizer(self, chat_template: str | None = None) -> PreTrainedTokenizerFast:
        """Load the model's tokenizer.

        Args:
            chat_template: Jinja text that replaces the tokenizer's own.

        Raises:
            ModelError: it cannot be loaded, is not a fast tokenizer, or has tokens without a row
                in the model's embedding.
        """
        folder = self.locate()
        refuse_prequantized(folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=self.trust_remote_code)
        if chat_template is not None:
            refuse_endless(chat_template, "data.chat_template")
            tokenizer.chat_template = chat_template
        rows = embedding_rows(folder, trust_remote_code=self.trust_remote_code)
        if rows is not None:
            check_vocabulary(tokenizer, rows, folder)
        return tokenizer

    def read_context(self, virtual_tokens: int = 0) -> ModelContext | None:
        """Read how many positions the model was made for; None if its config does not say.

        Args:
            virtual_tokens: those that an adapter puts before each row.

        Raises:
            ModelError: the model is not found, or the virtual tokens take all positions.
        """
        return read_context(read_object(self.locate() / "config.json"), virtual_tokens)

    def is_at_hand(self) -> bool:
        """Tell whether the model is a local folder or file."""
        return Path(self.path).exists()

    def is_missing(self) -> bool:
        """Tell if `path` is meant to be local and does not exist: it cannot be a Hub id, or its
        parent is a local folder."""
        parent = Path(self.path).parent
        is_local = self.path.startswith((".", "/")) or self.path.count("/") > 1
        is_local = is_local or self.path.endswith(".gguf") or (parent != Path() and parent.is_dir())
        return is_local and not self.is_at_hand()

    def read_config(self) -> tuple[PretrainedConfig, str]:
        """Read the config without the weights.

        Returns:
            The config, and where it comes from, in words.

        Raises:
            ModelError: config.json is not found, or cannot be used.
        """
        from transformers import AutoConfig

        path = Path(self.path)
        try:
            if path.suffix == ".gguf" and path.is_file():
                if (unpacked := unpacked_config(path)) is not None:
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
        """Read the config from the Hub, or from our own table if the Hub is not reachable.

        For a model whose full id is in the table, only the local cache is used: without a network,
        asking the Hub takes half a minute to fail.
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
                self._refuse_missing_folder()
                reason = str(error).strip().splitlines()[0]
                raise ModelError(
                    f"model.path: no config.json found for {self.path}: {reason}",
                    hint="give a folder with a config.json, or the Hub id of a well-known model",
                ) from error
            name, dimensions = known
            return AutoConfig.for_model(**dimensions), f"the dimensions of {name} known to qlora"
        return config, f"{self.path} on the Hub"

    def _fetch(self) -> Path:
        import huggingface_hub
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        self._refuse_missing_folder()
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
                f"model.path: {self.path}: not found locally or on the Hub: {reason}",
                hint="check the name, `hf auth login` for a gated model, or give a local folder",
            ) from error

    def _refuse_missing_folder(self) -> None:
        """Refuse a path that names a local folder that does not exist.

        Raises:
            ModelError: the path cannot be a Hub id, or its parent is a local folder.
        """
        if self.is_missing():
            raise ModelError(
                f"model.path: no such folder: {self.path}", hint=missing_path_hint(self.path)
            )


def load_model(
    folder: Path, head: HeadSpec | None = None, *, may_lack_head: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a model from a local folder with safetensors weights.

    Args:
        head: the head that scores rows; None is the one that predicts tokens.
        may_lack_head: accept a folder without that head, and put a placeholder there.
        options: those of transformers' `from_pretrained`.

    Raises:
        ModelError: the weights or the architecture cannot be loaded, or a file is damaged.
    """
    refuse_foreign(folder)
    refuse_no_safetensors(folder, f"model.path: {folder}")
    refuse_prequantized(folder)
    refuse_damaged(folder)
    if head is not None:
        _check_head(folder, head, trust_remote_code=options.get("trust_remote_code", False))
    try:
        loaded: Any = (
            head_kind(head)
            .auto_class()
            .from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **config_settings(head),
                **options,
            )
        )
    # Settings that contradict each other raise any kind of error, wherever they are used first.
    except Exception as error:
        raise ModelError(f"model.path: {folder} cannot be loaded: {error}") from error
    model, found = loaded
    # transformers fills missing weights with random values, at most with a warning.
    missing = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if head is not None:
        # It is small, and trained: rounding it would gain nothing.
        require_score(model).float()
        if may_lack_head and missing == [SCORE_WEIGHT]:
            add_placeholder(model)
            missing = []
    if missing:
        raise ModelError(
            f"model.path: {folder} lacks {len(missing)} weights of a {type(model).__name__}: "
            f"{first_names(missing, 5)}",
            hint="the download may be incomplete",
        )
    return cast("PreTrainedModel", model)


def _check_head(folder: Path, head: HeadSpec, *, trust_remote_code: bool) -> None:
    """Raise ModelError if the model of a folder cannot have this head."""
    from transformers import AutoConfig

    refuse_other_labels(read_object(folder / "config.json"), head, folder)
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path: {folder} cannot be loaded: {error}") from error
    refuse_without_class(config, head)


def refuse_prequantized(folder: Path) -> None:
    """Refuse a folder with quantized weights: an adapter could not be merged into it later.

    Raises:
        ModelError: config.json cannot be read, or has a `quantization_config`.
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
            hint="use the 16-bit model; quantization.type quantizes it when it is loaded",
        )


def start_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: recompute each layer's activations in the backward pass.

    Raises:
        ModelError: the architecture does not support it.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"training.gradient_checkpointing: {error}",
            hint="--set training.gradient_checkpointing=false",
        ) from error
    # The call above also makes the embedding's output require a gradient. Only the reentrant form
    # needs that, and it would backpropagate through every frozen layer for nothing.
    model.disable_input_require_grads()
