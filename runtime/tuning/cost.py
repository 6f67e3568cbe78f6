"""The step cost curve t(T): measured once per machine, model, mesh and dtype, kept on disk, corrected while running."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.config import Config
from runtime.disk import cache_root, kept
from runtime.lookahead.core import SequenceRows
from runtime.mesh.device import pick_device
from runtime.model import native
from runtime.model.spec import ModelSpec
from runtime.step import Choose, Commit, StepPlan
from runtime.tuning.probe import probe

if TYPE_CHECKING:
    from runtime.workers.executor import Executor

GRID = (1, 2, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Numbers of rows measured; in between, the curve is a straight line. It jumps where one more row takes another tile of
a matrix unit; tiles have 16, 32, 64 or 128 rows."""
CONTEXT = 512
"""Tokens in the cache while it is measured, where a slot has room for them."""
BUDGET_S = 6.0
"""A measurement takes about this long: larger steps than fit in are left out, and their cost is extrapolated."""
LEAST_ROUNDS, ROUNDS = 3, 20
"""Each number of rows is timed as often as its share of the time allows, but at least and at most so many times, in
rounds over all of them: hiccups hit single rounds. The planner decides by a few percent between small steps."""
CHECKED, TOLERATED = (1, 16, 64), 1.4
"""A stored curve is held against steps of so many rows; if their costs, relative to each other, are off by more than
this factor, it is measured again."""
FORMAT = 5


@dataclass(frozen=True)
class CostCurve:
    """Seconds per step at some numbers of rows, ascending."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    measured_at: str = ""
    """Local time, for people."""
    alone: tuple[float, ...] = ()
    """The same with all rows on one replica, where there are several: the others wait. Where replicas share a memory,
    a small step is faster so."""

    def table(self, max_rows: int) -> NDArray[np.float64]:
        """t(T) for T = 0 .. max_rows, by the faster way: interpolated, never falling, beyond the last point by the last
        slope."""
        shared = self._table(self.seconds, max_rows)
        return np.minimum(shared, self._table(self.alone, max_rows)) if self.alone else shared

    def shares(self, max_rows: int) -> NDArray[np.bool_]:
        """For T = 0 .. max_rows, whether a step is faster with its rows divided among the replicas."""
        shared = self._table(self.seconds, max_rows)
        return shared < self._table(self.alone, max_rows) if self.alone else np.ones(max_rows + 1, np.bool_)

    def _table(self, measured: tuple[float, ...], max_rows: int) -> NDArray[np.float64]:
        """A step with fewer rows costs no more than one with more: where it was measured so, that was noise."""
        rows, seconds = np.array(self.rows, float), np.minimum.accumulate(measured[::-1])[::-1]
        table = np.interp(np.arange(max_rows + 1), rows, seconds)
        if max_rows > rows[-1] and len(rows) > 1:
            slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])
            beyond = np.arange(int(rows[-1]) + 1, max_rows + 1)
            table[beyond] = seconds[-1] + slope * (beyond - rows[-1])
        return table


class RunningCost:
    """The curve as the planner uses it, drawn towards what the running steps take."""

    RATE = 0.05
    """Weight of one step in the correction at its own number of rows."""
    ELSEWHERE = 0.9
    """How much of a correction holds for other numbers of rows, too: machines slow down as a whole, and a step also
    takes longer the more tokens are cached, which is not the doing of its number of rows."""
    OUTLIER = 3.0
    """Steps that take this many times what was expected, or less than its inverse, say little: a machine's hiccup."""

    def __init__(self, curve: CostCurve, max_rows: int) -> None:
        self.curve = curve
        self._points = np.array(curve.rows, float)
        self._correction = np.zeros(len(curve.rows))  # logarithms of factors
        self._max_rows = max_rows
        self._since_refresh = 0
        self.seconds = curve.table(max_rows)
        """t(T) for T = 0 .. max_rows."""
        self.shares = curve.shares(max_rows)
        """Whether such a step's rows are to be divided among the replicas."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of decoding took this long, planning and verification included."""
        surprise = np.log(seconds / self.seconds[min(num_rows, self._max_rows)])
        surprise = float(np.clip(surprise, -np.log(self.OUTLIER), np.log(self.OUTLIER)))
        distance = np.abs(np.log(self._points / num_rows))
        share = self.ELSEWHERE + (1 - self.ELSEWHERE) * np.exp(-((distance / 0.5) ** 2))
        self._correction += self.RATE * surprise * share
        self._since_refresh += 1
        if self._since_refresh >= 8:
            self._since_refresh = 0
            self.seconds = self.now().table(self._max_rows)

    def now(self) -> CostCurve:
        """The curve, corrected."""
        factors = np.exp(self._correction)
        seconds, alone = (
            tuple((np.array(measured) * factors).tolist()) if measured else ()
            for measured in (self.curve.seconds, self.curve.alone)
        )
        return replace(self.curve, seconds=seconds, alone=alone)


def assumed(max_rows: int) -> CostCurve:
    """A curve for when none was measured: on it a row costs a hundredth of a step."""
    return CostCurve((1, max_rows + 1), (1.0, 1.0 + max_rows / 100))


