"""`serve` as a process: it announces its address, drains on a signal, and ends at once on the second."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.client.client import Client
from cluster.wire.statuses import CallError

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]

PROGRAM = """
from contextlib import nullcontext
from cluster.serving.server import serve
from runtime.config import Config
from tests.cluster.serving.scripted_engine import ScriptedEngine

config = Config.load(None, ["server.port=0", "server.http_port=0"])
engine = ScriptedEngine(config, step_s=0.02)
serve(config, nullcontext(engine), announce=lambda addresses: print(addresses, flush=True), grace_s=60)
print("closed", flush=True)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=root, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    grpc, http = process.stdout.readline().split(), process.stdout.readline().split()
    assert grpc[:2] == ["serving", "on"] and http[:2] == ["http", "on"]
    return grpc[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with Client(address_of(process)) as client:
        client.wait_ready(20)
        stream = client.generate("A", sampling={"max_new_tokens": 40})
        first = next(stream)
        process.send_signal(number)
        rest = list(stream)
        assert sum(len(chunk.token_ids) for chunk in (first, *rest)) == 40
    assert process.communicate(timeout=30)[0] == "closed\n"
    assert process.returncode == 0


def test_a_second_signal_ends_the_draining(process: subprocess.Popen[str]) -> None:
    with Client(address_of(process), retries=0) as client:
        stream = client.generate("A", sampling={"max_new_tokens": 10**6})
        next(stream)
        process.send_signal(signal.SIGTERM)
        while client.is_serving():
            next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(CallError, match="UNAVAILABLE.*shut down"):
            list(stream)
    assert process.communicate(timeout=30)[0] == "closed\n"
    assert process.returncode == 0
