"""The coordinator's end of a mesh: a plan goes out, every replica's result comes back, and a fault costs time only.

Where a rank goes in the middle of a step, the others form a mesh without it, and the step is done again. What it takes
is at hand: accepted tokens enter the caches of all replicas in the next step, so each is just behind the step that
failed, or just behind the one before. Those behind get the last accepted rows once more (`replay`), then all run the
plan, which every rank's numbering of steps keeps from counting twice. The same way a rank that has come joins between
two steps: it copies the caches of another replica.
"""

from __future__ import annotations

import logging
import os
import time

import numpy as np

from runtime import core
from runtime.config import Config
from runtime.errors import CachesLostError, PeerError, WorkerError
from runtime.mesh import mesh
from runtime.mesh.control import Control
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S
from runtime.model.spec import ModelSpec
from runtime.step import StepPlan, StepResult, WireLayout, next_number
from runtime.workers.replay import accepted_again, commits_of_all, run_by_all
from runtime.workers.roster import Crew, WorkerPool
from runtime.workers.worker import wire_layout

log = logging.getLogger(__name__)

LONGEST_S = 60.0
"""How long a step of no known cost may go on in some ranks of a mesh that has broken."""
GRACE_S = 2.0
"""How long after a step should have ended its ranks may take to say that they are there, before they are given up."""
LOOK_AGAIN_S = 0.25
"""Between two looks, from step to step, whether a rank that is awaited has come."""
MOST_BREAKS = 3
"""How often a step may be broken off before it is given up, as if all caches had been lost: it may be the cause."""


class MeshExecutor:
    """Ranks as processes of their own, started by `pool`."""

    def __init__(self, config: Config, spec: ModelSpec, pool: WorkerPool) -> None:
        self._pool = pool
        self._layout: WireLayout = wire_layout(config)
        self._control: Control | None = None
        self._process = os.getpid()
        self._closed = False
        self._mesh = 0
        self._number = 0
        self._previous: StepPlan | None = None
        """The last step that was done."""
        self._is_new = False
        """The mesh has been formed anew, and has done no step: what its ranks have staged is of no use."""
        self._looked = 0.0
        self.num_replicas = config.parallel.lp
        try:
            self._crew = Crew(config, spec, pool)
            self._crew.hire()
            self._crew.wait_for_replica(is_start=True)
            self.num_pages = self._crew.pages()
            self._form()
            self._is_new = False
            self.execute(StepPlan.empty())
        except BaseException:
            self.close()
            raise

    @property
    def num_lost(self) -> int:
        """Workers that have been lost since the start."""
        return self._crew.num_lost

    @property
    def is_whole(self) -> bool:
        """Whether every place of the mesh has a worker that takes part."""
        return self._crew.is_whole

    def execute(self, plan: StepPlan, patience_s: float | None = None) -> StepResult:
        if os.getpid() != self._process or self._closed:
            raise WorkerError("the workers have been ended, or belong to the process that this one was forked from")
        if plan.num_rows:
            plan.number = next_number(self._number)
        commits = plan.commits
        patience_s = COLLECTIVE_TIMEOUT_S if patience_s is None else patience_s
        started = time.monotonic()
        breaks = 0
        while True:
            try:
                if self._control is None or self._has_come():
                    self._form_anew(started + min(patience_s, LONGEST_S) + GRACE_S, with_caches=breaks < MOST_BREAKS)
                    started = time.monotonic()
                at_most_s = patience_s * 2**breaks  # what was no more than slow gets its time
                if self._is_new and plan.num_rows:
                    self._catch_up(plan, commits, at_most_s)
                result = self._run(plan, at_most_s)
            except PeerError as error:
                log.warning("a step was broken off: %s", error)
                self._leave()
                breaks += 1
                if breaks > 2 * MOST_BREAKS:
                    raise WorkerError(f"a step failed {breaks} times: {self._crew.last_failure}") from error
                continue
            if plan.num_rows:
                self._number, self._previous, self._is_new = plan.number, plan, False
            return result

    def _run(self, plan: StepPlan, patience_s: float) -> StepResult:
        assert self._control is not None
        started = time.perf_counter()
        self._layout.encode(plan, self._control.outgoing())
        self._control.send()
        sent = time.perf_counter()
        if plan.stop:
            return StepResult.of(plan, np.empty((0, plan.result_width), np.int32), {})
        results = self._control.collect(self._layout.result_words(plan, self.num_replicas), patience_s)
        received = time.perf_counter()
        forward = max(int(result[0]) for result in results) * 1e-6
        seconds = {"broadcast": sent - started, "forward": forward, "gather": max(received - sent - forward, 0.0)}
        found = [result[self._layout.RESULT_HEADER :] for result in results]
        chosen = core.merge(plan.rows, found, plan.result_width)
        return StepResult.of(plan, chosen, seconds)

    # Where ranks have gone, or come

    def _has_come(self) -> bool:
        """Whether there are ranks for one more replica. Looked at now and then."""
        if self._crew.is_whole or time.monotonic() < self._looked + LOOK_AGAIN_S:
            return False
        self._looked = time.monotonic()
        self._crew.look()
        return bool(self._crew.replicas(self._number)[0])

    def _leave(self) -> None:
        """Break the mesh: its ranks notice, and report."""
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def _form_anew(self, deadline: float, with_caches: bool = True) -> None:
        """A mesh of all who are there by then, time.monotonic().

        Raises CachesLostError where none of them has caches, or they are not wanted."""
        self._leave()
        self._crew.muster(deadline)
        if not self._crew.replicas(self._number)[0]:
            log.warning("no replica is whole; waiting for new workers")
        self._crew.wait_for_replica()
        if not self._form(with_caches):
            self._previous, self._is_new = None, False
            raise CachesLostError("the workers that had the caches have gone, and others have taken their place")

    def _form(self, with_caches: bool = True) -> bool:
        """Returns whether the caches are those of the last step."""
        replicas, num_sound = self._crew.replicas(self._number)
        if not with_caches:
            num_sound = 0
        self._mesh += 1
        self._crew.call(self._mesh, replicas, num_sound, self._number)
        self.num_replicas, self._is_new = len(replicas), True
        store, host = self._crew.store, self._pool.host
        self._control = mesh.join(0, len(replicas), self._crew.tp, host, store, f"mesh/{self._mesh}", self._layout)
        if self._mesh > 1:
            log.warning(
                "mesh %d: lp=%d tp=%d, %d new", self._mesh, len(replicas), self._crew.tp, len(replicas) - num_sound
            )
        return num_sound > 0

    def _catch_up(self, plan: StepPlan, commits: np.ndarray, patience_s: float) -> None:
        """Bring ranks that are behind to where `plan` begins, and have every replica run all of that."""
        run_by_all(plan.rows, self.num_replicas)
        if len(commits):
            assert self._previous is not None, "commits of no step"
            self._run(accepted_again(self._previous, commits, self.num_replicas), patience_s)
            plan.commits = commits_of_all(len(commits))

    def close(self) -> None:
        if self._closed or os.getpid() != self._process:  # a forked process has its parent's connections, too
            return
        self._closed = True
        try:
            if self._control is not None:
                self._run(StepPlan.empty(stop=True), COLLECTIVE_TIMEOUT_S)
            self._crew.dismiss()
        except (WorkerError, AttributeError):
            pass  # they are gone already, or never came
        finally:
            self._pool.close()
            self._leave()
