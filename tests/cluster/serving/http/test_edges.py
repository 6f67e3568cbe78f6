"""The HTTP door at its edges, forced with a scripted engine: clients that go away, that are slow, that are many."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import pytest

from cluster.client.client import Client
from cluster.serving.http import app, protocol
from runtime.config import Config
from runtime.errors import NumericsError, WorkerError
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import ServerThread, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

TEXT = "/v1/completions"
FOREVER = {"prompt": "A", "max_tokens": 10**6}


@pytest.fixture
def engine() -> ScriptedEngine:
    settings = ["server.port=0", "scheduler.max_sequences=2", "scheduler.max_waiting=2", "server.model_name=letters"]
    return ScriptedEngine(Config.load(None, settings), step_s=0.002)


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[ServerThread]:
    with serving(engine, http=True) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def http(server: ServerThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
        yield http


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_client_that_leaves_a_stream_withdraws_its_request(http: httpx.Client, engine: ScriptedEngine) -> None:
    with http.stream("POST", TEXT, json=FOREVER | {"stream": True, "n": 2}) as answer:
        next(answer.iter_lines())
        assert engine.num_running == 2
    eventually(lambda: not engine.has_work)


def test_a_client_that_waits_no_longer_withdraws_its_request(http: httpx.Client, engine: ScriptedEngine) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(TEXT, json=FOREVER, timeout=0.3)
    eventually(lambda: not engine.has_work)
    assert http.post(TEXT, json={"prompt": "A", "max_tokens": 3}).json()["choices"][0]["text"] == "BCD"


def test_a_reader_that_does_not_read_is_let_go(engine: ScriptedEngine) -> None:
    engine.step_s = 0.0
    with serving(engine, http=True, write_timeout_s=0.3) as server:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps(FOREVER | {"stream": True}).encode()
            head = f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: engine.has_work)
            eventually(lambda: not engine.has_work)
            with httpx.Client(base_url=server.url, trust_env=False) as http:
                assert http.post(TEXT, json={"prompt": "A", "max_tokens": 2}).status_code == 200


def test_a_full_queue_is_a_429_that_says_when(server: ServerThread, http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    loop = server.loop
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(http.post, TEXT, json={"prompt": "A", "max_tokens": 2}) for _ in range(4)]
        eventually(lambda: loop.stats.num_running + loop.stats.num_waiting == 4)
        answer = http.post(TEXT, json={"prompt": "A"})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        engine.gate.set()
        assert [done.result().status_code for done in waiting] == [200] * 4
    eventually(lambda: not engine.has_work)


def test_an_id_that_runs_is_a_conflict(http: httpx.Client, engine: ScriptedEngine) -> None:
    with http.stream("POST", TEXT, json=FOREVER | {"stream": True, "request_id": "same"}) as first:
        next(first.iter_lines())
        again = http.post(TEXT, json={"prompt": "A", "request_id": "same"})
    assert again.status_code == 409 and again.json()["error"]["param"] == "request_id"


def test_failures_are_statuses_before_a_stream_and_events_within_it(http: httpx.Client, engine: ScriptedEngine) -> None:
    with http.stream("POST", TEXT, json=FOREVER | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        engine.error = NumericsError("no numbers")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["error"]["code"] == "model_failed" and answer.status_code == 200
    answer = http.post(TEXT, json=FOREVER)
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
    assert http.get("/health").status_code == 503


def test_draining_ends_streams_and_takes_no_more(server: ServerThread, engine: ScriptedEngine) -> None:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
        with http.stream("POST", TEXT, json={"prompt": "A", "max_tokens": 150, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            drained = threading.Thread(target=server.drain, args=(30,))
            drained.start()
            eventually(lambda: httpx.get(f"{server.url}/ready", trust_env=False).status_code == 503)
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
            assert httpx.post(f"{server.url}{TEXT}", json={"prompt": "A"}, trust_env=False).status_code == 503
            assert list(lines)[-2] == "data: [DONE]"
        drained.join(30)


def test_before_the_model_is_there_the_door_says_so() -> None:
    import asyncio

    from cluster.serving.server import GenerationServer

    async def run() -> None:
        server = GenerationServer(Config.load(None, ["server.port=0", "server.http_port=0"]))
        address = (await server.start()).http

        def ask() -> None:
            with httpx.Client(base_url=f"http://{address}", trust_env=False) as http:
                assert http.get("/health").status_code == 200
                for answer in (http.get("/ready"), http.get("/v1/models"), http.post(TEXT, json={"prompt": "A"})):
                    assert answer.status_code == 503 and "loaded" in answer.json()["error"]["message"]
                assert "outrider_up 0.0" in http.get("/metrics").text

        try:
            await asyncio.to_thread(ask)
        finally:
            await server.stop()

    asyncio.run(run())


def test_headers_and_bodies_that_do_not_come_end_the_connection(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.2)
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n")
        assert idle.recv(100) == b""
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode())
        slow.sendall(b"content-length: 9\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    with socket.create_connection((host, int(port)), timeout=10) as odd:
        odd.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        answer = odd.recv(1000)
        assert answer.startswith(b"HTTP/1.1 400") and b'"code":"bad_request"' in answer


def test_more_connections_than_may_be_are_refused(engine: ScriptedEngine) -> None:
    with serving(engine, http=True, max_connections=2) as server:
        address = server.url.removeprefix("http://")
        kept = [HTTPConnection(address, timeout=10) for _ in range(3)]
        statuses = []
        for connection in kept:
            connection.request("GET", "/health")
            statuses.append(connection.getresponse().status)
        assert statuses == [200, 200, 503]
        for connection in kept:
            connection.close()
        eventually(lambda: httpx.get(f"{server.url}/health", trust_env=False).status_code == 200)


def test_a_connection_carries_call_after_call(server: ServerThread) -> None:
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for count in range(1, 6):
        body = json.dumps({"prompt": "A", "max_tokens": count, "stream": count % 2 == 0})
        connection.request("POST", TEXT, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read()
    connection.close()


def test_long_bodies_hold_up_nobody(server: ServerThread, engine: ScriptedEngine) -> None:
    long = {"messages": [{"role": "user", "content": "x"}] * 150_000}
    gaps, done = [], threading.Event()

    def send() -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as other:
            assert other.post("/v1/chat/completions", json=long).status_code == 400
        done.set()

    with Client(server.address) as client, client.generate("A", sampling={"max_new_tokens": 10**6}) as stream:
        next(stream)
        threading.Thread(target=send).start()
        while not done.is_set():
            began = time.perf_counter()
            next(stream)
            gaps.append(time.perf_counter() - began)
    assert max(gaps) < 2.0  # on a machine that does other things, too


def test_a_worker_that_is_gone_is_unavailable(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.error = WorkerError("rank 3 is gone")
    answer = http.post(TEXT, json={"prompt": "A"})
    assert answer.status_code == 503 and "rank 3 is gone" in answer.json()["error"]["message"]


def test_usage_may_come_with_every_chunk(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "A", "max_tokens": 6, "stream": True, "stream_options": options}
    lines = http.post(TEXT, json=body).text.split("\n\n")
    counts = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines if line.startswith("data: {")]
    assert counts == [1, 3, 6, 6]


def test_two_servers_of_one_machine_are_two(engine: ScriptedEngine) -> None:
    with serving(engine, http=True) as first, serving(engine, http=True) as second:
        assert first.url != second.url
