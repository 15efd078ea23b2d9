"""What training changed, weight by weight, without the model in memory."""

from __future__ import annotations

import contextlib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qlora_cli.adapters.files import WEIGHTS, read_config, refuse_slow_patterns
from qlora_cli.common.untrusted_files import refuse_no_safetensors
from qlora_cli.errors import ModelError
from qlora_cli.models.heads import CAUSAL_LM
from qlora_cli.models.shards import Shards
from qlora_cli.models.weight_names import WeightNames, WeightPart

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Read = Callable[[str], "Tensor"]
"""The base's weight of a name, in float32."""

_SAVED = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|token_adapter|modules_to_save|original_module)\b")
"""What PEFT puts between a module's name and its weight."""
_MAX_NAMED = 5

# Ways to begin that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ ...) take out
# of its weights what they begin with, so that the adapter is no addition to the weights on disk.
_ADDITIVE = (True, False, "gaussian", "eva", "orthogonal")


def build_skeleton(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder on the meta device: modules and names without weights.

    Raises:
        ModelError: its config cannot be used.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            skeleton: PreTrainedModel = CAUSAL_LM.auto_class().from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    # Settings that do not belong together fail in any way, wherever they are used first.
    except Exception as error:
        raise ModelError(f"model.path: {folder} cannot be read: {error}") from error
    skeleton.tie_weights()
    return skeleton


class WeightEdits(ABC):
    """The weights that training changed."""

    names: set[str]
    """Weights (as `Names.live` has them) that `apply` may change."""
    shapes: dict[str, tuple[int, ...]]
    """Weights that have another shape than in the base: the vocabulary has grown."""

    @abstractmethod
    def apply(self, name: str, read: Read) -> Tensor:
        """The new value of a weight, in float32."""

    @abstractmethod
    def unused(self) -> set[str]:
        """Trained tensors that no weight has taken up so far."""


class FullModelEdits(WeightEdits):
    """Every weight is there anew."""

    def __init__(self, skeleton: PreTrainedModel, folder: Path) -> None:
        self._saved = Shards(folder)
        self._names = WeightNames(skeleton, self._saved.tensors)
        self._used: set[str] = set()
        # A weight that is another's too is changed with it.
        self.names = {
            live for live, stored in self._names.stored.items() if stored in self._saved.tensors
        }
        self.shapes = {
            self._names.live[name]: stored.shape for name, stored in self._saved.tensors.items()
        }

    def apply(self, name: str, read: Read) -> Tensor:
        stored = self._names.stored[name]
        self._used.add(stored)
        return self._saved.read(stored).float()

    def unused(self) -> set[str]:
        return set(self._saved.tensors) - self._used


class AdapterEdits(WeightEdits):
    """A saved adapter of PEFT. Each update is computed by PEFT's own layer, one layer at a time.

    The config beside the adapter decides, not the recipe: it says how the adapter was trained.
    """

    def __init__(self, skeleton: PreTrainedModel, names: WeightNames, folder: Path) -> None:
        """
        Args:
            skeleton: the model on the meta device. It is changed.
            names: of the base's files.

        Raises:
            ModelError: the adapter does not fit the model, or is of a kind that cannot be merged.
        """
        from peft import get_peft_model

        self._folder = folder
        refuse_no_safetensors(folder, str(folder), [WEIGHTS])
        self._saved = Shards(folder / WEIGHTS)
        self._used: set[str] = set()
        self._results: dict[str, Tensor] = {}
        saved = {name: stored.shape for name, stored in self._saved.tensors.items()}
        config = _read_config(folder, saved)
        refuse_slow_patterns(config, [name for name, _ in skeleton.named_modules()], folder)
        self.shapes = grow_vocabulary(skeleton, saved)
        self._parameters = [*skeleton.named_parameters(remove_duplicate=False)]
        self._own: dict[int, list[str]] = {}
        for name, parameter in self._parameters:
            self._own.setdefault(id(parameter), []).append(name)
        # PEFT warns of tied weights; what is written is compared and untied where it must be.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._adapted: Any = get_peft_model(skeleton, config)
            # PEFT checks no types: what is wrong fails wherever it is used first.
            except Exception as error:
                raise ModelError(f"{folder} does not fit the base model: {error}") from error
            matched = match_saved(self._adapted, saved, set(self._own), folder)
        self._sources = {key: names[0] for key, names in matched.items()}
        self._replaced = {
            self._own[key][0]: saved for key, saved in self._sources.items() if key in self._own
        }
        self._units = dict(self._find_units())
        self._pieces = dict(self._find_pieces(names))
        in_pieces = {piece.whole for piece, _ in self._pieces.values()}
        self._unit_of = {
            weight: name
            for name, unit in self._units.items()
            for weight in _changed(name, unit)
            if weight not in in_pieces
        }
        tied = {name: names[0] for names in self._own.values() for name in names}
        replaced = {name for name, source in tied.items() if source in self._replaced}
        self.names = set(self._unit_of) | set(self._pieces) | replaced
        self._tied = tied
        self._forget_copies(matched)

    def apply(self, name: str, read: Read) -> Tensor:
        def base(wanted: str) -> Tensor:
            saved = self._replaced.get(self._tied[wanted])
            return read(wanted) if saved is None else self._read(saved)

        if name in self._pieces:
            return read(name) + self._update_of(*self._pieces[name])
        if name not in self._unit_of:
            return base(name)
        if name not in self._results:
            self._merge_unit(self._unit_of[name], base)
        return self._results.pop(name)

    def unused(self) -> set[str]:
        return set(self._saved.tensors) - self._used

    def _read(self, saved: str) -> Tensor:
        self._used.add(saved)
        return self._saved.read(saved).float()

    def _forget_copies(self, matched: dict[int, list[str]]) -> None:
        """Some tensors are saved twice, and base weights beside those that replace them."""
        for key, (first, *others) in matched.items():
            for other in others:
                if self._saved.digest(other) != self._saved.digest(first):
                    raise ModelError(f"{self._folder}: {first} and {other} differ, and are one")
            self._used.update(others)
            if any(name in self._unit_of for name in self._own.get(key, [])):
                self._used.add(first)

    def _find_units(self) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules that PEFT put in the place of others."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        found: list[str] = []
        for name, module in self._adapted.base_model.model.named_modules():
            inside = any(name.startswith(f"{unit}.") for unit in found)
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
                found.append(name)
                yield name, module

    def _find_pieces(self, names: WeightNames) -> Iterator[tuple[str, tuple[WeightPart, Any]]]:
        """What the files hold of tensors that the model has in one, each with PEFT's module."""
        for name, unit in self._units.items():
            wrappers = {f"{name}.{one.parameter_name}": one for one in _wrappers(unit)}
            # What has rows and columns the other way round is no stack of the stored matrices; and
            # PEFT merges a unit as a whole, or else it is done here: not half of each.
            if all(
                whole in names.pieces
                and not getattr(wrapper.get_base_layer(), "is_transposed", False)
                for whole, wrapper in wrappers.items()
            ):
                for whole, wrapper in wrappers.items():
                    yield from ((p.name, (p, wrapper)) for p in names.pieces[whole])

    def _update_of(self, piece: WeightPart, wrapper: Any) -> Tensor:
        """B A of one expert, or of some rows of it, (O, I): the others need no memory.

        PEFT has the rows of A expert by expert, and the columns of B rank by rank.
        """
        a, b = (
            self._read(self._sources[id(factors["default"].weight)])
            for factors in (wrapper.lora_A, wrapper.lora_B)
        )
        rank = wrapper.r["default"]
        mine = slice(piece.expert * rank, (piece.expert + 1) * rank)
        rows = b[piece.start : piece.start + piece.rows, piece.expert :: wrapper.num_experts]
        update: Tensor = rows @ a[mine] * wrapper.scaling["default"]
        return update

    def _merge_unit(self, name: str, base: Read) -> None:
        """Let PEFT merge one module, with real weights for as long as that takes."""
        unit: Any = self._units[name]
        tensors: dict[int, Tensor] = {}
        for tensor in (*unit.parameters(), *unit.buffers()):
            if (saved := self._sources.get(id(tensor))) and id(tensor) not in self._own:
                tensors[id(tensor)] = self._read(saved)
            elif names := self._own.get(id(tensor)):
                here = [one for one in names if one.startswith(f"{name}.")]
                tensors[id(tensor)] = base((here or names)[0])
        with _real(unit, tensors):
            tensors.clear()
            _restore_tables(unit)
            if _lacks_values(unit):
                raise ModelError(f"PEFT's merge of {name} needs what {self._folder} does not hold")
            try:
                merged = _merge(unit)
            except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
                raise ModelError(f"PEFT cannot merge {name} of {self._folder}: {error}") from error
            for weight in _changed(name, unit):
                value = merged.get_parameter(weight.removeprefix(f"{name}."))
                self._results[weight] = value.detach()


def grow_vocabulary(
    model: PreTrainedModel, saved: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Give a base model as many tokens as an adapter was saved with.

    Args:
        saved: the shape of each tensor of the adapter.

    Returns:
        The new shape of each weight that has one.
    """
    modules = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    embeddings = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if id(module) in modules
    }
    rows = [
        shape[0]
        for name, shape in saved.items()
        if _WRAPPERS.sub("", name.removeprefix(_SAVED)) in embeddings
    ]
    known = max((weight.shape[0] for weight in embeddings.values()), default=0)
    if not rows or max(rows) == known:
        return {}
    model.resize_token_embeddings(max(rows), mean_resizing=False)
    return {name: (max(rows), *weight.shape[1:]) for name, weight in embeddings.items()}


def match_saved(
    adapted: Any,
    saved: Mapping[str, tuple[int, ...]],
    own: Collection[int],
    folder: Path,
    adapter_name: str = "default",
) -> dict[int, list[str]]:
    """Find the parameter of each saved tensor: id of the parameter -> its names in the file.

    PEFT only warns of missing tensors and goes on with random ones.

    Args:
        saved: the shape of each tensor of the adapter.
        own: ids of the base's parameters, which may be saved with the adapter or not.

    Raises:
        ModelError: they do not match, tensor for tensor.
    """
    from peft import get_peft_model_state_dict

    state = adapted.state_dict(keep_vars=True)
    live: dict[str, Tensor] = {}
    for with_embeddings in (False, True):
        live = get_peft_model_state_dict(
            adapted,
            state_dict=state,
            adapter_name=adapter_name,
            save_embedding_layers=with_embeddings,
        )
        if set(saved) <= set(live):
            break
    missing = {key for key in live if key not in saved and id(live[key]) not in own}
    wrong = {
        f"{key} {tuple(shape)}, and not {tuple(live[key].shape)}"
        for key, shape in saved.items()
        if key in live and tuple(shape) != tuple(live[key].shape)
    }
    if problems := [
        f"{title} {', '.join(sorted(keys)[:_MAX_NAMED])}"
        for title, keys in (
            ("missing:", missing),
            ("unexpected:", set(saved) - set(live)),
            ("of another shape:", wrong),
        )
        if keys
    ]:
        raise ModelError(f"{folder} does not fit the base model; {'; '.join(problems)}")
    matched: dict[int, list[str]] = {}
    for key in saved:
        matched.setdefault(id(live[key]), []).append(key)
    return matched


def _merge(unit: Any) -> Any:
    if hasattr(unit, "unload_and_optionally_merge_module"):
        return unit.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    unit.merge(safe_merge=False)
    return unit.get_base_layer()


def _wrappers(unit: Any) -> Iterator[Any]:
    """PEFT's modules for parameters of a unit: one inside the other, if there are several."""
    from peft.tuners.lora.layer import ParamWrapper

    while isinstance(unit, ParamWrapper):
        yield unit
        unit = unit.base_layer


def _changed(name: str, unit: Any) -> list[str]:
    """The weights of the base that a module of PEFT changes."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if parameters := [one.parameter_name for one in _wrappers(unit)]:
        return [f"{name}.{parameter}" for parameter in parameters]
    if isinstance(unit, ModulesToSaveWrapper):
        return [f"{name}.{key}" for key, _ in unit.modules_to_save["default"].named_parameters()]
    is_other = isinstance(unit, BaseTunerLayer) and not isinstance(unit, LoraLayer)
    if is_other or any(getattr(unit, "lora_bias", {}).values()):
        return [f"{name}.{key}" for key, _ in unit.get_base_layer().named_parameters()]
    return [f"{name}.weight"]


def _lacks_values(unit: nn.Module) -> bool:
    """Whether a layer of PEFT still has tensors on the meta device. (Where rows of an embedding are
    trained, the old rows stay there: no merge reads them.)"""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors = (*unit.parameters(), *unit.buffers())
    return isinstance(unit, BaseTunerLayer) and any(tensor.is_meta for tensor in tensors)


def _restore_tables(unit: nn.Module) -> None:
    """OFT's tables of indices, which follow from the block size, lost their values on the way to
    the meta device."""
    import torch
    from peft.tuners.oft.layer import OFTRotationModule

    for module in unit.modules():
        if isinstance(module, OFTRotationModule):
            module.rows, module.cols = torch.triu_indices(module.block_size, module.block_size, 1)


@contextlib.contextmanager
def _real(unit: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters (by their id), and take them out again."""
    from torch import nn

    replaced: list[tuple[Any, str, Tensor]] = [
        (held, name, tensor)
        for module in unit.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and id(tensor) in tensors
    ]
    for held, name, tensor in replaced:
        real = tensors[id(tensor)]
        is_weight = isinstance(tensor, nn.Parameter)
        held[name] = nn.Parameter(real, requires_grad=False) if is_weight else real
    try:
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor
        for merged in (getattr(module, "merged_adapters", []) for module in unit.modules()):
            merged.clear()


def refuse_changed_base(config: PeftConfig, folder: Path) -> None:
    """Raises ModelError if an adapter is no addition to the base as it is on disk."""
    begun = getattr(config, "init_lora_weights", True)
    if begun not in _ADDITIVE:
        raise ModelError(
            f"{folder}: init_lora_weights ({begun}) changed the base when training began, so the "
            "adapter does not belong to the weights on disk",
            hint="save it again with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA",
        )


def _merged_kinds() -> set[str]:
    """PEFT's kinds of adapters whose merge the contract holds against base plus adapter."""
    from qlora_cli.adapters import AdapterConfig
    from qlora_cli.adapters.peft_base import PeftMethod

    union = get_args(get_args(AdapterConfig)[0])
    fields = [
        method.model_fields.get("peft_type") or method.model_fields["type"]
        for method in union
        if issubclass(method, PeftMethod) and not method.no_merge
    ]
    return {name.upper() for field in fields for name in get_args(field.annotation)}


def _read_config(folder: Path, saved: Mapping[str, tuple[int, ...]]) -> PeftConfig:
    """The adapter's own settings.

    Raises:
        ModelError: they cannot be read, or name something that is no addition to base weights.
    """
    config: Any = read_config(folder, saved)
    kind, merged = str(config.peft_type.value), _merged_kinds()
    if kind not in merged:
        raise ModelError(
            f"{folder} is a {kind} adapter; only {', '.join(sorted(merged))} can be merged"
        )
    refuse_changed_base(config, folder)
    if getattr(config, "layer_replication", None):
        raise ModelError(f"{folder}: layer_replication makes layers that the base does not have")
    # It has been drawn; on the meta device there is nothing to draw.
    for key in ("init_lora_weights", "init_weights", "init_ia3_weights"):
        if hasattr(config, key):
            setattr(config, key, True)
    return config
