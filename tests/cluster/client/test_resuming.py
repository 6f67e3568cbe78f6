"""A client whose connection breaks, or whose server is another one all of a sudden, gets the same answers: no token and
no text is lost, repeated or changed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cluster.client.client import Client
from cluster.client.resuming import Patience, Resumption, Retries
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.statuses import CallError
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.errors import ConfigError
from tests.cluster.cutter import Cutter, cutter
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

SAMPLED = {"max_new_tokens": 48, "temperature": 1.1, "seed": 3, "top_k": 80, "frequency_penalty": 0.3}
KINDS = {
    "greedy": {"max_new_tokens": 48},
    "sampled": SAMPLED,
    "stop texts": SAMPLED | {"stop": ["0a", "zz"], "include_stop": True},
    "several": SAMPLED | {"n": 3, "logprobs": 1, "prompt_logprobs": 0},
    "a schema": SAMPLED | {"json_schema": '{"type": "string", "minLength": 40}'},
}


def make_engine(model: Path, **settings) -> Engine:
    given = [f"{name}={value}" for name, value in settings.items()]
    return Engine.from_config(
        Config.load(None, [f"model.path={model}", "server.port=0", "scheduler.max_sequences=4", *given])
    )


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with make_engine(tiny_model) as engine:
        yield engine


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_change_nothing(engine: Engine, kind: str) -> None:
    with serving(engine) as server, cutter(server.address) as between:
        with Client(server.address) as straight, Client(between.address) as client:
            expected = straight.complete("Resume é", sampling=KINDS[kind])
            num_broken = 0
            for seed in range(3):
                draw = random.Random(seed)
                cuts = sorted(draw.sample(range(1, 12), 3))
                guesses = {"enabled": kind != "greedy"}  # a text known by heart would come in too few pieces to cut
                with client.generate("Resume é", sampling=KINDS[kind], lookahead=guesses) as stream:
                    chunks = []
                    for number, chunk in enumerate(stream):
                        chunks.append(chunk)
                        if number in cuts:
                            between.cut()
                found = client_answers(chunks)
                for index, answer in enumerate((expected, *expected.others)):
                    assert found[index] == (answer.text, answer.token_ids, answer.logprobs, answer.prompt_logprobs)
                num_broken += sum(bool(c.usage and c.usage.num_resumed_tokens) for c in chunks)
                for chunk in chunks:
                    if chunk.usage is not None:
                        assert chunk.usage.num_new_tokens == len(found[chunk.index][1])
                        assert 0 < chunk.usage.ttft_s < chunk.usage.latency_s
            assert num_broken > 1


def client_answers(chunks: list) -> dict[int, tuple]:
    return {
        index: (
            "".join(chunk.text for chunk in chunks if chunk.index == index),
            *(
                tuple(one for chunk in chunks if chunk.index == index for one in getattr(chunk, name))
                for name in ("token_ids", "logprobs", "prompt_logprobs")
            ),
        )
        for index in {chunk.index for chunk in chunks}
    }


def test_another_server_goes_on_where_the_first_one_was(engine: Engine, tiny_model: Path) -> None:
    with make_engine(tiny_model, **{"lookahead.enabled": "false"}) as other, serving(other) as second:
        with serving(engine) as first, cutter(first.address) as between, Client(between.address) as client:
            expected = client.complete("Go on", sampling=SAMPLED)
            with client.generate("Go on", sampling=SAMPLED) as stream:
                chunks = [next(stream) for _ in range(4)]
                between.refuses = True
                between.cut()
                heal = threading.Timer(0.5, heal_with, (between, second.address))
                heal.start()
                chunks += stream
            assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
            assert "".join(chunk.text for chunk in chunks) == expected.text
            assert second.service._desk.opened[1].stats.outcomes


def heal_with(between: Cutter, address: str) -> None:
    between.target, between.refuses = address, False


def test_a_server_that_would_answer_otherwise_is_not_taken_for_the_same(engine: Engine, tiny_model: Path) -> None:
    with make_engine(tiny_model, **{"sampling.top_p": "0.5"}) as other, serving(other) as second:
        with serving(engine) as first, cutter(first.address) as between, Client(between.address) as client:
            with client.generate("Go on", sampling=SAMPLED) as stream:
                next(stream)
                between.target = second.address
                between.cut()
                with pytest.raises(CallError, match="resume_key.*would go on otherwise") as caught:
                    list(stream)
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_patience_ends_in_the_error_of_the_last_try(engine: Engine) -> None:
    with serving(engine) as server, cutter(server.address) as between:
        for options, num_tries in (({"retries": 3}, 3), ({"retries": 0}, 0), ({"patience_s": 0.5}, None)):
            between.refuses = False
            with Client(between.address, **options) as client:
                client.wait_ready()
                stream = client.generate("A", sampling={"max_new_tokens": 400})
                next(stream)
                between.refuses = True
                between.cut()
                started = time.monotonic()
                with pytest.raises(CallError) as caught:
                    list(stream)
                assert caught.value.code is grpc.StatusCode.UNAVAILABLE and time.monotonic() - started < 5
                assert ("given up after" in caught.value.details) == (num_tries != 0)
                if num_tries:
                    assert f"given up after {num_tries} tries" in caught.value.details


def test_the_time_allowed_is_that_of_all_tries(engine: Engine) -> None:
    with serving(engine) as server, cutter(server.address) as between, Client(between.address) as client:
        stream = client.generate("A", sampling={"max_new_tokens": 400}, timeout_s=4.0)
        next(stream)
        between.refuses = True
        between.cut()
        started = time.monotonic()
        with pytest.raises(CallError) as caught:
            list(stream)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - started < 15


def test_a_stream_that_is_closed_while_it_waits_ends_at_once(engine: Engine) -> None:
    with serving(engine) as server, cutter(server.address) as between, Client(between.address) as client:
        stream = client.generate("A", sampling={"max_new_tokens": 400})
        next(stream)
        between.refuses = True
        between.cut()
        threading.Timer(0.5, stream.close).start()
        started = time.monotonic()
        with pytest.raises(CallError):
            list(stream)
        assert time.monotonic() - started < 5


def test_an_address_where_nobody_ever_answered_is_an_error_at_once() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(CallError, match="cannot be reached"):
        client.complete("A")


def test_tries_are_bounded_and_farther_and_farther_apart() -> None:
    error = CallError("host:1", grpc.StatusCode.UNAVAILABLE, "gone")
    retries = Retries(Patience(retries=8, seconds=1000))
    pauses = [retries.pause_after(error) for _ in range(8)]
    assert all(0.05 * 2**k <= pause <= 0.1 * 2**k for k, pause in enumerate(pauses[:5])) and max(pauses) <= 3.0
    with pytest.raises(CallError, match="gone .given up after 8 tries"):
        retries.pause_after(error)
    retries.heard()
    assert retries.pause_after(error) <= 0.1
    for bad in ({"retries": -1}, {"retries": 1.5}, {"seconds": -1.0}, {"seconds": float("nan")}):
        with pytest.raises(ConfigError):
            Patience(**bad)


def test_errors_that_no_try_can_mend_are_not_tried_again() -> None:
    refused = CallError("host:1", grpc.StatusCode.INVALID_ARGUMENT, "no")
    full = CallError("host:1", grpc.StatusCode.RESOURCE_EXHAUSTED, "scheduler.max_waiting = 0: full")
    in_use = CallError("host:1", grpc.StatusCode.ALREADY_EXISTS, "request_id")
    gone = CallError("host:1", grpc.StatusCode.UNAVAILABLE, "gone")
    for error in (refused, full, in_use):
        with pytest.raises(CallError):
            Resumption(pb.GenerateRequest(), Patience()).pause_after(error, was_taken=True)
    resumption = Resumption(pb.GenerateRequest(), Patience())
    assert resumption.pause_after(gone, was_taken=True) <= 0.1
    assert resumption.pause_after(full, was_taken=False) <= 0.2  # the server is back, and others were faster
    assert resumption.pause_after(in_use, was_taken=False) <= 0.4  # it has not missed the broken call yet
    with pytest.raises(CallError):
        resumption.pause_after(refused, was_taken=False)


def test_an_answer_that_was_whole_already_is_not_asked_for_again(engine: Engine) -> None:
    """The connection breaks behind its last response."""
    with serving(engine) as server, Client(server.address) as client:
        for sampling in ({"max_new_tokens": 5}, {"max_new_tokens": 5, "n": 2}):
            stream = client.generate("A", sampling=sampling)
            chunks = []
            while sum(chunk.usage is not None for chunk in chunks) < sampling.get("n", 1):
                chunks.append(next(stream))
            stream._call = Broken()
            assert list(stream) == []


class Broken(grpc.RpcError):
    """A call whose connection has broken, and the error that reading from it is."""

    def __next__(self) -> None:
        raise self

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Socket closed"

    def initial_metadata(self) -> tuple:
        return ()
