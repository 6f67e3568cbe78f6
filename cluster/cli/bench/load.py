"""The load itself: requests that come at a rate, or streams of which a number runs at any time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cluster.cli.batch.records import Record
from cluster.cli.bench.figures import Timed
from cluster.cli.bench.targets import AnswerError, Target

OnDone = Callable[[Timed], None]


@dataclass(frozen=True)
class Pace:
    """How requests come: `concurrency` streams, each asking anew when its answer has ended, or else requests by a
    Poisson process of `rate` per second, however many run."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def value(self) -> float:
        return float(self.concurrency or self.rate or 0)

    def __str__(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} stream{'s' * (self.concurrency != 1)}"
        return f"{self.rate:g} requests/s"


async def timed_answer(target: Target, record: Record, due_s: float, timeout_s: float) -> Timed:
    """Ask once. Times count from `due_s`, of time.perf_counter: a client that is late is part of what users wait."""
    timed = Timed()
    counted = 0
    try:
        async with asyncio.timeout(timeout_s), aclosing(target.answer(record)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                now_s = time.perf_counter() - due_s
                if piece.num_tokens != 0:
                    timed.arrivals_s.append(now_s)
                    counted += piece.num_tokens or 1
                if piece.num_tokens != 0 or piece.is_last:
                    timed.ended_s = now_s
                timed.num_prompt_tokens = piece.num_prompt_tokens or timed.num_prompt_tokens
                timed.num_new_tokens = piece.num_new_tokens or timed.num_new_tokens
        timed.num_new_tokens = timed.num_new_tokens or counted  # a server that sends no usage
        if not timed.arrivals_s:
            raise AnswerError("no tokens", "the answer had no tokens")
    except TimeoutError:
        timed.error, timed.message = "timeout", f"no whole answer within {timeout_s:g} s"
    except AnswerError as error:
        timed.error, timed.message = error.kind, str(error)
    if timed.error is not None:
        timed.ended_s = time.perf_counter() - due_s
    return timed


async def run(
    target: Target, records: Sequence[Record], pace: Pace, seed: int, timeout_s: float, on_done: OnDone
) -> tuple[list[Timed], float]:
    """Ask for all records; gives each one's timings, in their order, and the seconds from the first request to the last
    answer's end."""
    timed: list[Timed | None] = [None] * len(records)
    began_s = time.perf_counter()

    async def one(index: int, due_s: float) -> None:
        found = timed[index] = await timed_answer(target, records[index], due_s, timeout_s)
        on_done(found)

    if pace.concurrency is not None:
        indices = iter(range(len(records)))

        async def stream() -> None:
            for index in indices:
                await one(index, time.perf_counter())

        await _all(stream() for _ in range(pace.concurrency))
    else:
        assert pace.rate is not None
        due_s = [began_s + delay_s for delay_s in arrivals(pace.rate, len(records), seed)]

        async def later(index: int) -> None:
            await asyncio.sleep(due_s[index] - time.perf_counter())
            await one(index, due_s[index])

        await _all(later(index) for index in range(len(records)))
    return [each for each in timed if each is not None], time.perf_counter() - began_s


def arrivals(rate: float, number: int, seed: int) -> list[float]:
    """Seconds of a Poisson process's events; the first comes at once."""
    generator = random.Random(seed)
    return list(accumulate((generator.expovariate(rate) for _ in range(number - 1)), initial=0.0))


async def _all(work: Iterator[Any]) -> None:
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)
