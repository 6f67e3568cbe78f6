"""Which workers there are, and how they are called to a mesh: the coordinator's crew, and what a worker says to it.

A mesh is formed of the workers that are there, and when one of them goes, or another comes, it is formed anew. They
meet at a store. A worker reports there once it has loaded its shard, and again whenever a mesh of its has ended; then
it waits for a call, which says which mesh to join, and as what. Workers that are not called yet, since a shard of their
replica is missing, simply wait.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from runtime.config import Config
from runtime.errors import WorkerError
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S, JOIN_TIMEOUT_S
from runtime.model.spec import ModelSpec
from runtime.step import next_number

log = logging.getLogger(__name__)

LOOK_S = 0.005
"""Between two looks at who is there, while they are waited for."""
MOST_FAILURES = 3
"""Workers that may end while loading, one after the other, before the mesh is given up where it cannot do without."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""How long after a worker has ended while loading the next one is started, at first and after many."""


@dataclass(frozen=True)
class Place:
    """What a worker is started as."""

    worker: int
    """Its number, which no other is ever given."""
    position: int
    """The place of the mesh that it was started for, replica * tp + shard: with it goes a device."""
    shard: int
    """What it holds, for life."""
    host: str
    port: int
    """Of the store where they meet."""
    own_device: bool = False
    """The pool sees to it that no other worker has its GPU."""


@dataclass(frozen=True)
class Report:
    """A worker is there."""

    applied: int | None
    """Number of the step that its caches are at (StepPlan.number); None: they hold nothing."""
    pages: Sequence[int] | None
    """Of its caches, per group of layers, where sequences share them."""


@dataclass(frozen=True)
class Call:
    """To which mesh a worker is called, and as what."""

    mesh: int
    rank: int
    lp: int
    applied: int
    """Where all caches are emptied, the number of the last step."""
    source: int | None
    """Replica from which `targets` copy their caches; None: all are emptied."""
    targets: Sequence[int] = ()


class WorkerPool(Protocol):
    """How workers get started: as processes of this machine (runtime.workers.pool) or Ray actors
    (cluster.actors.pool)."""

    host: str
    """An address of this machine that the workers can reach."""
    own_devices: bool
    """Whether each worker has a GPU of its own."""

    def open(self, config: Config, spec: ModelSpec) -> None:
        """See that there is room for all lp * tp workers. Raises ConfigError."""

    def start(self, place: Place) -> None:
        """Have a worker run `worker.serve(config, spec, place)`. Does not wait."""

    def failures(self) -> dict[int, str]:
        """The workers that have ended since this was asked last, and why."""

    def end(self, worker: int) -> None:
        """End a worker that does not answer, without asking it. `failures` does not name it."""

    def close(self) -> None:
        """End what is still alive. Idempotent."""


def attend(store: dist.Store, worker: int, number: int, report: Report) -> Call | None:
    """Report for the time of this number, and wait for the call. None: there will be none.

    Raises dist.DistError where the coordinator has gone.
    """
    store.set(_here_key(worker, number), json.dumps(asdict(report)))
    key = _call_key(worker, number)
    while True:
        try:
            store.wait([key], timedelta(seconds=JOIN_TIMEOUT_S))
        except dist.DistStoreError:  # its patience is at an end; that the store has gone is another error
            continue
        call = json.loads(store.get(key))
        return None if call is None else Call(**call)


@dataclass
class _Worker:
    place: Place
    num_calls: int = 0
    report: Report | None = None
    """What it has said since it was called last."""
    in_mesh: bool = False


