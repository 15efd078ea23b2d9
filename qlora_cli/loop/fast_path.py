"""Make a step fast and lean: no padding, fused layers, recomputed activations."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qlora_cli.common.decoder import decoder_of
from qlora_cli.data.batching.collate import proof_batches, sharing_batches
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.errors import ModelError
from qlora_cli.kernels.cross_entropy import CrossEntropy, compiled_cross_entropy, cross_entropy
from qlora_cli.kernels.decoder_layer import Recompute, fuse_layers
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.elementwise import Elementwise, LayerConstants
from qlora_cli.kernels.fusible import fusible_constants, why_not_fused
from qlora_cli.kernels.offload import HostMemory, keep_on_host
from qlora_cli.kernels.rope import has_head_norms
from qlora_cli.kernels.selection import Kernels
from qlora_cli.models.base import start_checkpointing
from qlora_cli.models.packed_attention import (
    attend_by_document,
    attend_by_row,
    attends_by_document,
    check_packing,
    shares_prefixes,
    skip_masks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")

Checkpointing = bool | Literal["mlp", "offload"]
"""The values of `training.gradient_checkpointing`."""

_RECOMPUTE: dict[bool | str, Recompute] = {
    True: "all",
    "offload": "all",
    "mlp": "mlp",
    False: "none",
}


_ROUNDING = 1e-3
"""Share of the largest value by which a compiled result may differ, if 8 rounding steps of its
dtype are not more. Measured: 1e-5 in float32, 1.5 steps in bfloat16."""


@dataclass(frozen=True)
class CompiledKernels:
    """Compiled kernels, or their stand-ins in a trace."""

    elementwise: Elementwise
    cross_entropy: CrossEntropy


@dataclass(frozen=True)
class ComputeOptions:
    """How a step computes."""

    dtype: torch.dtype
    """Autocast dtype; float32 means no autocast."""
    kernels: Kernels = "fused"
    """Kernels for the layers that support them."""
    device: DeviceCapabilities = field(default_factory=DeviceCapabilities)
    compiled: CompiledKernels | None = None
    """The kernels of `compiled`; None compiles them on this machine."""


def use_padding_free(
    model: PreTrainedModel,
    training: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packing: bool,
) -> bool:
    """Make the model attend within each example of a row, and prove that it does.

    Returns:
        True if examples can share a row without padding.

    Raises:
        ModelError: they cannot, and the recipe packs.
    """
    is_ours = attend_by_document(model)
    # Eager attention would compute scores between examples too; flash attention knows boundaries.
    knows_examples = is_ours or model.config._attn_implementation == "flash_attention_2"
    if not (knows_examples or packing):
        return False
    packed, padded = proof_batches(training.examples, pad_token_id=tokenizer.pad_token_id)
    try:
        check = check_packing(model, packed.to(device), padded.to(device), dtype)
    except ModelError as error:
        if packing:
            raise
        log.info("rows are padded: %s", str(error).removeprefix("data.packing: "))
        if is_ours:
            attend_by_row(model)
        return False
    log.log(logging.INFO if packing else logging.DEBUG, check.summary())
    if is_ours:
        skip_masks(model)
    return True


def use_shared_prefixes(
    model: PreTrainedModel,
    training: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Tell if the prompt of a pair can be computed once for both answers.

    Our attention repeats what is shared; other back ends do not.
    """
    if not attends_by_document(model):
        return False
    apart, shared = sharing_batches(training.examples, pad_token_id=tokenizer.pad_token_id)
    can_share = shares_prefixes(model, apart.to(device), shared.to(device), dtype)
    if not can_share:
        log.info("the prompt of a pair is computed twice: the model does not support it once")
    return can_share


def prepare_layers(
    model: nn.Module,
    base: PreTrainedModel,
    checkpointing: Checkpointing,
    options: ComputeOptions,
) -> Kernels:
    """Replace decoder layers by faster ones, and set up gradient checkpointing.

    Args:
        model: the base with its adapter.

    Returns:
        The kernels that the layers got: "plain" if none could be replaced, "fused" if those of
        "compiled" cannot be used here.
    """
    fused, kernels = 0, options.kernels
    held: Any = base.get_input_embeddings().weight.dtype
    if kernels != "plain" and held == options.dtype:
        ops = Elementwise.in_blocks(options.device.block_values)
        if kernels == "compiled" and (constants := fusible_constants(model)) is not None:
            if compiled := _compiled_elementwise(model, base.device, options, constants, plain=ops):
                ops = compiled
            else:
                kernels = "fused"
        fused = fuse_layers(model, _RECOMPUTE[checkpointing], ops, options.device.attention)
    num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    # Fused layers recompute by themselves. A method may have left some or all layers unfused.
    if checkpointing and fused < num_layers:
        start_checkpointing(base)
    if checkpointing == "offload":
        _offload(base, options.device.host)
    if fused == 0:
        if kernels != "plain":
            log.info("kernels: plain, because %s", _why_plain(base, held, options.dtype))
        return "plain"
    log.debug("kernels: %d layers as one function each, %s", fused, kernels)
    return kernels


