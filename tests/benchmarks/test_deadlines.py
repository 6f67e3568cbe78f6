"""The simulation of deadlines: refusing early meets at least as many as earliest deadline first, and more than first
come, first served."""

from __future__ import annotations

import math

import pytest

from benchmarks import deadlines


@pytest.mark.parametrize("load", deadlines.LOADS)
@pytest.mark.parametrize("num_slots", [1, 4])
def test_as_many_are_met_as_earliest_deadline_first_can_meet(load: float, num_slots: int) -> None:
    met = dict.fromkeys(deadlines.POLICIES, 0)
    num_possible = 0
    for seed in range(5):
        jobs = deadlines.some_jobs(80, load, num_slots, seed)
        num_possible += sum(deadlines.least_s(job) <= (job.deadline_s or math.inf) for job in jobs)
        for name, policy in deadlines.POLICIES.items():
            met[name] += deadlines.num_met(jobs, num_slots, policy)
    assert num_possible >= met["Outrider"] >= met["earliest deadline"]
    assert met["Outrider"] > met["first come"]
