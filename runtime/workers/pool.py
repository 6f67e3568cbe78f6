"""Workers as processes of this machine: a mesh without Ray, for tests and for the Python API.

A worker is a fresh interpreter, told over its standard input what to be. The program that wants it is not imported
again, so it may be anything: a script without a guard around its body, a notebook, `python -c`.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from contextlib import suppress
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.mesh import LOOPBACK
from runtime.model.spec import ModelSpec
from runtime.workers.roster import Place

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
"""Several workers share the cores: none may spin while it waits. Set before torch is imported."""

STOP_GRACE_S = 5.0
"""How long workers may take to end by themselves before they are killed."""
MAX_REPORT_BYTES = 16_384
"""What a worker says last fits into its pipe, since nobody reads before it has ended."""

_MAIN = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from runtime.workers.pool import main; main()"


class ProcessPool:
    """One process per rank. They end with this one, however it ends."""

    host = LOOPBACK
    own_devices = False

    def __init__(self, make_decoder: Any = None) -> None:
        """`make_decoder` (a worker.DecoderMaker that can be pickled): what ranks compute with, if not the model."""
        self._make_decoder = make_decoder
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._finalizer = weakref.finalize(self, _end, self._workers, os.getpid())

    def open(self, config: Config, spec: ModelSpec) -> None:
        executable = os.fsdecode(get_executable() or "")
        if not executable or getattr(sys, "frozen", False):
            problem = f"workers are processes of the Python interpreter, and this program is none ({executable!r})"
            remedy = "Name the interpreter with multiprocessing.set_executable, or set lp and tp to 1."
            raise ConfigError("parallel", f"lp={config.parallel.lp} tp={config.parallel.tp}", problem, remedy)
        # -P: the current folder is not a place to import from unless it is for this program, too.
        self._command = [executable, *subprocess._args_from_interpreter_flags(), "-P", "-c", _MAIN]  # type: ignore[attr-defined]
        self._config, self._spec = config, spec

    def start(self, place: Place) -> None:
        path = [*sys.path, str(Path(__file__).parents[2])]  # the last in case that "" is not that folder any more
        worker = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | WORKER_ENVIRONMENT
        )
        self._workers[place.worker] = worker
        assert worker.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, and `failures` says so
            what = self._config, self._spec, place, self._make_decoder
            worker.stdin.write(pickle.dumps(path) + pickle.dumps(what))
            worker.stdin.flush()  # and left open: when it ends, so does the worker

    def failures(self) -> dict[int, str]:
        by_pipe = {worker.stdout: number for number, worker in self._workers.items() if worker.stdout is not None}
        ended, _, _ = select.select(by_pipe, [], [], 0)  # these have said something, or can say no more
        return {by_pipe[pipe]: _cause(self._forget(by_pipe[pipe])) for pipe in ended}

    def end(self, worker: int) -> None:
        process = self._forget(worker)
        process.kill()
        _cause(process)

    def _forget(self, worker: int) -> subprocess.Popen[bytes]:
        return self._workers.pop(worker)

    def close(self) -> None:
        self._finalizer()


def _cause(worker: subprocess.Popen[bytes]) -> str:
    """What the worker, which is ending, said last. It is seen to its end."""
    assert worker.stdout is not None and worker.stdin is not None
    with worker.stdout:
        said = os.read(worker.stdout.fileno(), MAX_REPORT_BYTES).decode(errors="replace")
    with suppress(BrokenPipeError):
        worker.stdin.close()
    try:
        worker.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    return said or f"process {worker.pid} ended with exit code {worker.returncode}"


def _end(workers: dict[int, subprocess.Popen[bytes]], owner: int) -> None:
    """End the processes, if this is the one that started them and not one that was forked from it."""
    if os.getpid() != owner:
        return
    for worker in workers.values():
        assert worker.stdin is not None
        with suppress(BrokenPipeError):
            worker.stdin.close()
    deadline = time.monotonic() + STOP_GRACE_S
    for worker in workers.values():
        try:
            worker.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()
    workers.clear()


def main() -> None:
    """Be the worker that standard input describes. What goes wrong is written to what was standard output."""
    report = os.dup(1)
    with suppress(OSError):  # there may be no standard error
        os.dup2(2, 1)  # what is printed here is nobody's result
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which ends its workers if it ends
    threading.Thread(target=_end_with_owner, name="outrider-owner", daemon=True).start()
    try:
        from runtime.workers.worker import serve  # here, so that an import error is reported too

        serve(*pickle.load(sys.stdin.buffer))
    except BaseException:
        os.write(report, traceback.format_exc(limit=-3).encode(errors="replace")[-MAX_REPORT_BYTES:])
        raise SystemExit(1) from None


def _end_with_owner() -> None:
    """End this process as soon as the one that started it has gone, or has closed its standard input."""
    owner, closed = os.getppid(), select.poll()
    closed.register(sys.stdin.fileno(), select.POLLHUP)
    # A process that was forked from the owner keeps the pipe open, so look at the parent, too.
    while not closed.poll(1000) and os.getppid() == owner:
        pass
    os._exit(1)
