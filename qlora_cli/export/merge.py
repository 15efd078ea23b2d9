"""Merge an adapter into its base, tensor by tensor, and verify the result."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.adapters.weight_edits import build_skeleton
from qlora_cli.common.atomic_files import atomic_folder
from qlora_cli.common.digests import refuse_damaged, write_digests
from qlora_cli.common.formatting import size_text
from qlora_cli.common.report import ABSENT
from qlora_cli.distributed.world import World
from qlora_cli.errors import RecipeError
from qlora_cli.export.dequantize import FakeQuantizer
from qlora_cli.export.merge_files import verify_files, write_files
from qlora_cli.export.merge_shards import NewHead, ShardMerger
from qlora_cli.export.verify import compare_models, refuse_infidelity
from qlora_cli.models.base import refuse_prequantized
from qlora_cli.models.heads import SCORE_WEIGHT, config_settings
from qlora_cli.models.loading import trained_dtype
from qlora_cli.models.shards import Shards
from qlora_cli.models.tokenizer import load_tokenizer
from qlora_cli.models.weight_names import WeightNames
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.merge_report import MergeReport
from qlora_cli.runs.model_card import model_card
from qlora_cli.runs.run_folder import RunFolder, Weights, recipe_of_run
from qlora_cli.types import HeadSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qlora")

Base = Literal["as-trained", "original"]


def merge(
    run_folder: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    weights: Weights,
    base: Base | None = None,
    with_logits: bool = True,
) -> MergeReport:
    """Write a plain model folder that needs neither adapter nor quantization.

    The update is added in float32, one tensor at a time, and stored in the dtype of the base. It is
    never packed into 4 bit, where rounding would undo it. The weights of full fine-tuning are
    copied.

    Args:
        base: what the update is added to: the weights that the adapter was trained against
            (dequantized if they were quantized), or those of the base's files. The default is
            as-trained for a quantized run; without quantization the two are the same.
        with_logits: compare the written model with base plus adapter, if memory allows.

    Raises:
        RecipeError: `run_folder` is not a finished run, or `output` exists.
        ModelError: the run cannot be merged, or the result differs from what was trained.
    """
    quiet_libraries()
    run = RunFolder(run_folder)
    if not run.record.exists():
        raise RecipeError(f"{run_folder} is not a run folder", hint="give the output.dir of a run")
    recipe = recipe_of_run(run, [*_precision_of(run), *overrides])
    if output.exists():
        raise RecipeError(f"--output: {output} exists", hint="choose another folder, or remove it")
    trained = run.weights(weights)
    tokenizer = load_tokenizer(trained, trust_remote_code=recipe.model.trust_remote_code)
    base_folder = recipe.model.locate()
    refuse_prequantized(base_folder)
    refuse_damaged(base_folder)
    plan = prepare(recipe, base_folder, trained, base)

    try:
        with atomic_folder(output) as unfinished:
            size = sum(stored.size for file in plan.layout().values() for stored in file.values())
            refuse_full_disk(unfinished, size)
            digests = plan.write(unfinished)
            plan.verify(unfinished, digests)
            write_files(base_folder, trained, tokenizer, plan, unfinished)
            verify_files(base_folder, trained, tokenizer, plan, unfinished)
            base = "as-trained" if plan.is_as_trained else "original"
            found = None
            if with_logits:
                found = compare_models(recipe, trained, unfinished, tokenizer, base)
            if found is not None:
                held = _trained_dtype(recipe)
                is_exact = plan.dtype == "float32" and (base == "original" or held == torch.float32)
                refuse_infidelity(found, is_exact=is_exact)
            report = MergeReport(
                output=str(output),
                weights=weights,
                base=base,
                dtype=plan.dtype,
                bytes=sum(file.stat().st_size for file in unfinished.glob("*.safetensors")),
                update=plan.report(),
                logit_error=None if found is None else found.logit_error,
                kl=None if found is None else found.kl,
                top1_agreement=None if found is None else found.top1_agreement,
                comparison=None if found is None else found.comparison,
                labels=ABSENT if recipe.objective.head is None else [*recipe.objective.head.labels],
            )
            text = json.dumps(report.to_json(), indent=2) + "\n"
            (unfinished / "merge.json").write_text(text, encoding="utf-8")
            card = model_card(run, weights, name=output.name, proof=report)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
            write_digests(unfinished)
    except OSError as error:
        raise RecipeError(
            f"--output: {output} could not be written, and nothing is left of it: {error}"
        ) from error
    return report


def _precision_of(run: RunFolder) -> list[str]:
    """Return the override for the run's precision: `auto` may resolve to another one here."""
    precision = run.read_record().get("precision")
    return [] if precision is None else [f"training.precision={precision}"]


