"""What a chunk takes on its way out: from the step that gave it to the client's hands, over gRPC and over HTTP.

The server runs in this process, the client in one of its own, on the same clock; both doors take turns on the same
prompt, one stream at a time. Prints a table and one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Annotated, Any

import typer

from cluster.serving.server import Addresses, GenerationServer
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.request import StepOutput

PROMPT = "Once upon a time"
CLIENT = """
import http.client, json, sys, time
door, address, prompt, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
times = []
if door == "grpc":
    from cluster.client.client import Client
    with Client(address) as client:
        client.wait_ready()
        for chunk in client.generate(prompt, sampling={"max_new_tokens": count, "ignore_eos": True}):
            times.append(time.perf_counter())
else:
    connection = http.client.HTTPConnection(address)
    body = {"prompt": prompt, "max_tokens": count, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            json.loads(line[6:])
            times.append(time.perf_counter())
print(json.dumps(times))
"""


def main(
    rounds: Annotated[int, typer.Option(help="Streams over each door.")] = 6,
    tokens: Annotated[int, typer.Option(help="Of each stream.")] = 128,
    model: Annotated[str, typer.Option(help="A model's directory.")] = "",
) -> None:
    """Measure both doors."""
    settings = ["server.port=0", "server.http_port=0", "lookahead.enabled=false"]
    config = Config.load(None, [*settings, *([f"model.path={model}"] if model else [])])
    delays: dict[str, list[float]] = {"grpc": [], "http": []}
    with Engine.from_config(config) as engine:
        given = _timed(engine)
        events = asyncio.new_event_loop()
        threading.Thread(target=events.run_forever, daemon=True).start()

        def run(coroutine: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, events).result()

        server = GenerationServer(config)
        addresses: Addresses = run(server.start())
        run(server.open(engine))
        try:
            for index in range(2 * (rounds + 1)):
                door = "grpc" if index % 2 else "http"
                given.clear()
                address = addresses.grpc if door == "grpc" else addresses.http
                words = [sys.executable, "-c", CLIENT, door, str(address), PROMPT, str(tokens)]
                came = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                assert len(came) == len(given), f"{len(came)} chunks of {len(given)} steps"
                if index > 1:  # the first of each door warms up
                    delays[door] += [there - here for here, there in zip(given, came, strict=True)][1:]
                print(f"{door}: {1e3 * statistics.median(delays[door] or [0]):.3f} ms", file=sys.stderr)
        finally:
            run(server.stop())
    _show(delays)


def _timed(engine: Engine) -> list[float]:
    """When each step of the engine that gave tokens ended, from now on."""
    given: list[float] = []
    step = engine.step

    def timed() -> list[StepOutput]:
        outputs = step()
        if any(output.token_ids for output in outputs):
            given.append(time.perf_counter())
        return outputs

    engine.step = timed  # type: ignore[method-assign]
    return given


def _show(delays: dict[str, list[float]]) -> None:
    figures: dict[str, dict[str, float]] = {}
    print(f"{'door':6}{'chunks':>8}{'p10 ms':>9}{'median ms':>11}{'p90 ms':>9}")
    for door, found in delays.items():
        deciles = [1e3 * cut for cut in statistics.quantiles(found, n=10)]
        figures[door] = {"p10_ms": deciles[0], "median_ms": 1e3 * statistics.median(found), "p90_ms": deciles[-1]}
        print(f"{door:6}{len(found):8}" + "{p10_ms:9.3f}{median_ms:11.3f}{p90_ms:9.3f}".format(**figures[door]))
    more = figures["http"]["median_ms"] - figures["grpc"]["median_ms"]
    print(f"HTTP over gRPC: {more:+.3f} ms a chunk, by the medians")
    print(json.dumps({"doors": figures, "http_over_grpc_ms": more}))


if __name__ == "__main__":
    typer.run(main)
