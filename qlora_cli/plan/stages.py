"""Peak memory of each stage of a run, and the timeline of its moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from qlora_cli.common.report import ABSENT
from qlora_cli.data.batching.collate import PROOF_TOKENS
from qlora_cli.distributed.devices import Target
from qlora_cli.plan.dry_run import EVALUATION, FIRST, STEP
from qlora_cli.plan.report import StageMemory, TimelineMoment
from qlora_cli.plan.rows import PlanRows
from qlora_cli.plan.trace.memory_counter import (
    ADAPTER,
    BUCKETS,
    HELD,
    LOAD,
    LOGITS,
    STATES,
    Peak,
    Segment,
)
from qlora_cli.plan.traced_memory import MemoryTrace
from qlora_cli.recipe.schema import Recipe

PROOF, SAVING = "packing proof", "saving"
_COPY = "copy of optimizer states"


def peak_of_stages(
    recipe: Recipe, trace: MemoryTrace, target: Target, rows: PlanRows
) -> dict[str, StageMemory]:
    """Compute the peak of each stage."""
    stages: dict[str, StageMemory] = {}
    for stage in (LOAD, FIRST, STEP, EVALUATION):
        if not any(segment.stage == stage for segment in trace.peaks):
            continue
        segment, peak = trace.peak(stage)
        stages[stage] = _memory(segment.part, peak)
    # The traced first step has one micro-batch. A real first step holds what later steps hold,
    # except for the optimizer states, which do not exist before its update.
    _, peak = trace.peak(STEP)
    stateless = _without_states(peak)
    if stateless.total > stages[FIRST].bytes:
        stages[FIRST] = _memory(trace.peak(STEP)[0].part, stateless)
    if rows.steps[0][0].documents:
        stages[PROOF] = _memory("forward", _proof(trace), (LOGITS,))
    if target.kind == "cpu":
        stages[SAVING] = _memory("update", _saving(trace), (_COPY,))
    if recipe.optimizer.is_paged and target.kind == "cuda":
        stages = {stage: _without_paged(memory) for stage, memory in stages.items()}
    return stages


_PARTS = ("forward", "backward", "between", "update")


def timeline_of(trace: MemoryTrace, stages: Mapping[str, StageMemory]) -> list[TimelineMoment]:
    """List what is alive at each moment of a run, in order.

    A stage whose peak is computed and not traced is a single moment.
    """
    timeline: list[TimelineMoment] = []
    for stage, highest in stages.items():
        moments = []
        for segment in sorted((s for s in trace.peaks if s.stage == stage), key=_order):
            memory = _memory(segment.part, trace.peaks[segment])
            if highest.paged_bytes is not ABSENT:
                memory = _without_paged(memory)
            moments.append(_moment(memory, stage, segment.turn, segment.place))
        if max((moment.bytes for moment in moments), default=0) != highest.bytes:
            moments = [_moment(highest, stage, 1, None)]
        timeline += moments
    return timeline


def _moment(memory: StageMemory, stage: str, turn: int, place: int | None) -> TimelineMoment:
    return TimelineMoment(**asdict(memory), stage=stage, turn=turn, place=place)


def _order(segment: Segment) -> tuple[int, int, float]:
    """Sort key: forward from the first layer to the last, then backward, then the update."""
    part = _PARTS.index(segment.part)
    last = part == _PARTS.index("update")
    place = float("inf") if segment.place is None else segment.place
    return (segment.turn + last, -1 if last else part, -place if part else place)


def _memory(part: str, peak: Peak, by_formula: Sequence[str] = ()) -> StageMemory:
    """Describe a peak, and name its kinds that are computed by a formula instead of traced."""
    kinds = sorted(peak.kinds.items(), key=lambda item: -item[1])
    return StageMemory(
        bytes=peak.total,
        during=part,
        kinds={k: v for k, v in kinds if v},
        by_formula=[k for k, v in kinds if v and k in by_formula],
        paged_bytes=ABSENT,
    )


def _proof(trace: MemoryTrace) -> Peak:
    """Compute the peak of the proof, before training, that packed examples do not see each other.

    It holds the logits of three examples, and of two of them once more, and compares them token by
    token.
    """
    _, peak = trace.peak(STEP)
    later = (ADAPTER, STATES, BUCKETS)
    kinds = {kind: peak.kinds.get(kind, 0) for kind in HELD if kind not in later}
    kinds[LOGITS] = 4 * ((3 + 2) * PROOF_TOKENS + 4) * trace.vocabulary_size
    return Peak(sum(kinds.values()), kinds)


def _saving(trace: MemoryTrace) -> Peak:
    """Compute the peak of saving a checkpoint, which is not traced.

    It holds what is held between steps, and on the host a copy of the optimizer's states.
    """
    _, peak = trace.peak(STEP)
    kinds = {kind: peak.kinds.get(kind, 0) for kind in HELD}
    kinds[_COPY] = kinds[STATES]
    return Peak(sum(kinds.values()), kinds)


def _without_states(peak: Peak) -> Peak:
    kinds = {kind: size for kind, size in peak.kinds.items() if kind != STATES}
    return Peak(sum(kinds.values()), kinds)


def _without_paged(memory: StageMemory) -> StageMemory:
    """Move paged optimizer states out of the total: they can be on the host at the peak."""
    kinds = dict(memory.kinds)
    paged = kinds.pop(STATES, 0)
    return replace(memory, bytes=memory.bytes - paged, kinds=kinds, paged_bytes=paged)