@dataclass
class Crew:
    """The coordinator's view of its workers."""

    config: Config
    spec: ModelSpec
    pool: WorkerPool
    num_lost: int = 0
    """Workers that have ended, or were ended, since the start."""
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _vacancies: list[tuple[float, int]] = field(default_factory=list)
    """When, time.monotonic(), to start a worker, and for which position."""
    _next_worker: int = 1
    _num_failures: int = 0  # while loading, one after the other
    last_failure: str = "no worker is left"
    _least_pages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.store = dist.TCPStore(
            self.pool.host, 0, is_master=True, timeout=timedelta(seconds=JOIN_TIMEOUT_S), wait_for_workers=False
        )

    @property
    def tp(self) -> int:
        return self.config.parallel.tp

    def hire(self) -> None:
        """Start a worker for every place of the mesh. Does not wait. Raises ConfigError."""
        self.pool.open(self.config, self.spec)
        for position in range(self.config.parallel.num_workers):
            self._start(position)

    def _start(self, position: int) -> None:
        number, shard = self._next_worker, position % self.tp
        self._next_worker += 1
        place = Place(number, position, shard, self.pool.host, self.store.port, self.pool.own_devices)
        self._workers[number] = _Worker(place)
        self.pool.start(place)

    @property
    def is_whole(self) -> bool:
        """Whether every place of the mesh has a worker that takes part."""
        return not self._vacancies and all(worker.in_mesh for worker in self._workers.values())

    def look(self) -> None:
        """Take in who has come and who has gone, and start others for these."""
        for number, cause in self.pool.failures().items():
            if number in self._workers:
                self._lose(number, cause)
        for number, worker in list(self._workers.items()):
            key = _here_key(number, worker.num_calls)
            if worker.report is None and not worker.in_mesh and self.store.check([key]):
                worker.report = Report(**json.loads(self.store.get(key)))
                self._num_failures = 0
                if not self._has_room(worker.report):
                    self._end(number, f"it has room for {worker.report.pages} pages only, of {self._least_pages}")
        now = time.monotonic()
        for vacancy in [one for one in self._vacancies if one[0] <= now]:
            self._vacancies.remove(vacancy)
            self._start(vacancy[1])

    def _lose(self, number: int, cause: str) -> None:
        worker = self._workers.pop(number)
        self.num_lost += 1
        self.last_failure = cause
        pause_s = 0.0
        if worker.num_calls == 0:
            pause_s = min(FIRST_PAUSE_S * 2**self._num_failures, LONGEST_PAUSE_S)
            self._num_failures += 1
        log.warning("worker %d (shard %d) has ended: %s", number, worker.place.shard, cause)
        self._vacancies.append((time.monotonic() + pause_s, worker.place.position))

    def _end(self, number: int, cause: str) -> None:
        self.pool.end(number)
        self._lose(number, cause)

    def _has_room(self, report: Report) -> bool:
        """Whether a worker's caches have the pages that sequences were promised."""
        if self._least_pages is None or report.pages is None:
            return True
        return all(has >= least for has, least in zip(report.pages, self._least_pages, strict=True))

    def muster(self, deadline: float) -> None:
        """The mesh is over: wait until each of its workers is here again or has gone. Who is neither by the deadline,
        time.monotonic(), is ended."""
        for worker in self._workers.values():
            worker.in_mesh = False
        while True:
            self.look()
            absent = [n for n, worker in self._workers.items() if worker.num_calls and worker.report is None]
            if not absent:
                return
            if time.monotonic() > deadline:
                for number in absent:
                    self._end(number, "it did not answer, and was ended")
                return
            time.sleep(LOOK_S)

    def wait_for_replica(self, is_start: bool = False) -> None:
        """Until the workers that are here make a replica, or, at the start, all that there are to be.

        Raises WorkerError where they end while loading."""
        deadline = time.monotonic() + COLLECTIVE_TIMEOUT_S
        while True:
            self.look()
            replicas, _ = self.replicas(0)
            if len(replicas) >= (self.config.parallel.lp if is_start else 1):
                return
            if self._num_failures and (is_start or self._num_failures >= MOST_FAILURES):
                raise WorkerError(f"a worker ended while it was starting: {self.last_failure}")
            if time.monotonic() > deadline:
                raise WorkerError("the workers did not start in time")
            time.sleep(LOOK_S)

    def replicas(self, number: int) -> tuple[list[list[int]], int]:
        """What the workers that are here make, `assemble`d, after the step with this number or the next one."""
        at = number, next_number(number)
        return assemble(
            {
                each: Member(worker.place.shard, worker.report.applied if worker.report.applied in at else None)
                for each, worker in self._workers.items()
                if worker.report is not None
            },
            self.tp,
        )

    def pages(self) -> tuple[int, ...] | None:
        """Of the worker that has fewest, per group of layers; None: not shared. No worker may come that has fewer."""
        counts = [worker.report.pages for worker in self._workers.values() if worker.report is not None]
        known = [count for count in counts if count is not None]
        self._least_pages = tuple(map(min, zip(*known, strict=True))) if known else None
        return self._least_pages

    def call(self, mesh: int, replicas: Sequence[Sequence[int]], num_sound: int, applied: int) -> None:
        """Call these workers to a mesh; `num_sound` of the replicas, the first ones, have their caches."""
        source, targets = (0, list(range(num_sound, len(replicas)))) if num_sound else (None, [])
        call = Call(mesh, 0, len(replicas), applied, source, targets)
        for position, number in enumerate(number for replica in replicas for number in replica):
            self._call(number, replace(call, rank=position + 1))

    def _call(self, number: int, call: Call | None) -> None:
        worker = self._workers[number]
        self.store.set(_call_key(number, worker.num_calls), json.dumps(None if call is None else asdict(call)))
        worker.num_calls += 1
        worker.report, worker.in_mesh = None, call is not None

    def dismiss(self) -> None:
        """Tell those who wait for a call that there will be none."""
        for number, worker in self._workers.items():
            if worker.report is not None:
                self._call(number, None)


@dataclass(frozen=True)
class Member:
    """A worker as `assemble` sees it."""

    shard: int
    applied: int | None


def assemble(members: Mapping[int, Member], tp: int) -> tuple[list[list[int]], int]:
    """Make as many replicas of these workers as can be, each a worker per shard, in shard order.

    Returns them, and how many, the first ones, have caches: those of one replica are all at the same step. Whoever is
    in another one has to be given some.
    """

    def made_of(left: list[int]) -> list[list[int]]:
        by_shard = [[number for number in left if members[number].shard == shard] for shard in range(tp)]
        return [list(replica) for replica in zip(*by_shard, strict=False)]

    steps = sorted({member.applied for member in members.values() if member.applied is not None})
    sound: list[list[int]] = []
    for step in steps:
        sound += made_of([number for number in sorted(members) if members[number].applied == step])
    taken = {number for replica in sound for number in replica}
    others = made_of([number for number in sorted(members) if number not in taken])
    return sound + others, len(sound)


def _here_key(worker: int, number: int) -> str:
    return f"here/{worker}/{number}"


def _call_key(worker: int, number: int) -> str:
    return f"call/{worker}/{number}"