def _why_plain(base: PreTrainedModel, held: torch.dtype, computed: torch.dtype) -> str:
    """Return why no layer is fused."""
    if held != computed:
        held_as, computed_in = (str(dtype).removeprefix("torch.") for dtype in (held, computed))
        return f"the base is held in {held_as} and computed in {computed_in}"
    # A list of layers is the only module list that a decoder is made of.
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    layers: list[nn.Module] = list(max(lists, key=len, default=[]))
    reasons = Counter(filter(None, map(why_not_fused, layers)))
    if not reasons:
        return "the model has no decoder layers"
    [(reason, _)] = reasons.most_common(1)
    return reason


def _offload(base: PreTrainedModel, host: HostMemory | None) -> None:
    if host is None:
        log.warning(
            "training.gradient_checkpointing: offload moves inputs of layers from CUDA memory to "
            "the host; there is no CUDA device here, so it acts as true"
        )
        return
    keep_on_host(decoder_of(base) or base, base.get_input_embeddings(), host)


def _compiled_elementwise(
    model: nn.Module,
    device: torch.device,
    options: ComputeOptions,
    constants: LayerConstants,
    *,
    plain: Elementwise,
) -> Elementwise | None:
    """Return compiled element-wise work; None, with a warning, if it cannot be used here."""
    if options.compiled is not None:
        return options.compiled.elementwise
    ops, norms_heads = Elementwise.compiled(), has_head_norms(model)

    def try_out(some: Elementwise) -> dict[str, Tensor]:
        return some.try_out(device, options.dtype, constants, norms_heads=norms_heads)

    return ops if _can_compile(lambda: try_out(ops), try_out(plain)) else None


def loss_kernel(
    kernels: Kernels, device: torch.device, options: ComputeOptions, vocabulary_size: int
) -> CrossEntropy:
    """Return the cross-entropy with its gradient for a run with these kernels."""
    if kernels != "compiled":
        return cross_entropy
    if options.compiled is not None:
        return options.compiled.cross_entropy
    compiled, dtype = compiled_cross_entropy(), options.dtype
    # Almost as large as in a step: the compiler decides by the size if threads are worth it.
    logits = torch.rand(64, vocabulary_size, device=device, dtype=dtype)
    targets = torch.arange(64, device=device)

    def try_out(some: CrossEntropy) -> dict[str, Tensor]:
        return dict(zip(("loss", "gradient"), some(logits, targets), strict=True))

    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # as in a step
        can = _can_compile(lambda: try_out(compiled), try_out(cross_entropy))
    return compiled if can else cross_entropy


def _can_compile(run: Callable[[], dict[str, Tensor]], wanted: dict[str, Tensor]) -> bool:
    """Compile kernels, and compare their results with those of the plain functions.

    What an earlier run compiled is read from the disk, where it may be damaged.
    """
    started = time.monotonic()
    try:
        with torch.no_grad():  # as in a step: another grad mode would compile it again
            found = run()
    except Exception as error:  # compilers fail in many ways: no gcc, no Python.h, a full disk
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        log.warning(
            "kernels cannot be compiled, so steps are slower: %s (earlier runs' kernels: %s)",
            reason,
            _kernel_folder(),
        )
        return False
    if wrong := [name for name, one in wanted.items() if not _are_close(found[name], one)]:
        log.warning(
            "compiled kernels are not used, because their results differ from those of the plain "
            "ones (%s); if they were damaged on the disk, delete %s",
            wrong[0],
            _kernel_folder(),
        )
        return False
    log.info("kernels compiled in %.1f s (kept for the next run)", time.monotonic() - started)
    return True


def _kernel_folder() -> str:
    """Return where torch.compile keeps kernels."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder: str = cache_dir()
    return folder


def _are_close(found: Tensor, wanted: Tensor) -> bool:
    """Tell if two results differ by no more than rounding."""
    largest = wanted.float().abs().max()
    off = (found.float() - wanted.float()).abs().max()
    return bool(off <= max(_ROUNDING, 8 * torch.finfo(wanted.dtype).eps) * largest)
