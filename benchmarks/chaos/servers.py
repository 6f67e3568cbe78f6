"""Faults of the coordinator: `outrider serve`, whose server is killed while clients read answers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.chaos.record import Asked, Fault, Report, Stream, Tokens
from cluster.client.client import Client
from cluster.client.own_server import own_server
from runtime.errors import OutriderError


def disturb(
    settings: Sequence[str],
    config: Path | None,
    asked: Sequence[Asked],
    expected: Sequence[Tokens],
    num_kills: int,
    choice: random.Random,
    show: Callable[[], None],
) -> Report:
    """Kill the server so often, each time once it answers again; its supervisor starts it."""
    report, going = Report(), threading.Event()
    going.set()
    with own_server([*settings, "server.restarts=100"], config) as (supervisor, address), Client(address) as client:

        def read(kind: int) -> None:
            while going.is_set():
                stream = Stream(kind, times=[time.monotonic()])
                report.streams.append(stream)
                try:
                    for chunk in client.generate(token_ids=asked[kind].prompt, sampling=asked[kind].sampling):
                        stream.take(chunk.token_ids)
                except OutriderError as error:
                    stream.error = str(error)
                stream.is_over = True

        readers = [threading.Thread(target=read, args=(kind,)) for kind in range(len(asked))]
        for reader in readers:
            reader.start()
        for _ in range(num_kills):
            client.wait_ready(120)
            time.sleep(choice.uniform(0.5, 3.0))
            (server,) = [child for child in supervisor.children() if _is_server(child)]
            report.faults.append(Fault("server", "server", time.monotonic()))
            server.kill()
            show()
        going.clear()
        for reader in readers:
            reader.join(300)
    for stream in report.streams:
        report.verdict.judge(stream, expected[stream.kind])
    return report


def _is_server(process: psutil.Process) -> bool:
    return "cluster.cli" in process.cmdline()
