"""What is trained. To add a method: one class here, and its name in the union."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from qlora_cli.errors import ModelError
from qlora_cli.part import Part

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from qlora_cli.model.edits import Edits
    from qlora_cli.model.names import Names


class FullFineTune(Part):
    """Every weight is trained."""

    type: Literal["full"] = "full"
    trains_base: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make every weight trainable, in float32: bfloat16 loses updates below its grid."""
        model.float().requires_grad_(True)
        return model

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the weights as an ordinary model folder."""
        model.save_pretrained(folder)

    def edits(self, skeleton: PreTrainedModel, names: Names, folder: Path) -> Edits:
        """What a saved training changed in the base (`skeleton`: on the meta device)."""
        from qlora_cli.model.edits import WholeModel

        return WholeModel(skeleton, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Put saved weights in place of the base's. `model` itself is changed.

        Raises:
            ModelError: they cannot be read, or are of another model.
        """
        import torch

        from qlora_cli.foreign import refuse_foreign, refuse_no_safetensors

        refuse_foreign(folder)
        refuse_no_safetensors(folder, str(folder))
        kind: Any = type(self.attach(model))
        try:
            # Not the files themselves: they may hold in several tensors what the model has in one.
            saved, found = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        # Settings that do not belong together fail in any way, wherever they are used first.
        except Exception as error:
            raise ModelError(f"{folder} does not fit the base model: {error}") from error
        missing = {*found["missing_keys"], *map(str, found["mismatched_keys"])}
        if missing or found["unexpected_keys"]:
            raise ModelError(_key_mismatch(folder, missing, found["unexpected_keys"]))
        model.load_state_dict(saved.state_dict())
        return model


