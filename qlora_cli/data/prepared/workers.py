"""Encode rows in several processes, with the same results and order as in one."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qlora_cli.data.encode.encoder import Encoder, RefusedRow
from qlora_cli.data.encode.truncate import EncodedRow, Truncate
from qlora_cli.errors import DataError
from qlora_cli.objectives import SUPERVISED, ObjectiveSettings
from qlora_cli.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Results = list[EncodedRow | RefusedRow]

ALONE_SECONDS = 15.0
"""How long one process encodes before workers start, unless `data.workers` is set: a worker needs
some seconds to import transformers and to receive the tokenizer."""

_ENOUGH_CORES = 4
"""With fewer cores, one process is as fast as several: the tokenizer has threads of its own, and
one process reads and writes the rows in any case. 29,892 rows of GSM8K on two cores took 27 and 14
seconds in one process and 28 and 20 with two workers, alternating on a machine with other work."""

_CHUNK = 256
"""Rows tokenized together, and sent to a worker together."""


class Workers:
    """Encodes rows, in this process or in workers.

    Args:
        objective: has to know the label of each row.
        number: number of processes. None starts with one, and takes one per core for large data if
            there are enough cores.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        truncate: Truncate,
        number: int | None,
        objective: ObjectiveSettings = SUPERVISED,
    ) -> None:
        self._objective = objective
        self._settings = (tokenizer, max_length, truncate)
        self._job = _Job(*self._settings)
        cores = _num_cores()
        self._number = number or (cores if cores >= _ENOUGH_CORES else 1)
        self._is_patient = number is None
        self._pool: ProcessPoolExecutor | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(
        self, rows: Iterable[Conversation]
    ) -> Iterator[tuple[Conversation, EncodedRow | RefusedRow]]:
        """Yield each row and its encoding, in order.

        Raises:
            DataError: the chat template is missing or broken, or a worker died.
        """
        for chunk, results in self._encode_chunks(_chunks(rows)):
            for row, found in zip(chunk, results, strict=True):
                yield row, self._problem(row) or found

    def _problem(self, row: Conversation) -> RefusedRow | None:
        try:
            self._objective.values_of(row)
        except DataError as error:
            return RefusedRow(str(error))
        return None

    def _encode_chunks(
        self, chunks: Iterable[list[Conversation]]
    ) -> Iterator[tuple[list[Conversation], Results]]:
        waiting: deque[tuple[list[Conversation], Future[Results]]] = deque()
        is_checked = False
        for chunk in chunks:
            if not is_checked and any(row.messages[0].role != "text" for row in chunk):
                self._job.encoder.check_template()
                is_checked = True
            if not self._is_time_for_help():
                yield chunk, self._job.encode(chunk)
                continue
            waiting.append((chunk, self._submit(chunk)))
            # Enough that no worker waits, and few enough that memory does not grow with the data.
            if len(waiting) > 2 * self._number:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)

    def _is_time_for_help(self) -> bool:
        if self._number == 1 or self._pool is not None:
            return self._pool is not None
        return not self._is_patient or time.monotonic() - self._started > ALONE_SECONDS

    def _submit(self, chunk: list[Conversation]) -> Future[Results]:
        if self._pool is None:
            # Never fork: the tokenizer's threads do not survive in a copy of the process, but the
            # locks that they held do.
            self._pool = ProcessPoolExecutor(
                self._number,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=self._settings,
            )
        try:
            return self._pool.submit(_encode, chunk)
        except BrokenProcessPool as error:
            raise _died(chunk) from error


class _Job:
    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_length: int, truncate: Truncate
    ) -> None:
        self.encoder = Encoder(tokenizer)
        self._max_length = max_length
        self._truncate = truncate

    def encode(self, chunk: list[Conversation]) -> Results:
        return self.encoder.encode_rows(chunk, max_length=self._max_length, truncate=self._truncate)


_job: _Job | None = None
"""The job of a worker process."""


def _start(tokenizer: PreTrainedTokenizerFast, max_length: int, truncate: Truncate) -> None:
    global _job
    # Each core already has a process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job = _Job(tokenizer, max_length, truncate)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Exit when the parent is gone.

    A worker waits for work in a pipe whose writing end it also holds. Without this, it would wait
    for ever after its parent was killed, and keep its memory.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: list[Conversation]) -> Results:
    assert _job is not None
    return _job.encode(chunk)


def _next(
    waiting: deque[tuple[list[Conversation], Future[Results]]],
) -> tuple[list[Conversation], Results]:
    chunk, future = waiting.popleft()
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        raise _died(chunk) from error


def _died(chunk: list[Conversation]) -> DataError:
    return DataError(
        f"data.workers: a process that prepares rows died at {chunk[0].place} or after it, "
        "probably killed by the OOM killer",
        hint="--set data.workers=1 needs the least memory, and shows errors in a row",
    )


def _chunks(rows: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
