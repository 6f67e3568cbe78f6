"""Workers as processes of this machine: a mesh without Ray, for tests and for the Python API."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from runtime.config import Config
from runtime.model.spec import ModelSpec

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
"""Several workers share the cores: none may spin while it waits. Set before torch is imported."""


class ProcessPool:
    """One spawned process per rank."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def start(self, config: Config, spec: ModelSpec, host: str, port: int) -> None:
        context = mp.get_context("spawn")
        with _environment(WORKER_ENVIRONMENT):
            for rank in range(1, 1 + config.parallel.num_workers):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(theirs, config, spec, rank, host, port), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))

    def failure(self) -> str | None:
        for process, pipe in self._workers:
            try:
                if pipe.poll():
                    return pipe.recv()
            except EOFError:
                process.join(timeout=1)
            if process.exitcode:
                return f"process {process.pid} ended with exit code {process.exitcode}"
        return None

    def close(self) -> None:
        for process, _ in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()


def _run(pipe: Connection, config: Config, spec: ModelSpec, rank: int, host: str, port: int) -> None:
    try:
        from runtime.workers.worker import serve  # here, so that an import error is reported too

        serve(config, spec, rank, host, port)
    except KeyboardInterrupt:
        pass  # the coordinator was interrupted too, and ends this process
    except BaseException:
        pipe.send(f"rank {rank}: " + traceback.format_exc(limit=-3))
        raise SystemExit(1) from None


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
