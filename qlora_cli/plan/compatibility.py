"""Check that base, adapter, tokenizer and row length go together, without any data.

A dry run on a miniature of the base (the same architecture, narrow, with random weights) takes one
row through forward, backward, save, load and merge. It takes about a second, whatever the size of
the base, and finds what would otherwise fail after the data is prepared, or after the training.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_cli._compat import quiet_libraries
from qlora_cli.adapters.base import AdapterMethod
from qlora_cli.common.formatting import MIB, size_text
from qlora_cli.common.hashing import hash_json
from qlora_cli.common.report import Report
from qlora_cli.data.prepared.first_rows import check_first_bad_rows, check_first_rows
from qlora_cli.data.render.chat_template import read_chat_template
from qlora_cli.data.sources import BadRows
from qlora_cli.errors import DataError, ModelError
from qlora_cli.models.context import read_context
from qlora_cli.models.report import WeightCounts, count_base_weights, refuse_mostly_unquantized
from qlora_cli.plan.miniature_run import UnattachedMiniature, UncheckedModel, dry_run_miniature
from qlora_cli.plan.module_search import with_way_out
from qlora_cli.plan.trace.meta_model import build_quantized_meta_model
from qlora_cli.plan.traced_memory import attention_option
from qlora_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("qlora")


@dataclass(frozen=True, slots=True)
class CompatibilityReport(Report):
    """How base, adapter, tokenizer and row length go together (`qlora validate --deep`)."""

    architecture: str
    """Model type of the base."""
    steps: list[str]
    """Steps of the dry run that passed: forward, backward, save, load, merge."""
    not_checked: str
    """Why no dry run was possible; empty if it was. The run itself then finds what does not fit."""
    seconds: float
    """Time that the check took."""


def check_compatibility(recipe: Recipe) -> CompatibilityReport:
    """Refuse base, tokenizer, adapter and row length that do not go together, and unusable rows.

    The first rows of each source on this machine are read.

    Raises:
        ModelError: by name, with the way out.
        DataError: a source has no usable row, preference rows, or bad rows among the first.
    """
    found = check_model(recipe)
    _read_first_rows(recipe)
    return found


def _read_first_rows(recipe: Recipe) -> None:
    """Read the first rows of each source, and encode them if the tokenizer is on this machine."""
    data, model = recipe.data, recipe.model
    data.require_rows(recipe.objective)
    tokenizer = context = None
    if model.is_at_hand():
        tokenizer = model.load_tokenizer(read_chat_template(data.chat_template))
        context = model.read_context(recipe.adapter.virtual_tokens)
    for source in [*data.train_sources, *data.evaluation_sources]:
        if not source.is_at_hand():
            continue
        if tokenizer is not None:
            check_first_rows(
                source,
                tokenizer,
                data,
                num_rows=_FIRST_ROWS,
                context=context,
                objective=recipe.objective,
            )
            continue
        skip = data.on_bad_row == "skip"
        bad = BadRows(tries_repairs=not skip)
        for row in islice(source.in_file_order().conversations(bad), _FIRST_ROWS):
            try:
                recipe.objective.values_of(row)
            except DataError as error:
                bad.add(row.place, error)
        check_first_bad_rows(source, bad, _FIRST_ROWS, skip=skip)


def check_model(recipe: Recipe) -> CompatibilityReport:
    """Refuse base, adapter and row length that do not go together.

    It leaves random number generators, settings of torch and the disk as they were.

    Raises:
        ModelError: by name, with the way out.
    """
    quiet_libraries()
    started = time.monotonic()
    config, _ = recipe.model.read_config()
    adapter: AdapterMethod = recipe.adapter
    # The miniature is made of these, wherever the base lies.
    model = recipe.model.model_dump_json(exclude={"path"})
    named = [adapter.model_dump_json(), recipe.quantization.model_dump_json(), model]
    described = json.loads(config.to_json_string(use_diff=False)) | {"_name_or_path": None}
    key = hash_json([described, *named, recipe.data.max_length])
    if key in _CHECKED:
        return _CHECKED[key]
    skeleton = _build_skeleton(recipe, config)
    read_context(config.to_dict(), adapter.virtual_tokens)  # refuses too many virtual tokens
    refuse_long_rows(skeleton, recipe.data.max_length, adapter.virtual_tokens)
    for check in adapter.checks:
        check(adapter, skeleton)
    steps: list[str] = []
    why = ""
    try:
        with torch.random.fork_rng(devices=[]), _temporary_folder() as folder:
            # Not torch.manual_seed, which also seeds the generators of other devices.
            torch.default_generator.manual_seed(0)
            try:
                steps = _dry_run(recipe, config, skeleton, folder)
            except ModelError as refusal:
                found = with_way_out(refusal, recipe, config, folder)
                if found is refusal:
                    raise  # with its own cause
                raise found from refusal
    except UncheckedModel as error:
        why = str(error)
        log.debug("no dry run on a miniature of the base: %s", why)
    _CHECKED[key] = CompatibilityReport(
        architecture=str(config.model_type),
        steps=steps,
        not_checked=why,
        seconds=round(time.monotonic() - started, 2),
    )
    return _CHECKED[key]


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Make a folder for the files of the miniature, and remove it afterwards.

    Raises:
        UncheckedModel: the disk is too full for them. The recipe may still be right.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="qlora-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UncheckedModel(f"no temporary folder: {error}") from error
    with folder as path:
        if shutil.disk_usage(path).free < _DISK_SPACE:
            raise UncheckedModel(f"less than {size_text(_DISK_SPACE)} free in {path}")
        yield Path(path)


_DISK_SPACE = 512 * MIB
"""Free space for the files of a miniature: base, adapter and merge of 20 million weights."""

_FIRST_ROWS = 100
"""Rows of each source that are read."""

_CHECKED: dict[str, CompatibilityReport] = {}
"""Results of this process: a comparison or a search trains one base many times."""


def compatibility_text(report: CompatibilityReport) -> str:
    """Describe the report in one line."""
    if report.not_checked:
        return (
            f"dry run: not possible for {report.architecture} ({report.not_checked}); names and "
            "lengths go together"
        )
    return (
        f"dry run of one row on a miniature of {report.architecture}: {', '.join(report.steps)} "
        f"work ({report.seconds:.1f} s)"
    )


def refuse_long_rows(model: PreTrainedModel, max_length: int, virtual_tokens: int = 0) -> None:
    """Refuse rows that are longer than a learned table of positions.

    Args:
        virtual_tokens: those before each row, which take positions too.

    Raises:
        ModelError: `data.max_length` is beyond the table.
    """
    tokens = model.get_input_embeddings()
    declared = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        is_table = isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe")
        # Relative positions have small tables of distances.
        if not is_table or module is tokens or not isinstance(declared, int):
            continue
        left = declared - virtual_tokens
        if module.num_embeddings >= declared and max_length > left:
            taken = f" ({virtual_tokens} of them virtual tokens)" if virtual_tokens else ""
            raise ModelError(
                f"data.max_length ({max_length}): the model has learned positions ({name}) for "
                f"{declared} tokens{taken}, so a longer row cannot be computed",
                hint=f"--set data.max_length={left}",
            )


def _as_quantized(skeleton: PreTrainedModel) -> WeightCounts:
    """Count the weights of a base on the meta device, whose quantized layers are still empty."""
    from bitsandbytes.nn import Int8Params, Params4bit

    weights = count_base_weights(skeleton)
    parameters = dict(skeleton.named_parameters())
    return replace(
        weights,
        unquantized_linear={
            name: number
            for name, number in weights.unquantized_linear.items()
            if not isinstance(parameters[name], Params4bit | Int8Params)
        },
    )


def _dry_run(
    recipe: Recipe, config: PretrainedConfig, skeleton: PreTrainedModel, folder: Path
) -> list[str]:
    """Dry-run the miniature; attach the adapter to the whole base if the miniature is too small.

    Raises:
        ModelError: the adapter does not fit, or a step fails.
        UncheckedModel: the miniature proves nothing.
    """
    try:
        return dry_run_miniature(recipe, config, folder)
    except UnattachedMiniature:
        _attach(recipe, skeleton)
        raise


def _attach(recipe: Recipe, skeleton: PreTrainedModel) -> None:
    """Put the adapter into the base on the meta device.

    Raises:
        ModelError: it refuses the settings, and not only because there are no values.
    """
    try:
        recipe.adapter.attach(skeleton)
    except ModelError as error:
        if "meta" not in str(error):
            raise


def _build_skeleton(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """Build the base on the meta device, with layers quantized as the recipe says.

    Raises:
        ModelError: its config cannot be used, or too much of it would stay unquantized.
    """
    quantization = recipe.quantization
    try:
        # The quantizer writes into the config of its model.
        skeleton = build_quantized_meta_model(
            copy.deepcopy(config),
            quantization.load_options(torch.float32),
            recipe.objective.head,
            **attention_option(recipe),
        )
        weights = _as_quantized(skeleton)
    # Settings that contradict each other fail in any way, wherever they are used first.
    except Exception as error:
        raise ModelError(f"model.path: {recipe.model.path} cannot be built: {error}") from error
    refuse_mostly_unquantized(weights, quantization.max_unquantized)
    return skeleton