class LoRA(Part):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    type: Literal["lora"] = "lora"
    trains_base: ClassVar[bool] = False
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / r (by alpha / sqrt(r) with `use_rslora`)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the update."""
    target_modules: Literal["all-linear"] | list[str] | str = "all-linear"
    """`all-linear` (all but the head), a list of module names, or one regular expression."""
    exclude_modules: list[str] | str | None = None
    """Names, or one regular expression, of modules to leave out."""
    modules_to_save: list[str] = Field([])
    """Modules trained in full and saved with the adapter, such as `lm_head`."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    """Module name or regular expression -> its own rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Module name or regular expression -> its own alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, https://arxiv.org/abs/2402.09353)."""
    init_from: str | None = Field(None, min_length=1)
    """Folder of a run (its last weights) or of an adapter whose weights a new run begins with; its
    rank, alpha and targets must be the same."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Put the update beside each target; it is zero at first, so the model is unchanged.

        Trained weights are float32. The random half of the update is drawn from torch's generator.

        Raises:
            ModelError: a target (or pattern) matches no module.
        """
        from peft import LoraConfig, get_peft_model

        from qlora_cli.kernels.lora_layers import layer_classes

        self._check_names(model)
        self._refuse_tied(model)
        self._refuse_dora_in_8_bit(model)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            modules_to_save=self.modules_to_save or None,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
        config._register_custom_module(layer_classes(model))
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise ModelError(f"adapter: PEFT refuses it: {error}") from error
        # PEFT keeps names in sets, whose order is another in each process: equal runs would not
        # write equal files.
        for key in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(config, key), set):
                setattr(config, key, sorted(names))
        return _trained_in_float32(adapted)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the adapter in PEFT's own format."""
        # "auto" would ask the hub whether the base's vocabulary has grown.
        model.save_pretrained(folder, save_embedding_layers=False)
        # PEFT's form for a model card, with its questions unanswered.
        (folder / "README.md").unlink()

    def edits(self, skeleton: PreTrainedModel, names: Names, folder: Path) -> Edits:
        """What a saved adapter changes in the base (`skeleton`: on the meta device)."""
        from qlora_cli.model.edits import Adapter

        return Adapter(skeleton, names, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """Put a saved adapter on the base model it belongs to; still trainable.

        Raises:
            ModelError: it does not fit the model tensor for tensor.
        """
        from peft import get_peft_model, set_peft_model_state_dict

        from qlora_cli.kernels.lora_layers import layer_classes
        from qlora_cli.model.adapter_files import read_adapter, refuse_endless_patterns
        from qlora_cli.model.edits import grow_vocabulary, match_saved, refuse_changed_base

        config, saved = read_adapter(folder)
        refuse_changed_base(config, folder)
        refuse_endless_patterns(config, [name for name, _ in model.named_modules()], folder)
        config.inference_mode = False  # as saved it would freeze what was trained
        try:
            config._register_custom_module(layer_classes(model))
            shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
            grow_vocabulary(model, shapes)
            own = {id(parameter) for parameter in model.parameters()}
            adapted = get_peft_model(model, config)
            # float32 first: copied into a 16-bit module, what was trained would be rounded.
            _trained_in_float32(adapted)
            match_saved(adapted, shapes, own, folder)
            set_peft_model_state_dict(adapted, saved)
        except ModelError:
            raise
        # PEFT checks no types: what is wrong fails wherever it is used first.
        except Exception as error:
            raise ModelError(f"{folder} does not fit the base model: {error}") from error
        return adapted

    def begin_from(self, model: PeftModel, folder: Path) -> None:
        """Put the weights of a saved adapter in place of those that `attach` began with.

        Raises:
            ModelError: it was trained with other settings, or does not fit tensor for tensor.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        from qlora_cli.model.adapter_files import read_adapter
        from qlora_cli.model.edits import match_saved, refuse_changed_base

        config, saved = read_adapter(folder)
        refuse_changed_base(config, folder)
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
        _refuse_other_settings(config, model.peft_config["default"], saved, live, folder)
        own = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        match_saved(model, {name: tuple(t.shape) for name, t in saved.items()}, own, folder)
        if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
            raise ModelError(f"{folder}: {len(bad)} tensors are not finite (such as {bad[0]})")
        set_peft_model_state_dict(model, saved)

    def _refuse_tied(self, model: PreTrainedModel) -> None:
        """An update beside a matrix that two modules share would be merged into both of them."""
        if not model.config.tie_word_embeddings or not isinstance(self.target_modules, list):
            return
        tied = [model.get_input_embeddings(), model.get_output_embeddings()]
        for name, module in model.named_modules():
            is_target = any(_is_suffix(target, name) for target in self.target_modules)
            if is_target and any(module is one for one in tied):
                raise ModelError(
                    f"adapter.target_modules: {name} shares its weights with the "
                    "embedding or the head of this model, so an update of one cannot be merged",
                    hint="adapter.modules_to_save trains them in full",
                )

    def _refuse_dora_in_8_bit(self, model: PreTrainedModel) -> None:
        from bitsandbytes.nn import Linear8bitLt

        if self.use_dora and any(isinstance(m, Linear8bitLt) for m in model.modules()):
            raise ModelError(
                "adapter.use_dora (true) does not work with quantization.type (int8): peft cannot "
                "dequantize an 8-bit weight before its first forward",
                hint="--set quantization.type=nf4, or --set adapter.use_dora=false",
            )

    def _check_names(self, model: PreTrainedModel) -> None:
        modules = [name for name, module in model.named_modules() if not list(module.children())]
        lists = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        for key, value in lists.items():
            if isinstance(value, list):
                _require_each(f"adapter.{key}", value, modules, _is_suffix)
            elif value not in (None, "all-linear"):
                _require_each(f"adapter.{key}", [value], modules, _is_full_match)
        _require_each("adapter.modules_to_save", self.modules_to_save, modules, _is_suffix)
        _require_each("adapter.rank_pattern", self.rank_pattern, modules, _is_pattern)
        _require_each("adapter.alpha_pattern", self.alpha_pattern, modules, _is_pattern)


# The three ways in which PEFT holds a name of its config against a module's name.
def _is_suffix(wanted: str, module: str) -> bool:
    return module == wanted or module.endswith(f".{wanted}")


def _is_full_match(wanted: str, module: str) -> bool:
    return re.fullmatch(wanted, module) is not None


def _is_pattern(wanted: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({wanted})$", module) is not None


def _require_each(
    key: str, wanted: Iterable[str], modules: list[str], matches: Callable[[str, str], bool]
) -> None:
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    for name in wanted:
        try:
            found = any(matches(name, module) for module in modules)
        except re.error as error:
            raise ModelError(f"{key}: {name!r} is no regular expression: {error}") from error
        if not found:
            near = difflib.get_close_matches(name, leaves, n=3)
            raise ModelError(
                f"{key}: {name!r} matches no module of the model, which has {', '.join(leaves)}",
                hint=f"did you mean {' or '.join(near)}?" if near else None,
            )


_AGREED = {
    "peft_type": "type",
    "r": "r",
    "lora_alpha": "alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
}
"""What of PEFT's config has to be the same for weights to mean the same, by our names."""


def _refuse_other_settings(
    config: PeftConfig, live: PeftConfig, saved: Iterable[str], wanted: Iterable[str], folder: Path
) -> None:
    """
    Args:
        saved: names of the tensors of the adapter in `folder`, whose config is `config`.
        wanted: names of the tensors that it is to be put into.
    """
    pairs = {
        ours: [getattr(one, name, None) for one in (config, live)] for name, ours in _AGREED.items()
    }
    # By what they matched: a list, a pattern and `all-linear` may come to the same.
    pairs["target_modules"] = [_targets(names) for names in (saved, wanted)]
    lines = [
        f"adapter.{key}: {old} -> {new}"
        for key, (old, new) in pairs.items()
        if (old or None) != (new or None)
    ]
    if lines:
        raise ModelError(
            "\n".join([f"adapter.init_from: {folder} was trained with other settings", *lines]),
            hint="its weights mean something with its own settings alone; give the recipe the same",
        )


def _targets(names: Iterable[str]) -> str:
    """The kinds of modules that have an update, and how many of each."""
    updated = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    kinds = Counter(name.rpartition(".")[2] for name in updated)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))


def _trained_in_float32(model: PeftModel) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _key_mismatch(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> str:
    parts = [
        f"{title} {', '.join(sorted(keys)[:5])}"
        for title, keys in (("missing:", missing), ("unexpected:", unexpected))
        if keys
    ]
    return f"{folder} does not fit the base model; " + "; ".join(parts)


AdapterConfig = Annotated[LoRA | FullFineTune, Field(discriminator="type")]
