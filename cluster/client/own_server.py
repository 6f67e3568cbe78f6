"""A server of our own: `outrider serve` as a process, for as long as it is needed."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from cluster.actors import processes
from runtime.errors import WorkerError
from runtime.progress import tell

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
ANNOUNCEMENT = "serving on "
"""How the line begins in which the server says its address."""


@contextmanager
def own_server(settings: Sequence[str] = (), config: Path | None = None) -> Iterator[tuple[psutil.Process, str]]:
    """(process, address) of a server with these `--set` settings, on a port that the system chooses, its workers on a
    Ray of its own. It is ended with SIGTERM.

    What it says of its start is passed on to standard error. Raises WorkerError where it does not start.
    """
    command = [sys.executable, "-m", "cluster.cli", "serve", *(("--config", str(config)) if config else ())]
    command += [
        part
        for setting in ["server.http_port=null", "server.restarts=0", *settings, "server.port=0"]
        for part in ("--set", setting)
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        log: list[str] = []
        threading.Thread(target=_hand_over, args=(process.stdout, lines), daemon=True).start()
        threading.Thread(target=_listen, args=(process.stderr, log), daemon=True).start()
        server = psutil.Process(process.pid)
        try:
            yield server, _address(process, lines, log)
        finally:
            family = [server, *server.children(recursive=True)] if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                processes.end(family, 0)


def _address(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None], log: list[str]) -> str:
    try:
        line = lines.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        raise WorkerError(f"the server did not start within {START_TIMEOUT_S:g} s:\n{''.join(log[-20:])}") from None
    if line is None or not line.startswith(ANNOUNCEMENT):
        raise WorkerError(f"the server ended with exit code {process.wait()}:\n{''.join(log[-20:])}")
    return line.removeprefix(ANNOUNCEMENT).strip()


def _hand_over(pipe: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _listen(pipe: IO[str], log: list[str]) -> None:
    """Keep what the server says, and pass on what it says of its start: lines of its log begin with the time."""
    for line in pipe:
        log.append(line)
        if line.strip() and not line[0].isdigit():
            tell(line.rstrip())
