"""A job whose server is killed and started again, and which is killed itself, answers every record once, in order, as
an undisturbed run does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.timeout(280)]

NUM_RECORDS = 60


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def outrider(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli.commands", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def serve(model: Path, port: int) -> subprocess.Popen[str]:
    settings = [f"model.path={model}", f"server.port={port}", "scheduler.max_sequences=3", "lookahead.planner=false"]
    return outrider("serve", *(part for setting in settings for part in ("--set", setting)))


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(reached, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_servers_and_clients_cost_time_and_no_record(tiny_model: Path, tmp_path: Path, port: int) -> None:
    source, target, expected = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "expected.jsonl"))
    with source.open("w") as file:
        for number in range(NUM_RECORDS):
            record = {"id": f"r{number}", "prompt": f"Record {number}", "temperature": 0.9, "seed": number}
            file.write(json.dumps(record | {"max_new_tokens": 40, "ignore_eos": True}) + "\n")
    job = ["batch", source, target, f"--address=127.0.0.1:{port}", "--concurrency=4"]
    server, client = serve(tiny_model, port), None
    try:
        assert server.stdout is not None and "serving on" in server.stdout.readline()
        undisturbed = outrider("batch", source, expected, f"--address=127.0.0.1:{port}", "--concurrency=4")
        assert undisturbed.wait(120) == 0
        client = outrider(*job)
        for killed in (8, 24):
            wait_until(lambda killed=killed: num_lines(target) >= killed)
            server.kill()
            server.wait()
            server = serve(tiny_model, port)
        wait_until(lambda: num_lines(target) >= 40 or client.poll() is not None)
        client.send_signal(signal.SIGKILL)
        client.wait()
        client = outrider(*job, "--resume")
        assert client.wait(120) == 0
    finally:
        for process in (server, client):
            if process is not None:
                process.kill()
                process.wait()
    answers = [[json.loads(line) for line in path.read_text().splitlines()] for path in (target, expected)]
    assert [one["id"] for one in answers[0]] == [f"r{number}" for number in range(NUM_RECORDS)]
    for found, wanted in zip(*answers, strict=True):
        assert (found["text"], found["token_ids"]) == (wanted["text"], wanted["token_ids"])
