"""The keys of `--json`, which scripts depend on."""

from __future__ import annotations

import pytest

from qlora_cli.common.report import Report, field_names, key_of
from qlora_cli.compare.report import (
    CellFailure,
    CellGeneration,
    CellMemory,
    CellReport,
    CompareReport,
    Latency,
    LossPoint,
)
from qlora_cli.evaluate.bootstrap import Estimate
from qlora_cli.evaluate.lm_eval import HarnessReport
from qlora_cli.evaluate.report import EvaluationReport, MeasureInfo
from qlora_cli.export.combine_report import CombineReport, ParentEvaluation
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
from qlora_cli.plan.report import (
    Fits,
    HostMemory,
    LargestRows,
    MatmulRate,
    MicroBatch,
    PeakMemory,
    PlannedDevice,
    PlannedModel,
    PlanReport,
    ProcessMemory,
    StageMemory,
    TableCell,
    TableDevice,
    TableModel,
    TableReport,
    TimelineMoment,
)

KEYS: dict[type[Report], str] = {
    PlanReport: (
        "model device rows peak stages timeline process fits adapter_bytes checkpoint_bytes "
        "quantization host flops_per_token flops seconds_of_training tokens_per_second rate "
        "traced_layers layers no_shorter changes micro_batch context warnings seconds"
    ),
    PlannedModel: "path dimensions weights trained trained_share",
    PlannedDevice: "name number bytes",
    LargestRows: "from micro_batches steps tokens longest",
    StageMemory: "bytes during kinds by_formula paged_bytes",
    PeakMemory: "bytes during kinds by_formula paged_bytes stage",
    TimelineMoment: "bytes during kinds by_formula paged_bytes stage turn place",
    ProcessMemory: "low high needed parts",
    Fits: "verdict margin",
    HostMemory: "saving_bytes paged_bytes inputs_bytes",
    MatmulRate: "flops used is_measured",
    MicroBatch: "rows is_auto",
    TableReport: "model device methods",
    TableModel: "path dimensions",
    TableDevice: "name bytes",
    TableCell: "tensors low high verdict",
    CompareReport: ("folder first varied measures bases confidence resamples environment cells"),
    CellReport: (
        "name recipe method settings status failure run trained_weights total_weights "
        "trained_share steps tokens seconds tokens_per_second weights_bytes run_bytes memory "
        "generation results differences base from_base curve"
    ),
    CellFailure: "error hint",
    CellMemory: (
        "planned_tensor_bytes planned_process_bytes planned_kinds plan_error measured_bytes "
        "measured_tensor_bytes"
    ),
    CellGeneration: "base tuned merged",
    Latency: "first_token_seconds tokens_per_second error",
    LossPoint: "step tokens seconds loss",
    CombineReport: ("output adapters weights method density rank seed norm error evaluations"),
    ParentEvaluation: "target models differences measures confidence resamples",
    EvaluationReport: (
        "target compare weights models differences measures confidence resamples records confusion"
    ),
    Estimate: "value low high",
    MeasureInfo: "n is_share lower_is_better",
    HarnessReport: "target weights as_chat harness tasks",
    GenerationReport: "output model prompts tokens unfinished seconds",
    PreviewRow: "source row answer num_shared label input_ids labels text",
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
