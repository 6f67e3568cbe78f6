"""Faults of workers: a mesh of processes under load in one engine, some of them killed or stopped."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence

from benchmarks.chaos.record import Asked, Fault, Report, Stream, Tokens
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.engine.loop import EngineLoop
from runtime.request import StepOutput
from runtime.workers.mesh_executor import MeshExecutor
from runtime.workers.pool import ProcessPool

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Load:
    """As many answers at a time as there are kinds of requests; one that has ended is asked for again."""

    def __init__(self, engine: Engine, loop: EngineLoop, asked: Sequence[Asked], report: Report) -> None:
        self._engine, self._loop, self._asked, self._report = engine, loop, asked, report
        self._lock = threading.Condition()
        self._num_live = 0
        self._going = True
        for kind in range(len(asked)):
            self._ask(kind)

    def _ask(self, kind: int) -> None:
        asked, stream = self._asked[kind], Stream(kind, times=[time.monotonic()])
        request = self._engine.make_request(asked.prompt, asked.sampling)

        def take(output: StepOutput) -> None:
            stream.take(output.token_ids)
            if output.finish_reason is None:
                return
            if output.failure is not None or len(stream.tokens) < request.sampling.max_new_tokens:
                stream.error = str(output.failure or output.finish_reason)
            stream.is_over = True
            with self._lock:
                self._num_live -= 1
                going = self._going
                self._lock.notify_all()
            if going:
                self._ask(kind)

        with self._lock:
            self._num_live += 1
            self._report.streams.append(stream)
        self._loop.submit(request, take)

    def finish(self, timeout_s: float) -> None:
        """Ask for no more, and wait until all have their answers."""
        with self._lock:
            self._going = False
            self._lock.wait_for(lambda: self._num_live == 0, timeout_s)


def undisturbed(config: Config, asked: Sequence[Asked]) -> list[Tokens]:
    """What the answers should be."""
    with Engine.from_config(config) as engine:
        return [engine.generate(list(one.prompt), dict(one.sampling))[0].token_ids for one in asked]


def disturb(
    config: Config, asked: Sequence[Asked], kinds: Sequence[str], choice: random.Random, show: Callable[[], None]
) -> Report:
    """One fault of each of `kinds` after the other, each of a worker chosen at random, at a random time: sometimes
    before the mesh is whole again."""
    mesh = f"{config.parallel.lp}x{config.parallel.tp}"
    expected, pool, report = undisturbed(config, asked), ProcessPool(), Report()
    with Engine.from_config(config, pool) as engine:
        loop = EngineLoop(engine, heartbeat_s=0.5)
        try:
            assert isinstance(engine.executor, MeshExecutor)
            load = Load(engine, loop, asked, report)
            for kind in kinds:
                if choice.random() < 0.8:
                    _wait(lambda: engine.executor.is_whole, 120)
                time.sleep(choice.uniform(0.2, 2.0))
                victim = choice.choice(list(pool._workers.values()))
                report.faults.append(Fault(kind, mesh, time.monotonic()))
                os.kill(victim.pid, SIGNALS[kind])
                show()
            _wait(lambda: engine.executor.is_whole, 120)
            load.finish(300)
        finally:
            loop.close()
    for stream in report.streams:
        stream.error = stream.error or (None if stream.is_over else "it did not end")
        report.verdict.judge(stream, expected[stream.kind])
    return report


def _wait(until: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not until() and time.monotonic() < deadline:
        time.sleep(0.05)
