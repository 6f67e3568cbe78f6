"""How the engine reaches its workers: in this process, or over the control group. One call per step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from runtime import core
from runtime.config import Config
from runtime.errors import WorkerError
from runtime.mesh import mesh
from runtime.mesh.control import Control
from runtime.mesh.device import pick_device
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S
from runtime.model.spec import ModelSpec
from runtime.step import StepPlan, StepResult, WireLayout
from runtime.workers.worker import DecoderMaker, Worker, alive_key, pages_key, wire_layout

LAST_WORDS_S = 1.0
"""How long a worker whose connections have ended may take to say why."""


class Executor(Protocol):
    @property
    def num_pages(self) -> tuple[int, ...] | None:
        """Pages of the workers' caches, per group of layers, on the worker that has fewest; None: not shared."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step on every replica. Raises WorkerError if that fails."""

    def close(self) -> None:
        """End the workers. Idempotent."""


class WorkerPool(Protocol):
    """How worker ranks get started: local processes (runtime.workers.pool) or Ray actors (cluster.actors.pool)."""

    host: str
    """An address of this machine that the workers can reach."""

    def start(self, config: Config, spec: ModelSpec, host: str, port: int) -> None:
        """Start all lp*tp ranks; rank i (from 1) runs worker.serve(config, spec, i, host, port). Does not wait."""

    def failure(self) -> str | None:
        """Why a worker has ended, if one did."""

    def close(self) -> None:
        """End what is still alive. Idempotent."""


class LocalExecutor:
    """The only rank of a 1x1 mesh, in this process."""

    def __init__(self, config: Config, spec: ModelSpec, make_decoder: DecoderMaker | None = None) -> None:
        """`make_decoder`: what it computes with, if not the model."""
        if config.parallel.threads is not None:
            torch.set_num_threads(config.parallel.threads)
        self._worker = Worker(config, spec, mesh.Mesh(device=pick_device(config, 0)), make_decoder)
        self.num_pages = self._worker.num_pages

    def execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        chosen = self._worker.step(plan)
        seconds = {"broadcast": 0.0, "forward": time.perf_counter() - started, "gather": 0.0}
        return StepResult.of(plan, chosen, seconds)

    def close(self) -> None:
        pass


class MeshExecutor:
    """The coordinator's end of the control plane: a plan goes out, and every replica's result comes back."""

    def __init__(self, config: Config, spec: ModelSpec, pool: WorkerPool) -> None:
        self._config, self._pool = config, pool
        self._layout: WireLayout = wire_layout(config)
        self._control: Control | None = None
        self._process = os.getpid()
        self._closed = False
        self.num_pages: tuple[int, ...] | None = None
        try:
            self._control = self._form_mesh(spec)
            self.execute(StepPlan.empty())  # the first step returns when every replica is loaded
            self.num_pages = self._fewest_pages()
        except BaseException:
            self.close()
            raise

    def _form_mesh(self, spec: ModelSpec) -> Control:
        """Start the workers, wait until each has reached the store, then build the groups."""
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        parallel = self._config.parallel
        # Kept: NCCL's ranks meet there when they first have something to send each other.
        store = self._store = dist.TCPStore(self._pool.host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        self._pool.start(self._config, spec, self._pool.host, store.port)
        self._wait_for(alive_key)
        control, _ = mesh.join(0, parallel.lp, parallel.tp, torch.device("cpu"), store, self._layout)
        return control

    def _wait_for(self, key_of: Callable[[int], str]) -> None:
        """Until every worker has set its key in the store."""
        num_workers = self._config.parallel.num_workers
        waiting = [key_of(rank) for rank in range(1, 1 + num_workers)]
        deadline = time.monotonic() + COLLECTIVE_TIMEOUT_S
        while waiting := [key for key in waiting if not self._store.check([key])]:
            if failure := self._pool.failure():
                raise WorkerError(f"a worker ended while it was starting: {failure}")
            if time.monotonic() > deadline:
                raise WorkerError(f"{len(waiting)} of {num_workers} workers did not start in time")
            time.sleep(0.02)

    def _fewest_pages(self) -> tuple[int, ...] | None:
        self._wait_for(pages_key)
        ranks = range(1, 1 + self._config.parallel.num_workers)
        counts = [json.loads(self._store.get(pages_key(rank))) for rank in ranks]
        return None if None in counts else tuple(map(min, zip(*counts, strict=True)))

    def execute(self, plan: StepPlan) -> StepResult:
        if self._control is None or os.getpid() != self._process:
            raise WorkerError("the workers have been ended, or belong to the process that this one was forked from")
        started = time.perf_counter()
        try:
            self._layout.encode(plan, self._control.outgoing())
            self._control.send()
            sent = time.perf_counter()
            if plan.stop:
                return StepResult.of(plan, np.empty((0, plan.result_width), np.int32), {})
            results = self._control.collect(self._layout.result_words(plan, self._config.parallel.lp))
        except (RuntimeError, WorkerError) as error:
            raise WorkerError(f"a step failed: {self._why() or error}") from error
        received = time.perf_counter()
        forward = max(int(result[0]) for result in results) * 1e-6
        seconds = {"broadcast": sent - started, "forward": forward, "gather": max(received - sent - forward, 0.0)}
        found = [result[self._layout.RESULT_HEADER :] for result in results]
        chosen = core.merge(plan.rows, found, plan.result_width)
        return StepResult.of(plan, chosen, seconds)

    def _why(self) -> str | None:
        """Why a worker has ended. Its connections end a moment before it does."""
        deadline = time.monotonic() + LAST_WORDS_S
        while (failure := self._pool.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return failure

    def close(self) -> None:
        if self._closed or os.getpid() != self._process:  # a forked process has its parent's connections, too
            return
        self._closed = True
        try:
            if self._control is not None:
                self.execute(StepPlan.empty(stop=True))
        except WorkerError:
            pass  # they are gone already
        finally:
            self._pool.close()
            if self._control is not None:
                self._control.close()
                self._control = None
