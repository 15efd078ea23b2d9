"""Attention over packed examples: none sees another, and nothing is computed for what is masked."""

from __future__ import annotations

from collections.abc import Sequence
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

_GRADIENT_TOKENS = 16
"""Of each example of the proof, as far as gradients are followed."""

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
    leak_tolerance: float
    reach: float
    """How strongly the other examples' logits depend on the embeddings of the first, as a share of
    how they depend on their own (gradients; largest of a token). Not rounded: it has to be 0."""
    difference: float
    """Largest difference of an example's loss (mean over its tokens), packed and unpacked."""
    tolerance: float
    """What that may be."""

    @property
    def holds(self) -> bool:
        """Whether each example is alone. A figure that is no number is not within its tolerance."""
        return (
            self.leak <= self.leak_tolerance
            and self.reach == 0
            and self.difference <= self.tolerance
        )

    def summary(self) -> str:
        """One line for the log."""
        return f"packing proved on this model: {self._figures()}"

    def refusal(self) -> str:
        """What is wrong, after the model's name."""
        return f"lets packed examples see each other: {self._figures()}"

    def _figures(self) -> str:
        return (
            f"changing one of them changes the logits of another by {self.leak:.1e} of their "
            f"spread (tolerance {self.leak_tolerance:.1e}), gradients reach {self.reach:.1e} over "
            f"the seam (none may), and a loss packed and unpacked differs by "
            f"{self.difference:.1e} (tolerance {self.tolerance:.1e})"
        )


def prove_packing(
    model: PreTrainedModel, packed: Batch, padded: Batch, dtype: torch.dtype
) -> PackingProof:
    """Show on the loaded model that packed examples do not see each other.

    Tolerances are rounding, or twice what changing one row does to the others of a padded batch
    where that is more: with LLM.int8() the outliers of one row decide how all are quantized. That
    can be as much as the spread of the logits, so a leak could hide in it. Gradients tell the two
    apart: they pass where an example sees another, and not through the choice of the outliers.

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

    was_training = model.training
    model.eval()
    autocast = torch.autocast(packed.input_ids.device.type, dtype, enabled=dtype != torch.float32)
    try:
        with torch.no_grad(), autocast:
            together, apart, together_edited, apart_edited = (
                _logits(model, batch, documents)
                for batch in (packed, padded, edited(packed), edited(padded))
            )
        with autocast:
            reach = _reach(model, _beginnings(packed))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise _refusal(model, f"cannot be given packed examples: {error}") from error
    finally:
        model.train(was_training)
    targets = packed.input_ids[0].split(documents)
    losses = _losses(apart, targets)
    packed_too = zip(_losses(together, targets), losses, strict=True)
    beside_another = zip(_losses(apart_edited, targets)[1:], losses[1:], strict=True)
    # Token by token: by chance a mean may hardly move.
    loss_noise = max(float((new - old).abs().mean()) for new, old in beside_another)
    rounding = TOLERANCES[str(dtype).removeprefix("torch.")]
    proof = PackingProof(
        leak=_largest_shift(together[1:], together_edited[1:]),
        leak_tolerance=max(rounding, 2 * _largest_shift(apart[1:], apart_edited[1:])),
        reach=reach,
        difference=float(torch.stack([(new - old).mean() for new, old in packed_too]).abs().max()),
        tolerance=max(rounding, 2 * loss_noise),
    )
    if not proof.holds:
        raise _refusal(model, proof.refusal())
    return proof


def _logits(model: PreTrainedModel, batch: Batch, lengths: tuple[int, ...]) -> list[Tensor]:
    """(T, V) of each example."""
    found = model(**batch.inputs(), use_cache=False).logits.float()
    if batch.documents:
        return list(found[0].split(lengths))
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


def _beginnings(packed: Batch) -> Batch:
    """The same with less of each example: gradients take memory, which training may not need."""
    import torch

    pieces = [ids[:_GRADIENT_TOKENS] for ids in packed.input_ids[0].split(packed.documents)]
    ids = torch.cat(pieces)[None]
    return replace(packed, input_ids=ids, labels=ids, documents=tuple(map(len, pieces)))


def _reach(model: PreTrainedModel, packed: Batch) -> float:
    """Largest gradient of the other examples' logits at a token of the first, to one of theirs."""
    import torch

    seen: list[Tensor] = []

    def watch(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[-1].clone()  # which a model may change in place, unlike a leaf

    first = packed.documents[0]
    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            _, *others = _logits(model, packed, packed.documents)
            # The norm of each token's logits: no term of it can cancel another, and its gradient is
            # of about one size for all models, which matters in float16.
            [gradient] = torch.autograd.grad(torch.cat(others).norm(dim=-1).sum(), seen)
    finally:
        hook.remove()
    sizes = gradient[0].float().norm(dim=-1)  # (T,)
    return float(sizes[:first].max() / sizes[first:].max())


def _largest_shift(before: list[Tensor], after: list[Tensor]) -> float:
    """Distance of logits (T, V) of a token from those before, by the spread of those."""
    import torch

    old, new = torch.cat(before), torch.cat(after)
    spread = (old - old.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((new - old).norm(dim=-1) / spread).max())


def _losses(logits: list[Tensor], input_ids: Sequence[Tensor]) -> list[Tensor]:
    """(T - 1,) of each example: the loss of each token."""
    import torch.nn.functional as F

    return [
        F.cross_entropy(found[:-1], ids[1:], reduction="none")
        for found, ids in zip(logits, input_ids, strict=True)
    ]


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    config = model.config
    back_end = config._attn_implementation
    name = "sdpa" if back_end == NAME else back_end
    return ModelError(
        f"data.packing: {config.model_type} with attention {name} {reason}",
        hint="--set data.packing=false; or try another model.attention",
    )
