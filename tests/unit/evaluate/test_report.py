"""The keys of `--json`, which scripts depend on."""

from __future__ import annotations

import pytest

from qlora_cli.common.report import Report, field_names, key_of
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.lm_eval import HarnessReport
from qlora_cli.evaluate.report import EvaluationReport, MeasureInfo
from qlora_cli.inference.batch import GenerationReport
from qlora_cli.inspect.adapters import (
    AdapterDifference,
    AdapterList,
    AdapterReport,
    ListedAdapter,
    ModuleDifference,
    ModuleUpdate,
    UpdateGroup,
)
from qlora_cli.inspect.preview import PreviewRow

KEYS: dict[type[Report], str] = {
    EvaluationReport: (
        "target compare weights models differences measures confidence resamples records"
    ),
    Estimate: "value low high",
    MeasureInfo: "n is_share lower_is_better",
    HarnessReport: "target weights as_chat harness tasks",
    GenerationReport: "output model prompts tokens unfinished seconds",
    PreviewRow: "source row answer input_ids labels text",
    AdapterList: "folder adapters",
    ListedAdapter: "path base type r alpha target_modules bytes steps best",
    AdapterReport: (
        "path base base_identity type r alpha use_rslora use_dora target_modules modules_to_save "
        "weights bytes norm kinds layers modules"
    ),
    ModuleUpdate: "name layer kind shape rank norm largest effective_rank",
    UpdateGroup: "modules norm largest effective_rank",
    AdapterDifference: (
        "first second settings cosine norm_ratio distance modules only_first only_second"
    ),
    ModuleDifference: "name cosine norm_ratio distance",
}


@pytest.mark.parametrize("report", KEYS, ids=lambda report: report.__name__)
def test_the_keys_of_a_report_stay_the_same(report: type[Report]) -> None:
    assert [key_of(name) for name in field_names(report)] == KEYS[report].split()
