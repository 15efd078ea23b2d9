"""Attention over packed examples: none sees another, and nothing is computed for what is masked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_cli.errors import ModelError
from qlora_cli.types import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

NAME = "qlora_documents"
"""What our attention is called among transformers' own."""

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.05}
"""Rounding in the dtype that is computed in: of a loss, and of logits in units of their spread."""

# Arguments of an attention function: those that are passed on, and those that change nothing here
# or say in another form what is known already.
_KNOWN = ("dropout", "scaling", "is_causal")
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "layer_idx", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids",
    "return_dict", "use_cache",
}  # fmt: skip


def attend_by_document(model: PreTrainedModel) -> bool:
    """Have a model that uses sdpa attend to each packed example by itself. Returns whether it does.

    With a mask, sdpa computes all T x T scores of a row, those between examples too, and cannot
    use its fastest kernels. Batches that are not packed are computed as before. Eager attention
    (always T x T) and flash attention (which knows boundaries) tell packed examples apart already.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def attend_by_row(model: PreTrainedModel) -> None:
    """Take `attend_by_document` back."""
    model.set_attn_implementation("sdpa")


def _mask(
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """No mask for packed examples; what sdpa would get for anything else."""
    from transformers.masking_utils import sdpa_mask

    # transformers forbids the skip where positions begin again; and with `use_vmap`, where the
    # model adds a mask of its own, which `_attend` then refuses.
    is_packed = attention_mask is None and not allow_is_causal_skip and not use_vmap
    if is_packed:
        return None
    mask: Tensor | None = sdpa_mask(
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **options,
    )
    return mask


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, document by document.

    Args:
        query: (1, H, T, D); keys and values may have fewer heads.
        documents: lengths that add up to T; None is a batch that is not packed.
        options: as of transformers' sdpa_attention_forward().

    Raises:
        ValueError: an argument that is not known to be harmless.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return whole
    if attention_mask is not None and len(documents) > 1:
        raise ValueError("the model adds a mask of its own to packed examples")
    if "sliding_window" not in options:
        _refuse_hidden_window(module)
    window = options.pop("sliding_window", None) or max(documents)
    known = {name: options.pop(name) for name in _KNOWN if name in options}
    unknown = {name for name, value in options.items() if value is not None} - _HARMLESS
    if unknown:
        raise ValueError(f"attention by document knows no {', '.join(sorted(unknown))}")
    outputs = []
    parts = (states.split(documents, dim=2) for states in (query, key, value))
    for length, (q, k, v) in zip(documents, zip(*parts, strict=True), strict=True):
        mask = _window_mask(length, window, query.device) if length > window else None
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **known)[0])
    return torch.cat(outputs, dim=1), None  # (1, T, H, D)


def _refuse_hidden_window(module: nn.Module) -> None:
    """Refuse a local attention that the model puts into the mask alone: it would be lost."""
    for name in ("sliding_window", "attention_chunk_size"):
        size = getattr(module.config, name, None)
        if isinstance(size, int):
            # Whatever its size: the examples of the proof are shorter than those to come.
            raise ValueError(f"attention by document is not told the {name} ({size})")


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, T, T): causal, and no further back than `window` tokens, the own one among them."""
    import torch

    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)[None, None]


@dataclass(frozen=True, slots=True)
class PackingProof:
    """How far packed examples are from being alone."""

    leak: float
    """Change of the other examples' logits when one is changed, in units of their spread; of the
    token where it is largest."""
    difference: float
    """Largest difference of an example's loss (mean over its tokens), packed and unpacked."""
    tolerance: float
    """What either may be."""

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"packing proved on this model: leak {self.leak:.1e}, loss packed and unpacked within "
            f"{self.difference:.1e} (tolerance {self.tolerance:.1e})"
        )


def prove_packing(
    model: PreTrainedModel, packed: Batch, padded: Batch, dtype: torch.dtype
) -> PackingProof:
    """Show on the loaded model that packed examples do not see each other.

    The tolerance is rounding, or twice what changing one row does to the others of a padded batch
    where that is more: with LLM.int8() the outliers of one row decide how all are quantized.

    Args:
        packed: a few examples in one row.
        padded: the same examples, in the same order, a row each.
        dtype: autocast dtype; float32 means no autocast.

    Raises:
        ModelError: they do see each other, or the model cannot be given packed examples.
    """
    import torch

    documents = packed.documents
    vocabulary_size = model.config.get_text_config().vocab_size

    def edited(batch: Batch) -> Batch:
        ids = batch.input_ids.clone()
        ids[0, : documents[0]] = (ids[0, : documents[0]] + 1) % vocabulary_size
        return replace(batch, input_ids=ids)

    def logits(batch: Batch) -> list[Tensor]:
        """(T, V) of each example."""
        found = model(**batch.inputs(), use_cache=False).logits.float()
        if batch.documents:
            return list(found[0].split(documents))
        return [row[:length] for row, length in zip(found, documents, strict=True)]

    was_training = model.training
    model.eval()
    autocast = torch.autocast(packed.input_ids.device.type, dtype, enabled=dtype != torch.float32)
    try:
        with torch.no_grad(), autocast:
            together, together_edited = logits(packed), logits(edited(packed))
            apart, apart_edited = logits(padded), logits(edited(padded))
    except (TypeError, ValueError) as error:
        raise _refusal(model, f"cannot be given packed examples: {error}") from error
    finally:
        model.train(was_training)
    targets = packed.input_ids[0].split(documents)
    losses = [
        torch.stack([_mean_loss(*pair) for pair in zip(each, targets, strict=True)])
        for each in (together, apart)
    ]
    noise = _largest_shift(apart[1:], apart_edited[1:])
    proof = PackingProof(
        leak=_largest_shift(together[1:], together_edited[1:]),
        difference=float((losses[0] - losses[1]).abs().max()),
        tolerance=max(TOLERANCES[str(dtype).removeprefix("torch.")], 2 * noise),
    )
    # In this form a figure that is no number is refused too.
    if not (proof.leak <= proof.tolerance and proof.difference <= proof.tolerance):
        raise _refusal(
            model,
            f"lets packed examples see each other: changing one of them changed the logits of "
            f"another by {proof.leak:.2g} of their spread, and the loss of an example differs by "
            f"{proof.difference:.2g} from that when it is not packed (tolerance "
            f"{proof.tolerance:.2g})",
        )
    return proof


def _largest_shift(before: list[Tensor], after: list[Tensor]) -> float:
    """Distance of logits (T, V) of a token from those before, by the spread of those."""
    import torch

    old, new = torch.cat(before), torch.cat(after)
    spread = (old - old.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((new - old).norm(dim=-1) / spread).max())


def _mean_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(logits[:-1], input_ids[1:])


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    config = model.config
    back_end = config._attn_implementation
    name = "sdpa" if back_end == NAME else back_end
    return ModelError(
        f"data.packing: {config.model_type} with attention {name} {reason}",
        hint="--set data.packing=false; or try another model.attention",
    )
