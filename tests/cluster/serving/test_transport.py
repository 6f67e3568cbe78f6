"""gRPC as people expect it of a public service: compression, keepalive, retries, and a client for asyncio."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.client.async_client import AsyncClient
from cluster.client.calls import SERVICE_CONFIG
from cluster.client.client import Client
from cluster.serving import transport
from cluster.serving.generation import SERVICE_NAME
from cluster.wire.statuses import CallError
from runtime.config import Config, ServerConfig
from runtime.errors import ConfigError, InvalidRequestError
from runtime.request import FinishReason
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import ServerThread, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

ROOT = Path(__file__).resolve().parents[3]
FOREVER = {"max_new_tokens": 10**6}


@pytest.fixture(params=["none", "gzip"])
def engine(request: pytest.FixtureRequest) -> ScriptedEngine:
    settings = ["server.port=0", "scheduler.max_sequences=3", "sampling.max_new_tokens=9"]
    engine = ScriptedEngine(Config.load(None, [*settings, f"server.compression={request.param}"]), step_s=0.002)
    engine.capacity = 10**9
    return engine


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[ServerThread]:
    with serving(engine) as server:
        yield server


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


# Compression


def test_compressed_or_not_the_answers_are_the_same(server: ServerThread) -> None:
    for compression in ("none", "deflate", "gzip"):
        with Client(server.address, compression=compression) as client:  # type: ignore[arg-type]
            assert client.complete("A" * 1000).text == "BCDEFGHIJ"


def test_responses_are_compressed_where_the_server_is_told_to(server: ServerThread, engine: ScriptedEngine) -> None:
    """A proxy between the two sees the compressor's name in the response's head."""
    with Relay(server.address) as relay, Client(f"127.0.0.1:{relay.port}") as client:
        client.complete("A" * 1000, sampling={"max_new_tokens": 50})
    # HPACK writes a new value as it is, or by its Huffman code, which is what gRPC chooses.
    assert (b"gzip" in relay.seen.replace(b"identity, deflate, gzip", b"")) == (
        engine.config.server.compression == "gzip"
    )


class Relay:
    """A TCP proxy that keeps what the server says."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.seen = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = host, int(port)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            theirs = socket.create_connection(self._target)
            threading.Thread(target=self._pass, args=(ours, theirs, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(theirs, ours, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, keeps: bool) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data if keeps else b""
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def test_what_is_no_compression_and_no_keepalive_is_refused() -> None:
    for wrong in ({"compression": "zip"}, {"keepalive_s": 0}, {"keepalive_s": True}, {"keepalive_s": "5"}):
        with pytest.raises(ConfigError) as caught:
            Client("localhost:1", **wrong)  # type: ignore[arg-type]
        assert caught.value.field in wrong and caught.value.remedy


# Keepalive


def test_pings_are_no_reason_to_end_a_connection_unless_the_config_says_so() -> None:
    options = dict(transport.options(ServerConfig()))
    assert options["grpc.http2.max_ping_strikes"] == 0 and options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.keepalive_time_ms"] == 30_000 and options["grpc.max_connection_age_ms"] == 2**31 - 1
    config = Config.load(None, ["server.keepalive.time_s=5", "server.keepalive.least_interval_s=2"])
    options = dict(transport.options(config.server))
    assert options["grpc.keepalive_time_ms"] == 5_000 and options["grpc.http2.max_ping_strikes"] == 2
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 2_000


def test_a_connection_of_some_age_is_replaced_and_no_answer_is_lost() -> None:
    settings = ["server.port=0", "server.keepalive.max_connection_age_s=0.2", "sampling.max_new_tokens=400"]
    with serving(ScriptedEngine(Config.load(None, settings), step_s=0.005)) as server:
        with Client(server.address, keepalive_s=5.0) as client:
            began = time.monotonic()
            for _ in range(2):
                assert client.complete("A").usage.num_new_tokens == 400
            assert time.monotonic() - began > 0.5  # several such ages


# Retries


def test_a_call_that_nobody_took_is_sent_again() -> None:
    """The server is found at its port while the call waits for its third try."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[ServerThread] = []

    def start() -> None:
        time.sleep(0.15)
        started.append(ServerThread(ScriptedEngine(Config.load(None, [f"server.port={port}"]))))

    async def ask() -> str:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            return (await client.complete("A", sampling={"max_new_tokens": 3})).text

    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert asyncio.run(ask()) == "BCD"
    finally:
        thread.join(20)
        for server in started:
            server.close()


def test_a_call_that_has_begun_to_answer_is_not_sent_again(server: ServerThread, engine: ScriptedEngine) -> None:
    with Client(server.address, retries=0) as client, client.generate("A", sampling=FOREVER) as stream:
        next(stream)
        thread = threading.Thread(target=server.stop)
        thread.start()
        with pytest.raises(CallError) as caught:
            for _ in stream:
                pass
        thread.join(20)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE and engine.stats.num_requests == 1


def test_the_page_shows_the_service_config_that_the_client_uses() -> None:
    (shown,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/grpc.md").read_text(), re.DOTALL | re.MULTILINE)
    assert json.loads(shown) == SERVICE_CONFIG
    assert SERVICE_CONFIG["methodConfig"][0]["name"] == [{"service": SERVICE_NAME}]


# The client for asyncio


def test_the_async_client_answers_as_the_other_does(server: ServerThread) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            await client.wait_ready()
            assert await client.is_serving()
            assert (await client.server_info()).model.capacity == 10**9
            with Client(server.address) as other:
                expected = list(other.generate("A", request_id="a"))
                assert [chunk.token_ids async for chunk in client.generate("A", request_id="a")] == [
                    chunk.token_ids for chunk in expected
                ]
                both = await client.complete(token_ids=[65], sampling={"n": 2}), other.complete("A", sampling={"n": 2})
            assert both[0].text == both[1].text == "BCDEFGHIJ"
            assert [answer.text for answer in both[0].others] == [answer.text for answer in both[1].others]

    asyncio.run(run())


def test_async_calls_go_on_side_by_side(server: ServerThread, engine: ScriptedEngine) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            async with client.generate("A", sampling=FOREVER) as endless:
                await anext(endless)
                answers = await asyncio.gather(*(client.complete(letter) for letter in "ABCDEF"))
                await anext(endless)
            assert [answer.text for answer in answers] == [
                "".join(chr(ord(letter) + 1 + index) for index in range(9)) for letter in "ABCDEF"
            ]
            await eventually(lambda: not engine.has_work)  # the endless one was withdrawn

    asyncio.run(run())


def test_async_calls_are_refused_and_fail_as_others_do(server: ServerThread) -> None:
    async def run() -> None:
        client = AsyncClient(server.address)
        for arguments in ({"prompt": 5}, {"prompt": "A", "request_id": 5}, {"prompt": "A", "timeout_s": -1}):
            with pytest.raises(InvalidRequestError):
                client.generate(**arguments)  # type: ignore[arg-type]
        with pytest.raises(CallError) as caught:
            await client.complete("A", sampling={"temperature": -1.0})
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(CallError) as caught:
            await client.complete("A", sampling=FOREVER, timeout_s=0.2)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await client.close()
        await client.close()
        with pytest.raises(CallError, match="the client is closed"):
            client.converse()
        async with AsyncClient("127.0.0.1:1") as nobody:
            for use in (nobody.server_info, nobody.is_serving, lambda: nobody.wait_ready(0.1)):
                with pytest.raises(CallError) as caught:
                    await use()
                assert caught.value.code is grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


def test_an_async_conversation(server: ServerThread, engine: ScriptedEngine) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            async with client.converse("talk") as conversation:
                chunks = [chunk async for chunk in await conversation.ask("A")]
                assert "".join(chunk.text for chunk in chunks) == "BCDEFGHIJ" and chunks[-1].request_id == "talk#0"
                endless = await conversation.ask("A", sampling=FOREVER)
                await anext(endless)
                await conversation.stop()
                last = [chunk async for chunk in endless][-1]
                assert last.finish_reason is FinishReason.CANCELLED
                await anext(await conversation.ask("A", sampling=FOREVER))
                answer = await conversation.ask("K", sampling={"max_new_tokens": 3})  # ends the one before
                assert "".join([chunk.text async for chunk in answer]) == "LMN"
                assert engine.sessions
            await eventually(lambda: not engine.sessions)
            with pytest.raises(CallError, match="closed"):
                await anext(await conversation.ask("A"))
            broken = client.converse("talk")
            with pytest.raises(CallError) as caught:
                await anext(await broken.ask("A", sampling={"top_p": 7.0}))
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
            await broken.close()

    asyncio.run(run())


def test_one_message_may_not_be_larger_than_both_ends_say(server: ServerThread) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(CallError) as caught:
                await client.complete("A" * (16 * 2**20 + 1))
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(run())
