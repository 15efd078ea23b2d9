"""Attention over packed examples that do not see each other, without computing masked scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_cli.common.decoder import decoder_of, score_layer
from qlora_cli.common.eval_mode import eval_mode
from qlora_cli.errors import ModelError
from qlora_cli.types import Batch, SharedTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

NAME = "qlora_documents"
"""Name under which this attention is registered in transformers."""

_MASKLESS = "qlora_documents_without_mask"
"""The same attention under a name for which transformers makes no mask."""

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.05}
"""Rounding per compute dtype: of a loss, and of logits in units of their spread."""

_GRADIENT_TOKENS = 4
"""First tokens of each example for which the check computes gradients."""

# Arguments of an attention function. These are passed on.
_PASSED_ON = ("dropout", "scaling", "is_causal")
# These have no effect here, or repeat what is known already.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "layer_idx", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids",
    "return_dict", "use_cache",
}  # fmt: skip


def attend_by_document(model: PreTrainedModel) -> bool:
    """Make a model with sdpa attention attend to each packed example separately.

    With a mask, sdpa computes all T x T scores of a row, including those between examples, and
    cannot use its fastest kernels. Batches that are not packed are computed as before. Eager
    attention (always T x T) and flash attention (which knows boundaries) separate packed examples
    already.

    Returns:
        Whether the model uses sdpa, and so was changed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(_MASKLESS, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def attend_by_row(model: PreTrainedModel) -> None:
    """Undo `attend_by_document`."""
    model.set_attn_implementation("sdpa")


def attends_by_document(model: PreTrainedModel) -> bool:
    """Tell if `attend_by_document` has changed a model."""
    return model.config._attn_implementation in (NAME, _MASKLESS)


def skip_masks(model: PreTrainedModel) -> None:
    """Let transformers make no mask for packed examples.

    To find out whether a mask is needed, it looks at positions on the device, and so waits for the
    device in each forward pass. Batches that are not packed get their masks as before.

    Call this after `check_packing`: a mask of the model's own is left out too, and only the check
    finds it.
    """
    decoder = decoder_of(model) or model

    def choose(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        module.config._attn_implementation = _MASKLESS if options.get("documents") else NAME

    decoder.register_forward_pre_hook(choose, with_kwargs=True)


def _mask(
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """Return no mask for packed examples, and sdpa's own mask for everything else."""
    from transformers.masking_utils import sdpa_mask

    # transformers does not allow the skip where positions start again. It does not with `use_vmap`
    # either, where the model adds a mask of its own, which `_attend` then refuses.
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
    shared: SharedTokens | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention in each document: in one call where CUDA has it.

    Args:
        query: (1, H, T, D); keys and values may have fewer heads.
        documents: lengths that add up to T; None for a batch that is not packed.
        shared: places of prefixes that the row has once; the documents' lengths are with them.
        options: those of transformers' sdpa_attention_forward().

    Raises:
        ValueError: an argument is not known to be harmless.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from qlora_cli.kernels.attention import DocumentBoundaries, VarlenAttention, choose_attention

    if documents is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return whole
    if attention_mask is not None and len(documents) > 1:
        raise ValueError("the model adds a mask of its own to packed examples")
    if shared is not None:
        q, k, v = (states.index_select(2, shared.gather) for states in (query, key, value))
        everything, _ = _attend(module, q, k, v, attention_mask, documents, **options)
        return everything.index_select(1, shared.own), None
    if "sliding_window" not in options:
        _refuse_hidden_window(module)
    window = options.pop("sliding_window", None)
    known = {name: options.pop(name) for name in _PASSED_ON if name in options}
    unknown = {name for name, value in options.items() if value is not None} - _HARMLESS
    if unknown:
        raise ValueError(f"attention by document does not support {', '.join(sorted(unknown))}")
    ends = options.get("cu_seq_lens_q")
    attention = choose_attention(query.device, query.dtype).for_heads(query.shape[-1], window)
    # Its kernels take one dtype, and heads of one size: DeepSeek's values are narrower than keys.
    is_uniform = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    is_varlen = isinstance(attention, VarlenAttention) and is_uniform
    if is_varlen and ends is not None and not known.get("dropout"):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        scale = known.get("scaling") or query.shape[-1] ** -0.5
        found = attention.forward(q, k, v, DocumentBoundaries(documents, ends), scale)
        return found.output[None], None
    window = window or max(documents)
    outputs = []
    parts = (states.split(documents, dim=2) for states in (query, key, value))
    for length, (q, k, v) in zip(documents, zip(*parts, strict=True), strict=True):
        mask = _window_mask(length, window, query.device) if length > window else None
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **known)[0])
    return torch.cat(outputs, dim=1), None  # (1, T, H, D)


def _refuse_hidden_window(module: nn.Module) -> None:
    """Refuse local attention that the model applies only through the mask, which is not used."""
    for name in ("sliding_window", "attention_chunk_size"):
        size = getattr(module.config, name, None)
        if isinstance(size, int):
            # Of any size: training examples can be longer than those of the check.
            raise ValueError(f"attention by document is not given the {name} ({size})")


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return the mask (1, 1, T, T): causal, and over the last `window` tokens, itself included."""
    import torch

    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)[None, None]


@dataclass(frozen=True, slots=True)
class PackingCheck:
    """How much packed examples influence each other."""

    leak: float
    """Change of the other examples' logits when one is changed, in units of their spread, at the
    token where it is largest."""
    leak_tolerance: float
    gradient_leak: float
    """Largest gradient of the other examples' logits with respect to the embeddings of the first,
    divided by the largest with respect to their own. It must be exactly 0."""
    difference: float
    """Largest difference between an example's loss packed and unpacked (mean over its tokens)."""
    tolerance: float
    """Largest `difference` that is accepted."""

    @property
    def passed(self) -> bool:
        """Tell whether the examples are separate. NaN is never within a tolerance."""
        return (
            self.leak <= self.leak_tolerance
            and self.gradient_leak == 0
            and self.difference <= self.tolerance
        )

    def summary(self) -> str:
        """Format one line for the log."""
        return f"packing checked on this model: {self._figures()}"

    def refusal(self) -> str:
        """Say what is wrong, to follow the model's name."""
        return f"lets packed examples see each other: {self._figures()}"

    def _figures(self) -> str:
        return (
            f"changing one example changes the logits of another by {self.leak:.1e} of their "
            f"spread (tolerance {self.leak_tolerance:.1e}), the gradient between examples is "
            f"{self.gradient_leak:.1e} (must be 0), and packed and unpacked losses differ by "
            f"{self.difference:.1e} (tolerance {self.tolerance:.1e})"
        )


def check_packing(
    model: PreTrainedModel, packed: Batch, padded: Batch, dtype: torch.dtype
) -> PackingCheck:
    """Check on the loaded model that packed examples do not see each other.

    The tolerances are rounding, or twice the effect of changing one row on the other rows of a
    padded batch where that is larger: with LLM.int8() the outliers of one row decide how all rows
    are quantized. That effect can be as large as the spread of the logits, so a leak could hide in
    it. Gradients separate the two: they flow where an example sees another, but not through the
    choice of outliers.

    Args:
        packed: a few examples in one row.
        padded: the same examples in the same order, one per row.
        dtype: autocast dtype; float32 means no autocast.

    Raises:
        ModelError: they see each other, or the model does not accept packed examples.
    """
    import torch

    documents = packed.documents
    vocabulary_size = model.config.get_text_config().vocab_size

    def edited(batch: Batch) -> Batch:
        ids = batch.input_ids.clone()
        ids[0, : documents[0]] = (ids[0, : documents[0]] + 1) % vocabulary_size
        return replace(batch, input_ids=ids)

    autocast = torch.autocast(packed.input_ids.device.type, dtype, enabled=dtype != torch.float32)
    try:
        with eval_mode(model), torch.no_grad(), autocast:
            # One after the other: with a large vocabulary, logits can outweigh a training step.
            shift, _, together = _effect_of_an_edit(model, packed, edited(packed), documents)
            noise, loss_noise, apart = _effect_of_an_edit(model, padded, edited(padded), documents)
        with eval_mode(model), autocast:
            gradient_leak = _gradient_leak(model, _shortened(packed))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise _refusal(model, f"does not accept packed examples: {error}") from error
    both = zip(together, apart, strict=True)
    rounding = TOLERANCES[str(dtype).removeprefix("torch.")]
    check = PackingCheck(
        leak=shift,
        leak_tolerance=max(rounding, 2 * noise),
        gradient_leak=gradient_leak,
        difference=float(torch.stack([(new - old).mean() for new, old in both]).abs().max()),
        tolerance=max(rounding, 2 * loss_noise),
    )
    if not check.passed:
        raise _refusal(model, check.refusal())
    return check


def shares_prefixes(
    model: PreTrainedModel, apart: Batch, shared: Batch, dtype: torch.dtype
) -> bool:
    """Check on the loaded model that a prefix can be computed once for several documents.

    Args:
        apart: some documents of one link, whole.
        shared: the same, with their common prefix once.
        dtype: autocast dtype; float32 means no autocast.
    """
    import torch

    autocast = torch.autocast(apart.input_ids.device.type, dtype, enabled=dtype != torch.float32)
    try:
        with eval_mode(model), torch.no_grad(), autocast:
            wanted = _logits(model, apart, apart.documents)
            found = _logits(model, shared, shared.documents)
    except (NotImplementedError, TypeError, ValueError):
        return False
    pairs = zip(wanted, shared.prefixes, strict=True)
    rests = [logits[prefix:] for logits, prefix in pairs]
    return _largest_shift(rests, found) <= TOLERANCES[str(dtype).removeprefix("torch.")]


def _effect_of_an_edit(
    model: PreTrainedModel, batch: Batch, edited: Batch, lengths: tuple[int, ...]
) -> tuple[float, float, list[Tensor]]:
    """Compute what changing the first example does to the others.

    Args:
        edited: the batch with another first example.

    Returns:
        The largest shift of a token's logits, the largest change of an example's losses (mean over
        its tokens), and the losses of each example of `batch`.
    """
    targets = batch.input_ids.flatten().split(lengths)
    before = _logits(model, batch, lengths)
    losses = _losses(before, targets)
    kept = [found.clone() for found in before[1:]]  # a view would keep the first example's too
    del before
    after = _logits(model, edited, lengths)[1:]
    pairs = zip(_losses(after, targets[1:]), losses[1:], strict=True)
    # Per token: the mean may hardly change by chance.
    change = max(float((new - old).abs().mean()) for new, old in pairs)
    return _largest_shift(kept, after), change, losses


def _logits(model: PreTrainedModel, batch: Batch, lengths: tuple[int, ...]) -> list[Tensor]:
    """Return the logits (T, V) of each example, in the model's dtype.

    A model that scores rows has no logits of tokens. Those of a tied head take their place.
    """
    if score_layer(model) is None:
        found = model(**batch.inputs(), use_cache=False).logits
    else:
        hidden = (decoder_of(model) or model)(**batch.inputs(), use_cache=False).last_hidden_state
        embedding: Any = model.get_input_embeddings()
        if hidden.shape[-1] != embedding.weight.shape[1]:
            raise ValueError("the width of its embedding is not that of its layers")
        found = hidden @ embedding.weight.T
    if batch.documents:
        return list(found[0].split(lengths))
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


def _shortened(packed: Batch) -> Batch:
    """Shorten each example: gradients could take more memory here than in training."""
    import torch

    pieces = [ids[:_GRADIENT_TOKENS] for ids in packed.input_ids[0].split(packed.documents)]
    ids = torch.cat(pieces)[None]
    return replace(packed, input_ids=ids, labels=ids, documents=tuple(map(len, pieces)))


def _gradient_leak(model: PreTrainedModel, packed: Batch) -> float:
    """Return the largest gradient of the other examples' logits with respect to the embeddings of
    the first example, divided by the largest with respect to their own."""
    import torch

    seen: list[Tensor] = []

    def watch(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[-1].clone()  # a model may change it in place, which a leaf does not allow

    first = packed.documents[0]
    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            _, *others = _logits(model, packed, packed.documents)
            # The norm of each token's logits: its terms cannot cancel each other, and its gradient
            # has about the same size for all models, which matters in float16.
            norms = torch.cat(others).float().norm(dim=-1)
            [gradient] = torch.autograd.grad(norms.sum(), seen)
    finally:
        hook.remove()
    sizes = gradient[0].float().norm(dim=-1)  # (T,)
    return float(sizes[:first].max() / sizes[first:].max())


def _largest_shift(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest distance between the logits of a token before and after, in units of the
    spread of those before."""
    import torch

    shifts = []
    for olds, news in zip(before, after, strict=True):
        for token, new in zip(olds, news, strict=True):  # one at a time takes less memory
            old = token.float()
            shifts.append((new.float() - old).norm() / (old - old.mean()).norm())
    return float(torch.stack(shifts).max())


def _losses(logits: list[Tensor], input_ids: Sequence[Tensor]) -> list[Tensor]:
    """Return the loss of each token (T - 1,) for each example."""
    import torch
    import torch.nn.functional as F

    def of_example(found: Tensor, targets: Tensor) -> Tensor:
        pairs = zip(found, targets, strict=True)
        return torch.stack([F.cross_entropy(token.float(), target) for token, target in pairs])

    return [of_example(found[:-1], ids[1:]) for found, ids in zip(logits, input_ids, strict=True)]


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    config = model.config
    back_end = config._attn_implementation
    name = "sdpa" if back_end in (NAME, _MASKLESS) else back_end
    return ModelError(
        f"data.packing: {config.model_type} with attention {name} {reason}",
        hint="--set data.packing=false; or try another model.attention",
    )
