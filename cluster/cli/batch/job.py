"""Asking for the answers of a batch: some requests at once, their answers in the order of the input."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.cli.batch.output import ClosedError, Earlier, OutputError, Stream, open_output
from cluster.cli.batch.progress import Progress, make_progress
from cluster.cli.batch.records import BadRecord, Input, Record, check_urgency, look_at, read_record
from cluster.cli.batch.results import IncompleteError, Totals, answer, encoded, error_line
from cluster.cli.terminal import counted
from cluster.client.backends import Backend
from cluster.wire.answers import Chunk
from cluster.wire.statuses import concerns_all, has_no_room_now, is_away
from runtime.errors import DeadlineError, OutriderError

PATIENCE_S = 300.0
"""How long a server that is away, or full, is asked again while it answers nothing: it may have to load its model."""
NEVER_THERE_S = 30.0
"""The same for one that has never answered: its address may be wrong."""
TICK_S = 1.0
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
MIN_WINDOW = 64
WINDOW_PER_REQUEST = 8
"""Records that may be read and not yet written, for each request in flight: a slow one holds up no other."""
WINDOW_BYTES = 64 * 2**20
"""The same in bytes of the input; a longer line is alone."""

Defaults = Mapping[str, Mapping[str, Any]]


def away_patience_s(given_s: float | None) -> float:
    """How long one answer is waited for whose server went away, where so much patience is asked for."""
    return PATIENCE_S if given_s is None else given_s


class StoppedError(OutriderError):
    """The batch has not come to the end of its input."""


def run(
    source: Path,
    target: Path,
    connect: Callable[[], tuple[Backend, Defaults]],
    *,
    resume: bool = False,
    concurrency: int = 1,
    limit: int | None = None,
    patience_s: float | None = None,
    priority: int | None = None,
    deadline_s: float | None = None,
    totals: Totals | None = None,
    progress: Progress | None = None,
) -> Totals:
    """Answer every record of `source` into `target`; a record that cannot be answered gets a line with "error".

    Both are opened before `connect` is called, which gives who answers, and the "sampling" and "lookahead" parameters
    of records that name none of their own. `priority` is that of records without one; what is not answered
    `deadline_s` seconds from now becomes an error, as a record does whose own deadline passes.

    See `output` for what becomes of earlier answers, and of those of a run that does not come to its end. Raises
    ConfigError before anything is asked, then StoppedError (ClosedError where nobody reads the output any more).
    `totals` is kept up to date whatever happens.
    """
    for option, value in (("--priority", priority), ("--deadline", deadline_s)):
        if value is not None:
            check_urgency(option, value)
    urgency = Urgency(priority, deadline_s)
    progress = progress or make_progress()
    totals = totals if totals is not None else Totals()
    output = open_output(target, look_at(source), resume)
    job = None
    try:
        lines = Input(source)
        try:
            backend, defaults = connect()
        except BaseException:
            lines.close()
            raise
        with closing(backend), progress:
            job = _Job(lines, output, backend, defaults, concurrency, limit, patience_s, urgency, totals, progress)
            job.run()
    except BaseException as error:
        with suppress(OutputError):
            output.close(is_complete=False)
        if job is None or isinstance(error, ClosedError):
            raise
        records = counted(totals.num_records, "record")
        if isinstance(error, OutriderError):
            raise StoppedError(_with_hint(f"stopped after {records}: {error}", output)) from error
        progress.note(_with_hint(f"ended after {records}", output))
        raise
    try:
        output.close(is_complete=True)
    except OutputError as error:
        raise StoppedError(_with_hint(str(error), output)) from error
    if output.kept:
        progress.note(output.kept)
    return totals


def _with_hint(text: str, output: Stream) -> str:
    return f"{text}; {output.kept}" if output.kept else text


@dataclass(frozen=True)
class _Item:
    """A record that has been read, and its line of the output, known or to come."""

    record_id: str | int
    size: int
    """Bytes of its line in the input."""
    end: int
    """Bytes of the input up to its end."""
    future: Future[dict[str, Any]]
    earlier: Earlier | None = None
    """What an earlier run has written for it; an answer takes the place of one of its own."""


class Urgency:
    """The job's priority and deadline, and what they make of a record's own."""

    def __init__(self, priority: int | None = None, deadline_s: float | None = None) -> None:
        self._priority = {} if priority is None else {"priority": priority}
        self._end_s = None if deadline_s is None else time.monotonic() + deadline_s

    def of(self, record: Record, asked_s: float) -> dict[str, Any]:
        """What a request for the record says now; `asked_s`: when it was made first (time.monotonic())."""
        now_s = time.monotonic()
        found = {**self._priority, **record.urgency}
        left = [] if "deadline_s" not in found else [asked_s + found["deadline_s"] - now_s]
        if self._end_s is not None:
            left.append(self._end_s - now_s)
        return {**found, "deadline_s": min(left)} if left else found


class _Room:
    """Bounds the records that are read and not yet written, in number and in bytes."""

    def __init__(self, num_records: int) -> None:
        self._limit = num_records
        self._num_records = self._num_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """Wait until there is room for a record of `size` bytes; False where there will be none any more."""

        def is_free() -> bool:
            fits = self._num_records < self._limit and self._num_bytes + size <= WINDOW_BYTES
            return self._is_closed or fits or not self._num_records

        with self._changed:
            self._changed.wait_for(is_free)
            self._num_records += 1
            self._num_bytes += size
            return not self._is_closed

    def give(self, size: int) -> None:
        """A record of `size` bytes is written."""
        with self._changed:
            self._num_records -= 1
            self._num_bytes -= size
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()


class _Job:
    """One thread reads, some ask, and the caller's writes."""

    def __init__(
        self,
        lines: Input,
        output: Stream,
        backend: Backend,
        defaults: Defaults,
        concurrency: int,
        limit: int | None,
        patience_s: float | None,
        urgency: Urgency,
        totals: Totals,
        progress: Progress,
    ) -> None:
        self._lines, self._output, self._backend, self._defaults = lines, output, backend, defaults
        self._patience_s, self._urgency = patience_s, urgency
        self._limit, self._totals, self._progress = limit, totals, progress
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="outrider-batch")
        self._room = _Room(max(MIN_WINDOW, WINDOW_PER_REQUEST * concurrency))
        self._items: queue.SimpleQueue[_Item | Exception | None] = queue.SimpleQueue()
        """In the order of the input; None is its end, an error what ends it."""
        self._turn = threading.Condition()
        """Guards what follows; those who wait to ask again hear when an answer has ended."""
        self._heard_s = time.monotonic()  # when the last piece of an answer came
        self._was_there = False  # whether one has come
        self._stopped: str | None = None  # why nothing is asked any more
        self._is_waiting = False  # whether it has been said that requests are made again
        # Of the caller's thread.
        self._pending: _Item | None = None  # the record whose line is the next
        self._part: float | None = None  # of the input that is done, where that is known
        self._skipped = 0.0  # of that, what an earlier run had done

    def run(self) -> None:
        """Answer the records. Raises StoppedError or OutputError, the answers before it written."""
        started_s = time.monotonic()
        threading.Thread(target=self._read, name="outrider-batch-read", daemon=True).start()
        try:
            while (item := self._next()) is not None:
                while not wait([item.future], TICK_S).done:
                    self._show()
                self._write(item)
                self._show()
        except BaseException as error:
            self._end("the batch is stopped")
            self._room.close()
            self._backend.close()  # ends the streams that the threads are waiting for
            self._executor.shutdown(cancel_futures=True)
            if not isinstance(error, OutputError):
                self._write_finished()
            raise
        finally:
            self._executor.shutdown()
            self._totals.seconds = time.monotonic() - started_s

    # On the thread that reads

    def _read(self) -> None:
        try:
            for line in islice(self._lines.lines(), self._limit):
                size = len(line.content)
                if not self._room.take(size):
                    return
                record = read_record(line)
                earlier = self._output.earlier(record.id)
                future: Future[dict[str, Any]] = Future()
                if earlier is not None and earlier.is_answer:
                    future.set_result({})
                elif isinstance(record, BadRecord):
                    future.set_result(error_line(record.id, record.error))
                else:
                    future = self._executor.submit(self._answer, record)
                self._items.put(_Item(record.id, size, line.end, future, earlier))
            self._items.put(None)
        except OSError as error:
            self._items.put(StoppedError(f"the input cannot be read any further: {error.strerror}"))
        except Exception as error:
            self._items.put(error)
        finally:
            self._lines.close()

    # On the threads that ask

    def _answer(self, record: Record) -> dict[str, Any]:
        """The record's line of the output. Raises StoppedError where it has to be asked for another time."""
        started_s, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            if self._stopped is not None:
                raise StoppedError(self._stopped)
            urgency = self._urgency.of(record, started_s)
            if urgency.get("deadline_s", 1.0) <= 0:
                problem = (
                    "its time has passed" if wait_s == FIRST_WAIT_S else "its time has passed while it was asked for"
                )
                return error_line(record.id, str(DeadlineError(problem, "Allow more time.")))
            try:
                found = answer(list(self._ask(record, urgency)))
                with self._turn:
                    self._is_waiting = False
                    self._turn.notify()
                return {"id": record.id, **found}
            except Exception as error:  # whatever it is, it must not cost the other records
                if self._stopped is not None:
                    raise StoppedError(self._stopped) from error
                if concerns_all(error):
                    raise StoppedError(self._end(str(error))) from error
                is_full = has_no_room_now(error)
                if not (is_full or is_away(error) or isinstance(error, IncompleteError)):
                    text = str(error) if isinstance(error, OutriderError) else f"{type(error).__name__}: {error}"
                    return error_line(record.id, text)
                patience_s = self._patience_s
                if patience_s is None:
                    patience_s = PATIENCE_S if is_full or self._was_there else NEVER_THERE_S
                if time.monotonic() - max(started_s, self._heard_s) >= patience_s:
                    why = f"nothing was answered for {patience_s:g} s: {error}"
                    raise StoppedError(self._end(why)) from error
                self._wait(f"{error}; asking again, for at most {patience_s:g} s without an answer", wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _ask(self, record: Record, urgency: dict[str, Any]) -> Iterator[Chunk]:
        sampling = {**self._defaults.get("sampling", {}), **record.sampling}
        lookahead = {**self._defaults.get("lookahead", {}), **record.lookahead}
        for chunk in self._backend.stream(record.prompt, sampling, lookahead, **urgency):
            self._heard_s, self._was_there = time.monotonic(), True
            yield chunk

    def _wait(self, why: str, seconds: float) -> None:
        with self._turn:
            if self._stopped is not None:
                return
            self._totals.num_retries += 1
            is_news, self._is_waiting = not self._is_waiting, True
        if is_news:
            self._progress.note(why)
        with self._turn:
            if self._stopped is None:
                self._turn.wait(seconds * random.uniform(0.5, 1.0))

    def _end(self, why: str) -> str:
        """Ask for nothing more. Returns the first reason that was given."""
        with self._turn:
            self._stopped = self._stopped or why
            self._turn.notify_all()
            return self._stopped

    # On the caller's thread

    def _next(self) -> _Item | None:
        while True:
            try:
                item = self._items.get(timeout=TICK_S)
            except queue.Empty:
                self._show()
                continue
            if isinstance(item, Exception):
                raise item
            self._pending = item
            return item

    def _write(self, item: _Item) -> None:
        """Write an item that is done. Raises what asking for it has raised, or OutputError."""
        result = item.future.result()
        is_error = "error" in result
        self._pending = None  # before the write: interrupted there, a line may be lost, but none is written twice
        is_skipped = item.earlier is not None and item.earlier.is_answer
        if item.earlier is not None and is_skipped:
            self._output.write(item.earlier.line, is_new_answer=False)
        else:
            self._output.write(encoded(result), is_new_answer=not is_error)
        self._room.give(item.size)
        totals = self._totals
        totals.num_records += 1
        totals.num_errors += is_error
        totals.num_tokens += result.get("num_new_tokens", 0)
        totals.num_steps += result.get("num_steps", 0)
        if is_error and not totals.first_error:
            totals.first_error = f"{result['id']}: {result['error']}"
        parts = [item.end / self._lines.num_bytes] if self._lines.num_bytes else []
        if self._limit is not None:
            parts.append(totals.num_records / self._limit)
        self._part = min(max(parts), 1.0) if parts else None
        if is_skipped:
            totals.num_skipped += 1
            self._skipped = self._part or 0.0

    def _show(self) -> None:
        totals = self._totals
        counts = counted(totals.num_records, "record")
        for number, name in ((totals.num_errors, "errors"), (totals.num_skipped, "skipped")):
            counts += f", {number} {name}" if number else ""
        self._progress.show(counts, self._part, self._skipped)

    def _write_finished(self) -> None:
        """Write what is finished behind a record that is not: it is still in the order of the input."""
        missing: set[str | int] = set()
        item: _Item | Exception | None = self._pending
        with suppress(queue.Empty):
            while True:
                if isinstance(item, _Item):
                    is_finished = not item.future.cancelled() and item.future.exception() is None
                    if is_finished and item.record_id not in missing:
                        self._write(item)
                    elif item.earlier is not None:
                        self._output.write(item.earlier.line, is_new_answer=False)
                    else:  # of equal ids, a later record's answer would be taken for an earlier one's
                        missing.add(item.record_id)
                item = self._items.get_nowait()
