"""`outrider bench`: load on a server, and what its users would see of it.

`asking` says what is asked, `targets` whom, `load` when; `figures` sums up what came, `report` shows it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from cluster.cli.batch.progress import make_progress
from cluster.cli.batch.records import Record
from cluster.cli.bench import asking, load, report
from cluster.cli.bench.figures import Figures, Timed, read_goals, summed
from cluster.cli.bench.load import Pace
from cluster.cli.bench.targets import Target, make_target
from runtime.errors import ConfigError, InvalidRequestError, WorkerError

__all__ = ["Figures", "Job", "read_paces", "report", "run"]

PER_STREAM, LEAST_REQUESTS = 4, 16
"""Requests of a load where their number is not given: so many for each stream, but at least so many in all."""


@dataclass(frozen=True)
class Job:
    """What is asked of a load test, as its options say."""

    url: str
    source: Path | None
    paces: Sequence[Pace]
    sampling: dict[str, Any]
    lookahead: dict[str, Any]
    num_requests: int | None = None
    prompt_tokens: str = "128"
    chat: bool = False
    seed: int = 0
    goals: str | None = None
    timeout_s: float = 600.0
    num_warm_up: int = 1
    model: str | None = None


def read_paces(concurrency: str | None, rates: str | None) -> list[Pace]:
    """The loads of a sweep, in their order. Raises ConfigError."""
    if concurrency is not None and rates is not None:
        problem, remedy = "cannot go with --concurrency", "Give one of them."
        raise ConfigError("--request-rate", rates, problem, remedy)
    paces: list[Pace] = []
    option, text = ("--request-rate", rates) if rates is not None else ("--concurrency", concurrency or "1")
    for part in text.split(","):
        try:
            paces.append(Pace(rate=float(part)) if rates is not None else Pace(concurrency=int(part)))
            if not 0 < paces[-1].value <= 10_000:
                raise ValueError
        except ValueError:
            problem = "is no number above 0 and up to 10000"
            raise ConfigError(option, part, problem, "Give one, or some with commas between them.") from None
    return paces


def run(job: Job) -> list[Figures]:
    """Put each load on the server, one after the other. Raises ConfigError and InvalidRequestError for what cannot be
    asked, WorkerError if the server does not answer a first request."""
    goals = read_goals(job.goals)
    lengths = asking.read_lengths(job.prompt_tokens)
    records = asking.from_file(job.source) if job.source is not None else None
    return asyncio.run(_run(job, records, lengths, goals))


async def _run(
    job: Job, given: list[Record] | None, lengths: tuple[int, int], goals: dict[str, float]
) -> list[Figures]:
    target = make_target(job.url, job.model)
    try:
        asked: Iterator[Record]
        if given is not None:
            asked = cycle(given)
        else:
            asked = await asking.made_up(lengths, job.chat, job.seed, lambda record: _count(target, job, record))
        records = (_with(job, record) for record in asked)
        for record in islice(records, job.num_warm_up):
            await _first(target, job, record)
        found = []
        for pace in job.paces:
            number = job.num_requests or (len(given) if given is not None else 0)
            number = number or max(LEAST_REQUESTS, PER_STREAM * (pace.concurrency or 1))
            found.append(await _load(target, job, pace, list(islice(records, number)), goals))
        return found
    finally:
        await target.close()


async def _load(target: Target, job: Job, pace: Pace, records: list[Record], goals: dict[str, float]) -> Figures:
    num_done = 0
    with make_progress() as progress:

        def on_done(_: Timed) -> None:
            nonlocal num_done
            num_done += 1
            progress.show(f"{pace}: {num_done} of {len(records)}", num_done / len(records), 0.0)

        timed, seconds = await load.run(target, records, pace, job.seed, job.timeout_s, on_done)
    return summed(str(pace), pace.value, seconds, timed, goals)


def _with(job: Job, record: Record) -> Record:
    """A record's own parameters come before the job's. Raises InvalidRequestError."""
    made = replace(record, sampling=job.sampling | record.sampling, lookahead=job.lookahead | record.lookahead)
    if made.sampling.get("n", 1) != 1:
        problem, remedy = "is more than one answer", "A load test times one for each request; ask for more requests."
        raise InvalidRequestError("sampling.n", made.sampling["n"], problem, remedy)
    return made


async def _count(target: Target, job: Job, record: Record) -> int:
    """Tokens of a prompt, by the server's own count."""
    timed = await _first(target, job, replace(record, sampling={"max_new_tokens": 1}))
    if not timed.num_prompt_tokens:
        problem = "the server does not count a prompt's tokens"
        raise ConfigError("--prompt-tokens", job.prompt_tokens, problem, "Give a file of prompts instead.")
    return timed.num_prompt_tokens


async def _first(target: Target, job: Job, record: Record) -> Timed:
    """A request that is not part of the load. Raises WorkerError where it has no answer: nor would any other."""
    timed = await load.timed_answer(target, record, time.perf_counter(), job.timeout_s)
    if timed.error is not None:
        raise WorkerError(f"{job.url} does not answer ({timed.error}): {timed.message}")
    return timed
