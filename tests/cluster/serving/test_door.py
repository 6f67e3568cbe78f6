"""The server's door: where it listens, what it says before there is a model, and bytes that are no message."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from cluster.client.client import Client
from cluster.serving.ports import check_free
from cluster.serving.server import GenerationServer, serve
from cluster.wire.statuses import CallError
from cluster.wire.transport import MAX_MESSAGE_BYTES
from runtime.config import Config
from runtime.errors import ConfigError
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import serving

METHODS = ("Generate", "GetServerInfo", "Converse")
MALFORMED = {"no message": b"\xff\xff\xff", "no UTF-8": b"\x0a\x02\xff\xfe", "cut off": b"\x0a\x7f"}


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def call(channel: grpc.Channel, method: str, content: bytes) -> list[bytes]:
    path = f"/outrider.v1.GenerationService/{method}"
    if method == "Converse":
        return list(channel.stream_stream(path)(iter([content]), timeout=20))
    if method == "Generate":
        return list(channel.unary_stream(path)(content, timeout=20))
    return [channel.unary_unary(path)(content, timeout=20)]


def test_malformed_bytes_are_an_invalid_argument_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(Config.load(None, ["server.port=0"]))
    limits = [("grpc.max_send_message_length", -1)]
    with caplog.at_level(logging.INFO), serving(engine) as server:
        with grpc.insecure_channel(server.address, options=limits) as channel:
            for method in METHODS:
                for content in MALFORMED.values():
                    if method == "GetServerInfo" and content == MALFORMED["no UTF-8"]:
                        continue  # to this message it is an unknown field
                    with pytest.raises(grpc.RpcError) as error:
                        call(channel, method, content)
                    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (method, error.value)
                with pytest.raises(grpc.RpcError) as error:
                    call(channel, method, bytes(MAX_MESSAGE_BYTES + 1))
                assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert str(MAX_MESSAGE_BYTES) in error.value.details()
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary("/outrider.v1.GenerationService/Nothing")(b"", timeout=20)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with Client(server.address) as client:
            assert client.complete("A", sampling={"max_new_tokens": 3}).usage.num_new_tokens == 3
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def test_before_the_model_is_there_the_server_says_so() -> None:
    async def run() -> None:
        server = GenerationServer(Config.load(None, ["server.port=0", "server.http_port=null"]))
        address = (await server.start()).grpc

        def ask() -> None:
            with Client(address, retries=0) as client:
                assert not client.is_serving()
                for work in (
                    client.server_info,
                    lambda: client.complete("A"),
                    lambda: list(client.converse().ask("A")),
                ):
                    with pytest.raises(CallError, match="still being loaded") as error:
                        work()
                    assert error.value.code is grpc.StatusCode.UNAVAILABLE

        try:
            await asyncio.to_thread(ask)
        finally:
            await server.stop()

    asyncio.run(run())


def test_a_taken_port_is_refused_before_the_engine_is_opened() -> None:
    @contextmanager
    def engine() -> Iterator[ScriptedEngine]:
        raise AssertionError("opened")
        yield

    with taken_port() as port:
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            there = [f"server.host={host}", "server.insecure=true"]
            with pytest.raises(ConfigError, match=f"server.port = {port}: is taken"):
                serve(Config.load(None, [*there, f"server.port={port}"]), engine())
            with pytest.raises(ConfigError, match=f"server.http_port = {port}: is taken"):
                serve(Config.load(None, [*there, "server.port=0", f"server.http_port={port}"]), engine())


def test_a_host_that_is_none_is_refused_by_name() -> None:
    for host, words in (("no.such.host.invalid", "cannot be resolved"), ("192.0.2.1", "no address"), ("a" * 99, "")):
        with pytest.raises(ConfigError, match=f"server.host.*{words}"):
            check_free(host, 0)


def test_a_privileged_port_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(ConfigError, match=r"server.port = 80: .*privileged"):
        check_free("127.0.0.1", 80)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "[::1]", "::"])
def test_the_address_that_is_announced_can_be_called(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_free(host.strip("[]"), 0)
    except ConfigError:
        pytest.skip("no IPv6 here")
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(
        ScriptedEngine(Config.load(None, ["server.port=0", f"server.host={host}", "server.insecure=true"]))
    ) as server:
        with Client(server.address) as client:
            assert client.is_serving()