def measure(
    executor: Executor, config: Config, spec: ModelSpec, top_k: int, grid: tuple[int, ...] = GRID, rounds: int = ROUNDS
) -> CostCurve:
    """Time steps of the whole mesh, for some BUDGET_S seconds. No sequence may be running: slot 0 is written over."""
    generator = random.Random(0)
    capacity = config.cache.slot_capacity(spec.max_positions)
    max_rows = config.scheduler.max_rows

    def plan(parents: list[int], first: int, choose: Choose, replicas: int = 1) -> StepPlan:
        rows = SequenceRows(first)
        for parent in parents:
            rows.add(generator.randrange(spec.vocab_size), parent, choose)
        return probe(rows, first + 1, replicas, top_k if choose != Choose.NOTHING else 0)

    context = min(CONTEXT, capacity // 2, max_rows, config.cache.size or CONTEXT)
    prompt = plan(list(range(-1, context - 1)), 0, Choose.NOTHING)
    prompt.resets = np.zeros(1, np.int32)
    executor.execute(prompt)
    commit = np.full((context, len(Commit)), -1, np.int32)
    commit[:, Commit.ROW] = np.arange(context)
    commit[:, Commit.SOURCE] = 0 if config.parallel.lp > 1 else -1
    first = plan([-1], context, Choose.SAMPLE)
    first.commits = commit
    executor.execute(first)

    def timed(count: int, replicas: int) -> float:
        step = plan([-1, *((row - 1) // 2 for row in range(1, count))], context, Choose.SAMPLE, replicas)
        executor.execute(step)  # steps come after others like them: the first makes kernels, and fills caches
        began = time.perf_counter()
        executor.execute(step)
        return time.perf_counter() - began

    ways = [config.parallel.lp, 1] if config.parallel.lp > 1 else [1]
    seconds: dict[int, list[list[float]]] = {}
    spent = 0.0
    for count in (count for count in grid if count <= max_rows):
        seconds[count] = [[timed(count, replicas)] for replicas in ways]
        spent += 2 * sum(times[0] for times in seconds[count])
        if spent * LEAST_ROUNDS > BUDGET_S and len(seconds) >= 2:
            break
    for number in range(1, rounds):
        for count, found in seconds.items():
            taken = 2 * sum(sum(times) for times in found)
            if number >= LEAST_ROUNDS and taken > BUDGET_S / len(seconds):
                continue
            for replicas, times in zip(ways, found, strict=True):
                times.append(timed(count, replicas))
    shared, *alone = (tuple(median(found[way]) for found in seconds.values()) for way in range(len(ways)))
    return CostCurve(tuple(seconds), shared, time.strftime("%Y-%m-%d %H:%M:%S"), *alone)


def stored(config: Config, spec: ModelSpec) -> CostCurve | None:
    """The curve kept for this machine, model, mesh and dtype, if there is one."""
    try:
        record = json.loads(_place(config, spec).read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return CostCurve(**fields)
    except (OSError, ValueError, TypeError):
        return None


def store(config: Config, spec: ModelSpec, curve: CostCurve) -> Path:
    """Keep the curve, if that is possible; returns where."""
    place = _place(config, spec)
    with kept(place) as scratch:
        scratch.write_text(json.dumps(asdict(curve)))
    return place


def measured(
    executor: Executor, config: Config, spec: ModelSpec, top_k: int, say: Callable[[str], object]
) -> CostCurve:
    """The stored curve, if steps still cost about that; or else one measured now and kept."""
    curve = stored(config, spec)
    if curve is None or all(  # twice: one look may meet another program's work
        _has_drifted(curve, measure(executor, config, spec, top_k, CHECKED, rounds=3)) for _ in range(2)
    ):
        say(f"measuring the cost of a step by its rows ({'once' if curve is None else 'it has changed'}; seconds) ...")
        curve = measure(executor, config, spec, top_k)
        store(config, spec, curve)
    return curve


def _has_drifted(curve: CostCurve, check: CostCurve) -> bool:
    """Whether the costs of steps, relative to each other, are not those of the curve any more."""
    expected = curve.table(max(check.rows))[list(check.rows)]
    ratios = check.table(max(check.rows))[list(check.rows)] / expected
    return bool(ratios.max() / ratios.min() > TOLERATED)


def _place(config: Config, spec: ModelSpec) -> Path:
    device = pick_device(config, 0).type
    key = (
        FORMAT,
        _machine(),
        config.model.path,
        asdict(spec).__repr__(),
        config.model.dtype,
        config.model.kernels,
        native.available()[1] if device == "cpu" and config.model.kernels != "torch" else "",
        device,
        (config.parallel.lp, config.parallel.tp, config.parallel.threads),
        config.scheduler.max_rows,
        config.cache.model_dump(),
    )
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cost_folder() / f"{name}.json"


def cost_folder() -> Path:
    """Where curves are kept."""
    return cache_root() / "cost"


def _machine() -> tuple[str, ...]:
    """What a step's cost depends on here."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
        flags = next((line for line in lines if line.startswith("flags")), "")
        processor += hashlib.sha256(flags.encode()).hexdigest()[:8]
    except OSError:
        pass
    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return (processor, str(os.cpu_count()), str(torch.get_num_threads()), torch.__version__, *devices)
