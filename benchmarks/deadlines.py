"""How many answers are in time: by deadline with early refusal, as the scheduler does it, beside earliest deadline
first alone and first come, first served. A simulation, whose decisions are the scheduler's own code.

    python -m benchmarks.deadlines --jobs 400 --seeds 10

Jobs come at random; each takes one of the slots for as long as its tokens take at a constant pace. Some ask for what
cannot be met at all; of the others, the share that is whole in time counts. A job that runs is not interrupted.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.common import print_json, print_table
from runtime.config import LookaheadConfig, SamplingParams
from runtime.engine import deadlines
from runtime.engine.deadlines import Pace
from runtime.request import Request

LOADS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
IMPOSSIBLE = 0.05
"""Share of jobs whose deadline is before they could be whole."""
TOKEN_S, ROW_S = 0.02, 0.0005


@dataclass(frozen=True)
class Policy:
    """Which waiting job is begun next, and whether those are refused that cannot make it any more."""

    order: Callable[[Request], tuple[float, ...]]
    refuses: bool


POLICIES = {
    "first come": Policy(lambda request: (request.arrival_s,), refuses=False),
    "earliest deadline": Policy(lambda request: (deadlines.due_s(request),), refuses=False),
    "Outrider": Policy(deadlines.order, refuses=True),
}


def pace() -> Pace:
    """One that has been seen for long."""
    known = Pace()
    known.token_s, known.row_s = TOKEN_S, ROW_S
    return known


def some_jobs(count: int, load: float, num_slots: int, seed: int) -> list[Request]:
    """So many that they take `load` of the slots' time."""
    draw, known = random.Random(seed), pace()
    sizes = [(round(draw.lognormvariate(5, 0.8)) + 1, round(draw.lognormvariate(4, 0.8)) + 1) for _ in range(count)]
    mean_s = sum(known.at_best_s(*size) for size in sizes) / count
    now_s, jobs = 0.0, []
    for number, (num_prompt, num_new) in enumerate(sizes):
        now_s += draw.expovariate(load * num_slots / mean_s)
        least_s = known.at_best_s(num_prompt, num_new)
        slack = draw.uniform(0.3, 0.95) if draw.random() < IMPOSSIBLE else draw.uniform(1.2, 8.0)
        sampling = SamplingParams(max_new_tokens=num_new)
        deadline_s = least_s * slack
        jobs.append(
            Request(str(number), (0,) * num_prompt, sampling, LookaheadConfig(), deadline_s=deadline_s, arrival_s=now_s)
        )
    return jobs


def least_s(job: Request) -> float:
    """Seconds that it takes."""
    return pace().at_best_s(len(job.prompt_ids), job.sampling.max_new_tokens)


def num_met(jobs: list[Request], num_slots: int, policy: Policy) -> int:
    """How many are whole in time."""
    known, free, waiting, met = pace(), [0.0] * num_slots, list[Request](), 0
    coming = sorted(jobs, key=lambda job: job.arrival_s)
    while coming or waiting:
        now_s = heapq.heappop(free)
        if not waiting and coming:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            waiting.append(coming.pop(0))
        if policy.refuses:
            waiting = [job for job in waiting if known.refusal(job, now_s) is None]
        if not waiting:
            heapq.heappush(free, now_s)
            continue
        job = min(waiting, key=policy.order)
        waiting.remove(job)
        ended_s = now_s + least_s(job)
        met += ended_s <= deadlines.due_s(job) + 1e-9
        heapq.heappush(free, ended_s)
    return met


def main(
    jobs: Annotated[int, typer.Option(min=1, help="Jobs of a run.")] = 400,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each load.")] = 10,
    slots: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 4,
) -> None:
    """Share of the jobs that can be met which are, by load and policy."""
    rows, results = [], []
    for load in LOADS:
        met, num_possible = dict.fromkeys(POLICIES, 0), 0
        for seed in range(seeds):
            asked = some_jobs(jobs, load, slots, seed)
            num_possible += sum(least_s(job) <= (job.deadline_s or math.inf) for job in asked)
            for name, policy in POLICIES.items():
                met[name] += num_met(asked, slots, policy)
        rows.append([f"{load:.1f}", *(f"{count / num_possible:.1%}" for count in met.values())])
        results.append({"load": load, "num_possible": num_possible, "num_met": met})
    print_table("Answers in time, of those that can be", ["load", *POLICIES], rows)
    print_json({"benchmark": "deadlines", "jobs": jobs, "seeds": seeds, "slots": slots, "results": results})


if __name__ == "__main__":
    typer.run(main)
