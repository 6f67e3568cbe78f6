"""Many prompts from a file: JSON lines in, JSON lines out, in the same order."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.client.backends import Backend
from cluster.wire.answers import Chunk
from runtime.config import SamplingParams
from runtime.errors import ConfigError, InvalidRequestError, OutriderError

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.request import Prompt

PROMPT_KEYS = ("prompt", "messages", "token_ids", "turns")
ID_KEYS = ("id", "question_id", "task_id")
DATASET_KEYS = ("turns", "task_id")
"""Marks of Spec-Bench's and HumanEval's own records, which say more beside the prompt; it is read over."""


@dataclass(frozen=True)
class Record:
    """One line of the input."""

    id: Any
    prompt: Prompt
    """Raw text, chat messages or token ids."""
    sampling: dict[str, Any] = field(default_factory=dict)
    lookahead: dict[str, Any] = field(default_factory=dict)


@dataclass
class Totals:
    """What a batch came to."""

    num_records: int = 0
    num_errors: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "num_records": self.num_records,
            "num_errors": self.num_errors,
            "num_new_tokens": self.num_tokens,
            "tokens_per_step": self.num_tokens / self.num_steps if self.num_steps else 0.0,
            "tokens_per_s": self.num_tokens / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }


def parse(line: str, number: int) -> Record:
    """The record in line `number` (from 1). Raises InvalidRequestError naming the key that is wrong."""
    fields = _mapping(line, number)
    given = [key for key in PROMPT_KEYS if key in fields]
    if len(given) != 1:
        remedy = f"Give one of {', '.join(PROMPT_KEYS)}."
        raise InvalidRequestError("record", given or list(fields), "needs exactly one prompt", remedy)
    known = {*PROMPT_KEYS, *ID_KEYS, *SamplingParams.model_fields, "lookahead"}
    unknown = [key for key in fields if key not in known]
    if unknown and not any(key in fields for key in DATASET_KEYS):
        remedy = f"Known here: {', '.join(sorted(known))}."
        raise InvalidRequestError(unknown[0], fields[unknown[0]], "unknown key", remedy)
    lookahead = fields.get("lookahead", {})
    if not isinstance(lookahead, dict):
        raise InvalidRequestError("lookahead", lookahead, "is not a mapping", 'Write for example {"enabled": false}.')
    sampling = {key: value for key, value in fields.items() if key in SamplingParams.model_fields}
    return Record(record_id(line, number), _prompt(given[0], fields[given[0]]), sampling, lookahead)


def record_id(line: str, number: int) -> Any:
    """The record's own id, else the line number; never fails."""
    try:
        fields = _mapping(line, number)
    except InvalidRequestError:
        return number
    return next((fields[key] for key in ID_KEYS if key in fields), number)


def _mapping(line: str, number: int) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(
            f"line {number}", line, f"is not JSON ({error})", "Write one object a line."
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"line {number}", fields, "is not an object", 'Write for example {"prompt": "..."}.')
    return fields


def _prompt(key: str, value: Any) -> Prompt:
    """Checks the shape; what stands inside is the engine's to judge."""
    if key == "prompt":
        if not isinstance(value, str):
            raise InvalidRequestError(key, value, "is not a text", "Use messages or token_ids for other prompts.")
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(key, value, "is not a list with something in it", "See `outrider batch --help`.")
    if key == "turns":
        if not isinstance(value[0], str):
            raise InvalidRequestError(key, value[0], "is not a text", "The first turn is the user's message.")
        return [{"role": "user", "content": value[0]}]
    kind = dict if key == "messages" else int
    for item in value:
        if not isinstance(item, kind) or isinstance(item, bool):
            expected = "a message" if kind is dict else "a token id"
            raise InvalidRequestError(key, item, f"is not {expected}", "See `outrider batch --help`.")
    return value


def run(
    source: Path,
    target: Path,
    backend: Backend,
    *,
    defaults: Mapping[str, Mapping[str, Any]],
    concurrency: int = 1,
    limit: int | None = None,
    console: Console | None = None,
) -> Totals:
    """Answer every line of `source` into `target`; a line that cannot be answered gets a record with "error".

    `defaults` has the "sampling" and "lookahead" parameters of records that name none of their own. Each output line
    is written whole as soon as those before it are, so an interrupted run leaves complete lines.
    """
    lines = read_lines(source, limit)
    totals = Totals()
    started = time.perf_counter()

    def work(number: int, line: str) -> dict[str, Any]:
        try:
            record = parse(line, number)
            sampling = {**defaults.get("sampling", {}), **record.sampling}
            lookahead = {**defaults.get("lookahead", {}), **record.lookahead}
            return {"id": record.id, **answer(list(backend.stream(record.prompt, sampling, lookahead)))}
        except OutriderError as error:
            return {"id": record_id(line, number), "error": str(error)}

    executor = ThreadPoolExecutor(concurrency, thread_name_prefix="outrider-batch")
    futures = [executor.submit(work, number, line) for number, line in enumerate(lines, 1)]
    try:
        with target.open("w", encoding="utf-8") as out:
            for result in _in_order(futures, console):
                out.write(json.dumps(result, ensure_ascii=False) + "\n")
                out.flush()
                totals.num_records += 1
                totals.num_errors += "error" in result
                totals.num_tokens += result.get("num_new_tokens", 0)
                totals.num_steps += result.get("num_steps", 0)
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        backend.close()  # ends the streams that the threads are waiting for
        raise
    finally:
        executor.shutdown()
    totals.seconds = time.perf_counter() - started
    return totals


def answer(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """A whole stream as the fields of an output record."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.usage is not None
    usage = last.usage
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
        "finish_reason": last.finish_reason.value,
        "num_prompt_tokens": usage.num_prompt_tokens,
        "num_new_tokens": usage.num_new_tokens,
        "num_steps": usage.num_steps,
        "tokens_per_step": usage.tokens_per_step,
        "rows_per_step": usage.rows_per_step,
        "ttft_s": usage.ttft_s,
        "latency_s": usage.latency_s,
        "num_seen_tokens": usage.num_seen_tokens,
        "kept_last": usage.kept_last,
        "kept_sum": usage.kept_sum,
    }


def read_lines(source: Path, limit: int | None) -> list[str]:
    """The first `limit` lines; empty lines at the end are none. Raises ConfigError if the file cannot be read."""
    try:
        # Not splitlines(), which also splits at characters that JSON texts may hold unescaped.
        lines = source.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError("IN", str(source), problem, "Name a readable file of UTF-8 JSON lines.") from error
    return lines[:limit] if lines != [""] else []


def _in_order(futures: list[Future[dict[str, Any]]], console: Console | None) -> Iterator[dict[str, Any]]:
    """Results in the order of the lines, with a progress bar that counts what is done in any order."""
    if console is None or not console.is_terminal:
        yield from (future.result() for future in futures)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("requests", total=len(futures))
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        yield from (future.result() for future in futures)
