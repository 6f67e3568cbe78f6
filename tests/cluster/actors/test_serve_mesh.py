"""`outrider serve` with its mesh on Ray, as a process of its own: called, told to stop, and gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from cluster.actors import processes
from tests.models import save_tiny_model

pytestmark = [pytest.mark.system, pytest.mark.slow]

OUTRIDER = (sys.executable, "-m", "cluster.cli")


def test_serve_on_ray_answers_and_leaves_nothing(tmp_path):
    model = save_tiny_model(tmp_path / "tiny")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    settings = ["--set", f"model.path={model}", "--set", "model.device=cpu", "--set", "parallel.lp=2"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [*OUTRIDER, "serve", *settings, "--set", "server.port=0", "--set", "server.http_port=null"],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        ) as server,
    ):  # fmt: skip
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("serving on 127.0.0.1:"), (tmp_path / "log").read_text()
            family = psutil.Process(server.pid).children(recursive=True)
            assert any("MeshWorker" in processes.describe(process) for process in family)
            _call(tmp_path, line.split()[-1])
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    assert code == 0, (tmp_path / "log").read_text()
    assert [processes.describe(process) for process in processes.alive(family)] == []


def _call(tmp_path, address: str) -> None:
    records = [
        {"id": f"lookahead {lookahead}", "prompt": "ababab", "lookahead": {"enabled": lookahead}}
        for lookahead in (True, False)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--address", address, "--max-new-tokens", "16", "--ignore-eos", "--concurrency", "2"]
    subprocess.run([*OUTRIDER, "batch", str(source), str(target), *options], check=True, timeout=60)
    ahead, plain = (json.loads(line) for line in target.read_text().splitlines())
    assert ahead["token_ids"] == plain["token_ids"] and len(plain["token_ids"]) == plain["num_steps"] == 16
