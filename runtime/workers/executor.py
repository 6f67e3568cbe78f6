"""How the engine reaches its workers, one call per step: what all ways have in common, and the one in this process."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from runtime.config import Config
from runtime.mesh import mesh
from runtime.mesh.device import pick_device
from runtime.model.spec import ModelSpec
from runtime.step import StepPlan, StepResult, next_number
from runtime.workers.worker import DecoderMaker, Worker


class Executor(Protocol):
    @property
    def num_pages(self) -> tuple[int, ...] | None:
        """Pages of the workers' caches, per group of layers, on the worker that has fewest; None: not shared."""

    @property
    def num_replicas(self) -> int:
        """Replicas that share the rows of a step now. A step may change it, and divide its plan's rows anew."""

    @property
    def num_lost(self) -> int:
        """Workers that have died, or were given up, since the start."""

    def execute(self, plan: StepPlan, patience_s: float | None = None) -> StepResult:
        """Run one step on every replica. `patience_s`: how long it may take, at most, before ranks that do not answer
        are given up.

        Raises CachesLostError where nobody has the cached tokens any more, WorkerError if there is no going on.
        """

    def close(self) -> None:
        """End the workers. Idempotent."""


class LocalExecutor:
    """The only rank of a 1x1 mesh, in this process."""

    num_replicas = 1
    num_lost = 0

    def __init__(self, config: Config, spec: ModelSpec, make_decoder: DecoderMaker | None = None) -> None:
        """`make_decoder`: what it computes with, if not the model."""
        if config.parallel.threads is not None:
            torch.set_num_threads(config.parallel.threads)
        self._worker = Worker(config, spec, mesh.Mesh(device=pick_device(config, 0)), make_decoder)
        self._worker.forget(0)
        self._number = 0
        self.num_pages = self._worker.num_pages

    def execute(self, plan: StepPlan, patience_s: float | None = None) -> StepResult:
        started = time.perf_counter()
        if plan.num_rows:
            plan.number = self._number = next_number(self._number)
        chosen = self._worker.step(plan)
        seconds = {"broadcast": 0.0, "forward": time.perf_counter() - started, "gather": 0.0}
        return StepResult.of(plan, chosen, seconds)

    def close(self) -> None:
        pass
