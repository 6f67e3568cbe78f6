"""The step cost curve t(T): measured once per machine, model, mesh and dtype, kept on disk, corrected while running."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.config import Config
from runtime.core import SequenceRows
from runtime.disk import cache_root, kept
from runtime.mesh.device import pick_device
from runtime.model import native
from runtime.model.spec import ModelSpec
from runtime.progress import doing, tell
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
GPU_WARM_UPS = 3
"""Steps of a number of rows that come before the first timed one on a GPU: a plain one, one that is recorded as a
graph, and one that replays it."""
STEADY, ATTEMPTS = 0.25, 3
"""A measurement is good where steps usually took at most this much longer than the fastest like them."""
GLANCE, GLANCE_S = (1, 16, 64), 0.3
"""What is timed of a curve that was never measured, so that a start need not wait: these numbers of rows, about so long
in all. The rest is measured when the engine has nothing else to do, or by `outrider plan`."""
ASSUMED_ROW = 0.01
"""What a row is taken to cost, in steps, where that was not measured."""
FORMAT = 7


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
    provisional: bool = False
    """A first look only, to be replaced by a measurement."""

    def table(self, max_rows: int) -> NDArray[np.float64]:
        """t(T) for T = 0 .. max_rows, by the faster way: interpolated, never falling, beyond the last point by the last
        slope or that of the whole, whichever is steeper."""
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
            # Two neighbours that differ by noise alone must not make hundreds of rows free.
            slope = max((seconds[-1] - seconds[start]) / (rows[-1] - rows[start]) for start in (-2, 0))
            if rows[-1] < GLANCE[-1]:  # steps were too slow to see where rows begin to cost
                slope = max(slope, ASSUMED_ROW * seconds[0])
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
        self._share_of: dict[int, NDArray[np.float64]] = {}
        self._max_rows = max_rows
        self._since_refresh = 0
        self.seconds = curve.table(max_rows)
        """t(T) for T = 0 .. max_rows."""
        self.shares = curve.shares(max_rows)
        """Whether such a step's rows are to be divided among the replicas."""

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of decoding took this long, planning and verification included."""
        ratio = seconds / self.seconds[min(num_rows, self._max_rows)]
        surprise = math.log(max(1 / self.OUTLIER, min(ratio, self.OUTLIER)))
        self._correction += self.RATE * surprise * self._share(num_rows)
        self._since_refresh += 1
        if self._since_refresh >= 8:
            self._since_refresh = 0
            self.seconds = self.now().table(self._max_rows)

    def _share(self, num_rows: int) -> NDArray[np.float64]:
        """How much of what a step with so many rows says holds for each number of rows measured."""
        if num_rows not in self._share_of:
            distance = np.abs(np.log(self._points / num_rows))
            self._share_of[num_rows] = self.ELSEWHERE + (1 - self.ELSEWHERE) * np.exp(-((distance / 0.5) ** 2))
        return self._share_of[num_rows]

    def now(self) -> CostCurve:
        """The curve, corrected."""
        factors = np.exp(self._correction)
        seconds, alone = (
            tuple((np.array(measured) * factors).tolist()) if measured else ()
            for measured in (self.curve.seconds, self.curve.alone)
        )
        return replace(self.curve, seconds=seconds, alone=alone)


def assumed(max_rows: int) -> CostCurve:
    """A curve for when none was measured."""
    return CostCurve((1, max_rows + 1), (1.0, 1.0 + max_rows * ASSUMED_ROW))


class Measurement:
    """Times steps of the whole mesh at many numbers of rows, a step at a time, so that it can be left at any moment.

    No sequence may be running, and no conversation be open: slot 0 is written over.
    """

    def __init__(
        self,
        executor: Executor,
        config: Config,
        spec: ModelSpec,
        top_k: int,
        grid: tuple[int, ...] = GRID,
        rounds: int = ROUNDS,
        budget_s: float | None = None,
        longest_s: float = math.inf,
        context: int = CONTEXT,
    ) -> None:
        """`grid`: numbers of rows; `budget_s`: about how long it takes in all (BUDGET_S); `longest_s`: steps that take
        longer are run once, larger ones not at all; `context`: tokens in the cache."""
        self._executor, self._config, self._spec, self._top_k = executor, config, spec, top_k
        self._rounds, self._budget_s, self._longest_s = rounds, budget_s or BUDGET_S, longest_s
        self._grid = [count for count in grid if count <= config.scheduler.max_rows]
        self._ways = [config.parallel.lp, 1] if config.parallel.lp > 1 else [1]
        self._warm_ups = GPU_WARM_UPS if pick_device(config, 0).type == "cuda" else 1
        self._generator = random.Random(0)
        capacity = config.cache.slot_capacity(spec.max_positions)
        self._context = min(context, capacity // 2, config.scheduler.max_rows, config.cache.size or CONTEXT)
        self._seconds: dict[int, list[list[float]]] = {}

    def steps(self) -> Iterator[None]:
        """Run it; a pause after every step."""
        yield from self._fill()
        spent = 0.0
        slow = math.inf  # rows that take too long to be timed again
        for count in sorted(
            self._grid, key=lambda count: (count not in GLANCE, count)
        ):  # the curve's shape comes first
            if count > slow:
                continue
            self._seconds[count] = [[] for _ in self._ways]
            for way in range(len(self._ways)):
                yield from self._time(count, way)
            last = max(times[0] for times in self._seconds[count])
            spent += 2 * sum(times[0] for times in self._seconds[count])
            if last > self._longest_s:
                slow = count
            elif spent * LEAST_ROUNDS > self._budget_s and len(self._seconds) >= 2:
                break
        self._seconds = dict(sorted(self._seconds.items()))
        for number in range(1, self._rounds):
            for count, found in self._seconds.items():
                if max(times[0] for times in found) > self._longest_s:
                    continue
                taken = 2 * sum(sum(times) for times in found)
                if number >= LEAST_ROUNDS and taken > self._budget_s / len(self._seconds):
                    continue
                for way in range(len(self._ways)):
                    yield from self._time(count, way)

    def run(self) -> CostCurve:
        """All of it at once."""
        for _ in self.steps():
            pass
        return self.curve

    @property
    def curve(self) -> CostCurve:
        """What was found."""
        shared, *alone = (
            tuple(median(found[way]) for found in self._seconds.values()) for way in range(len(self._ways))
        )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return CostCurve(tuple(self._seconds), shared, now, alone[0] if alone else ())

    @property
    def spread(self) -> float:
        """By how much steps usually took longer than the fastest like them: little, unless other programs work here."""
        return median(median(times) / min(times) - 1 for found in self._seconds.values() for times in found)

    def _fill(self) -> Iterator[None]:
        """Put some text into the slot."""
        prompt = self._plan(list(range(-1, self._context - 1)), 0, Choose.NOTHING)
        prompt.resets = np.zeros(1, np.int32)
        self._executor.execute(prompt)
        yield
        commit = np.full((self._context, len(Commit)), -1, np.int32)
        commit[:, Commit.ROW] = np.arange(self._context)
        commit[:, Commit.SOURCE] = 0 if self._config.parallel.lp > 1 else -1
        first = self._plan([-1], self._context, Choose.SAMPLE)
        first.commits = commit
        self._executor.execute(first)
        yield

    def _time(self, count: int, way: int) -> Iterator[None]:
        parents = [-1, *((row - 1) // 2 for row in range(1, count))]
        step = self._plan(parents, self._context, Choose.SAMPLE, self._ways[way])
        first = self._warm_ups if not self._seconds[count][way] else 1
        for _ in range(first):  # steps come after others like them: the first makes kernels, and fills caches
            self._executor.execute(step)
        began = time.perf_counter()
        self._executor.execute(step)
        self._seconds[count][way].append(time.perf_counter() - began)
        yield

    def _plan(self, parents: list[int], first: int, choose: Choose, replicas: int = 1) -> StepPlan:
        rows = SequenceRows(first)
        for parent in parents:
            rows.add(self._generator.randrange(self._spec.vocab_size), parent, choose)
        return probe(rows, first + 1, replicas, self._top_k if choose != Choose.NOTHING else 0)


def measure(executor: Executor, config: Config, spec: ModelSpec, top_k: int) -> CostCurve:
    """Measure the curve now, for some BUDGET_S seconds, and keep it. Where timings swing, because other programs work,
    it is tried up to ATTEMPTS times, and the steadiest is taken."""
    found: list[Measurement] = []
    while not found or (found[-1].spread > STEADY and len(found) < ATTEMPTS):
        if found:
            tell(f"timings swing by {found[-1].spread:.0%}: other programs work here; measuring again")
        measurement = Measurement(executor, config, spec, top_k)
        with doing("measuring the cost of a step by its rows"):
            measurement.run()
        found.append(measurement)
    curve = min(found, key=lambda measurement: measurement.spread).curve
    store(config, spec, curve)
    return curve


def known(executor: Executor, config: Config, spec: ModelSpec, top_k: int) -> CostCurve:
    """The curve kept on disk; or else a first look, which takes about GLANCE_S, to begin with."""
    curve = stored(config, spec)
    if curve is not None:
        return curve
    look = Measurement(executor, config, spec, top_k, GLANCE, 2, GLANCE_S, longest_s=GLANCE_S / 3, context=GLANCE[-1])
    curve = replace(look.run(), provisional=True)
    if len(curve.rows) == 1:  # a large model: its rows are assumed to cost what rows do
        ratios = assumed(config.scheduler.max_rows).seconds
        curve = replace(
            curve,
            rows=(1, config.scheduler.max_rows + 1),
            seconds=tuple(curve.seconds[0] * ratio for ratio in ratios),
            alone=tuple(curve.alone[0] * ratio for ratio in ratios) if curve.alone else (),
        )
    if look.spread < STEADY:
        store(config, spec, curve)
    return curve


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
        (config.model.cuda_graphs, config.model.deterministic) if device == "cuda" else (),
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
