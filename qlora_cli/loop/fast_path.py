"""What makes a step fast and lean: no padding, layers as one function, what is computed again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_cli.data.batching.collate import proof_batches
from qlora_cli.data.prepared.prepare import PreparedData
from qlora_cli.errors import ModelError
from qlora_cli.kernels.cross_entropy import CrossEntropy, compiled_cross_entropy, cross_entropy
from qlora_cli.kernels.decoder_layer import Recompute, fuse_layers
from qlora_cli.kernels.device_capabilities import DeviceCapabilities
from qlora_cli.kernels.elementwise import Elementwise
from qlora_cli.kernels.offload import Host, keep_on_host
from qlora_cli.kernels.rope import has_head_norms
from qlora_cli.kernels.selection import Kernels
from qlora_cli.models.base import start_checkpointing
from qlora_cli.models.packed_attention import attend_by_document, attend_by_row, prove_packing
from qlora_cli.recipe.schema import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("qlora")

_RECOMPUTE: dict[bool | str, Recompute] = {
    True: "all",
    "offload": "all",
    "mlp": "mlp",
    False: "none",
}


def use_padding_free(
    model: PreTrainedModel,
    learnt: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packing: bool,
) -> bool:
    """Let the model attend to each example of a row by itself, and show that it does.

    Returns:
        Whether it does, so that examples need no padding.

    Raises:
        ModelError: it does not, and the recipe packs.
    """
    is_ours = attend_by_document(model)
    if not (is_ours or packing):  # eager attention would compute what is between examples too
        return False
    packed, padded = proof_batches(learnt.examples, pad_token_id=tokenizer.pad_token_id)
    try:
        proof = prove_packing(model, packed.to(device), padded.to(device), dtype)
    except ModelError as error:
        if packing:
            raise
        log.info("with padding: %s", str(error).removeprefix("data.packing: "))
        attend_by_row(model)
        return False
    log.info(proof.summary())
    return True


def prepare_layers(
    model: nn.Module,
    base: PreTrainedModel,
    settings: Training,
    kernels: Kernels,
    dtype: torch.dtype,
    means: DeviceCapabilities,
    compiled: Elementwise | None = None,
) -> Kernels:
    """Put faster layers in place, and decide what is computed again in the backward pass.

    Args:
        model: the base with its adapter.
        compiled: what compiled kernels are made of; by default what torch compiles here.

    Returns:
        The kernels that it has then.
    """
    fused = 0
    if kernels != "plain" and base.get_input_embeddings().weight.dtype == dtype:
        ops = Elementwise()
        if kernels == "compiled":
            ops = compiled or compile_elementwise(
                base.device, dtype, norms_heads=has_head_norms(model)
            )
        recompute = _RECOMPUTE[settings.gradient_checkpointing]
        fused = fuse_layers(model, recompute, ops, means.attention)
    num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    # Fused layers see to it themselves; a method may have left some, or all, as they were.
    if settings.gradient_checkpointing and fused < num_layers:
        start_checkpointing(base)
    if settings.gradient_checkpointing == "offload":
        _offload(base, means.host)
    if fused == 0:
        return "plain"
    log.info("kernels: %d layers as one function each, %s", fused, kernels)
    return kernels


def _offload(base: PreTrainedModel, host: Host | None) -> None:
    if host is None:
        log.warning(
            "training.gradient_checkpointing: offload moves inputs of layers from CUDA memory to "
            "the host; no CUDA here, so true"
        )
        return
    keep_on_host(base.get_decoder() or base, base.get_input_embeddings(), host)


def compile_elementwise(
    device: torch.device, dtype: torch.dtype, *, norms_heads: bool
) -> Elementwise:
    """Compiled element-wise work; plain, with a warning, if it cannot be compiled here."""
    ops = Elementwise.compiled()
    can = _can_compile(lambda: ops.try_out(device, dtype, norms_heads=norms_heads))
    return ops if can else Elementwise()


def loss_kernel(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> CrossEntropy:
    """Cross-entropy with its gradient, for the kernels that a run has."""
    if kernels != "compiled":
        return cross_entropy
    compiled = compiled_cross_entropy()
    # As large as in a step, almost: several threads are used only if they pay for this size.
    logits = torch.rand(64, 8192, device=device, dtype=dtype)
    targets = torch.arange(64, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # as in a step
        return compiled if _can_compile(lambda: compiled(logits, targets)) else cross_entropy


def _can_compile(run: Callable[[], object]) -> bool:
    started = time.monotonic()
    try:
        with torch.no_grad():  # as in a step: another state would compile it again
            run()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).split("\n")[0]
        log.warning("kernels are not compiled, which costs some speed: %s", reason)
        return False
    log.info("kernels compiled in %.1f s (kept for the next run)", time.monotonic() - started)
    return True