def _trained_dtype(recipe: Recipe) -> torch.dtype:
    return trained_dtype(recipe.quantization, recipe.training.precision, World(recipe.device))


def prepare(recipe: Recipe, base_folder: Path, trained: Path, base: Base | None) -> ShardMerger:
    """Plan the merge of a run before anything is written.

    Raises:
        ModelError: the trained weights do not fit the base, or cannot be merged.
    """
    dtype = _trained_dtype(recipe)
    return plan_merge(
        recipe.adapter,
        base_folder,
        trained,
        recipe.quantization.load_options(dtype),
        recipe.objective.head,
        base=base,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def plan_merge(
    adapter: AdapterMethod,
    base_folder: Path,
    trained: Path,
    load_options: dict[str, Any],
    head: HeadSpec | None = None,
    *,
    base: Base | None = None,
    trust_remote_code: bool = False,
) -> ShardMerger:
    """Plan the merge of a trained adapter into the model of a folder.

    Args:
        load_options: what `load_options()` of the quantization returns.
        head: the head that scores rows; None is the one that predicts tokens.

    Raises:
        ModelError: the trained weights do not fit the base, or cannot be merged.
    """
    shards = Shards(base_folder)
    build = partial(build_skeleton, base_folder, trust_remote_code=trust_remote_code)
    rounding = FakeQuantizer(build(head), load_options)
    skeleton = build(head)
    names = WeightNames(skeleton, shards.tensors)
    tied = dict(skeleton.all_tied_weights_keys)
    new_head = None if head is None else _new_head(skeleton, build(None), shards, head)
    edits = adapter.weight_edits(skeleton, names, trained)
    is_as_trained = bool(rounding.names) and base != "original"
    return ShardMerger(
        shards, names, edits, rounding, tied, as_trained=is_as_trained, head=new_head
    )


def _new_head(
    skeleton: PreTrainedModel, causal: PreTrainedModel, shards: Shards, head: HeadSpec
) -> NewHead:
    """Describe the head of a merged model that scores rows.

    Args:
        skeleton: the merged model on the meta device.
        causal: the base with the head that predicts tokens, on the meta device.
        shards: the base's files.
    """
    names = WeightNames(causal, shards.tensors)
    predicting = causal.get_output_embeddings()
    found = [name for name, module in causal.named_modules() if module is predicting]
    weights = [f"{name}.{key}" for name in found for key, _ in predicting.named_parameters()]
    stored = {names.in_files[weight] for weight in weights if weight in names.in_files}
    kept = WeightNames(skeleton, shards.tensors).in_model
    state, is_stored = skeleton.state_dict(), SCORE_WEIGHT in kept.values()
    return NewHead(
        shapes={} if is_stored else {SCORE_WEIGHT: tuple(state[SCORE_WEIGHT].shape)},
        replaced=frozenset(name for name in stored if kept[name] not in state),
        config={"architectures": [type(skeleton).__name__], **config_settings(head)},
    )


def refuse_full_disk(folder: Path, size: int) -> None:
    """Refuse to write `size` bytes, plus some small files, to a disk without room for them.

    Raises:
        RecipeError: the disk has less free space.
    """
    free, wanted = free_bytes(folder), size + 2**26
    if free < wanted:
        raise RecipeError(
            f"--output: {size_text(wanted)} are needed, and {size_text(free)} are free "
            f"in {folder.parent}"
        )


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk of a folder."""
    return shutil.disk_usage(folder).free
