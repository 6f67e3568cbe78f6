"""The server at its edges, forced with a scripted engine: codes, cancellation, deadlines, failure, draining."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.client import Client
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.serving.generation import SERVICE_NAME
from cluster.wire.statuses import CallError
from cluster.wire.transport import MAX_MESSAGE_BYTES
from runtime.config import Config, SamplingParams
from runtime.errors import ConfigError, InvalidRequestError, ResourceExhaustedError, WorkerError
from runtime.request import FinishReason
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import ServerThread, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

FOREVER = {"max_new_tokens": 10**6}


@pytest.fixture
def engine() -> ScriptedEngine:
    settings = ["server.port=0", "scheduler.max_sequences=2", "scheduler.max_waiting=2", "sampling.max_new_tokens=9"]
    return ScriptedEngine(Config.load(None, settings), step_s=0.002)


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[ServerThread]:
    with serving(engine) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with Client(server.address, retries=0) as client:
        yield client


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def num_live(client: Client) -> int:
    counters = client.server_info().counters
    return counters.num_running + counters.num_waiting


def failure(call: Callable[[], object]) -> CallError:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value


# Answers


def test_a_stream_has_one_response_per_step_and_the_usage_last(client: Client) -> None:
    chunks = list(client.generate("A"))
    assert [chunk.text for chunk in chunks] == ["B", "CD", "EFG", "H", "IJ"]
    assert [chunk.num_accepted for chunk in chunks] == [0, 1, 2, 0, 1]
    assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + [FinishReason.LENGTH]
    assert [chunk.usage is None for chunk in chunks] == [True] * 4 + [False]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.num_prompt_tokens, usage.num_new_tokens, usage.num_steps, usage.num_rows) == (1, 9, 5, 50)
    assert usage.tokens_per_step == 9 / 5
    assert (usage.num_seen_tokens, usage.kept_last, usage.kept_sum) == (10, 0.5, 0.75)
    assert 0 < usage.ttft_s <= usage.latency_s


def test_an_answer_joins_the_stream(client: Client) -> None:
    answer = client.complete("A", request_id="mine")
    assert (answer.request_id, answer.text, answer.run_lengths) == ("mine", "BCDEFGHIJ", (1, 2, 3, 1, 2))
    assert answer.token_ids == tuple(range(66, 75))


def test_a_stop_token_is_listed_but_not_shown(client: Client) -> None:
    answer = client.complete("A", sampling={"stop_token_ids": [ord("F")]})
    assert (answer.text, answer.token_ids[-1], answer.finish_reason) == ("BCDE", ord("F"), FinishReason.STOP)
    assert answer.usage.num_new_tokens == sum(answer.run_lengths) == 5


def test_every_kind_of_prompt_and_every_parameter_arrives(client: Client, engine: ScriptedEngine) -> None:
    seen = []
    engine.validate = lambda request: seen.append(request)  # type: ignore[method-assign]
    sampling = {
        "max_new_tokens": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.1, "seed": 2**63 - 1,
        "stop_token_ids": (7, 8), "ignore_eos": True, "min_new_tokens": 1, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "logit_bias": {3: 1.5}, "stop": ("###",),
        "include_stop": True, "n": 1, "logprobs": 0, "prompt_logprobs": 3,
    }  # fmt: skip
    lookahead = {
        "enabled": False, "window_size": 3, "ngram_size": 4, "guess_set_size": 2, "sources": ("suffix",),
        "row_budget": 50, "pool_from_prompt": False, "pool_from_output": False, "planner": False, "share": False,
    }  # fmt: skip
    client.complete("Ab", sampling=sampling, lookahead=lookahead, request_id="r1")
    client.complete(messages=[{"role": "user", "content": "Ab"}], sampling={"max_new_tokens": 1})
    client.complete(token_ids=[65, 98], lookahead={"window_size": 7})
    text, chat, ids = seen
    assert text.prompt_ids == ids.prompt_ids == (65, 98) and chat.prompt_ids == tuple(b"user:Ab\n")
    assert text.request_id == "r1" and chat.request_id and chat.request_id != ids.request_id
    assert text.sampling.model_dump(include=set(sampling)) == sampling and text.lookahead.model_dump() == lookahead
    forms = {"json_schema", "json_object", "regex", "choice", "grammar"}  # which contradict some of these
    assert set(SamplingParams.model_fields) - set(sampling) == forms
    assert chat.sampling == engine.config.sampling.merged({"max_new_tokens": 1})
    assert chat.lookahead == engine.config.lookahead
    assert ids.lookahead == engine.config.lookahead.merged({"window_size": 7})


def test_streams_run_side_by_side(client: Client, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(client.complete, letter) for letter in "AKUa"]
        eventually(lambda: num_live(client) == 4)
        engine.gate.set()
        assert [answer.result(20).text[:3] for answer in answers] == ["BCD", "LMN", "VWX", "bcd"]


def test_a_reader_that_stops_reading_holds_up_nobody_else(client: Client) -> None:
    with client.generate("A", sampling={"max_new_tokens": 100_000}) as slow:
        next(slow)
        assert client.complete("K").text == "LMNOPQRST"


# Refusals


def generate(client: Client, request: pb.GenerateRequest) -> None:
    try:
        list(client._generation.Generate(request, timeout=20))
    except grpc.RpcError as error:
        raise CallError(client.address, error.code(), error.details() or "") from None


BAD_REQUESTS = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (pb.GenerateRequest(text=""), "text"),
    "no messages": (pb.GenerateRequest(messages=pb.ChatMessages()), "messages"),
    "no token ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
    "unknown token": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 0x3000])), "token_ids"),
    "negative token": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])), "token_ids"),
    "too long": (pb.GenerateRequest(text="A" * 64), "prompt"),
    "no new tokens": (pb.GenerateRequest(text="A", sampling={"max_new_tokens": 0}), "sampling.max_new_tokens"),
    "negative temperature": (pb.GenerateRequest(text="A", sampling={"temperature": -1}), "sampling.temperature"),
    "NaN": (pb.GenerateRequest(text="A", sampling={"temperature": float("nan")}), "sampling.temperature"),
    "top_p of 0": (pb.GenerateRequest(text="A", sampling={"top_p": 0}), "sampling.top_p"),
    "negative seed": (pb.GenerateRequest(text="A", sampling={"seed": -1}), "sampling.seed"),
    "unknown source": (pb.GenerateRequest(text="A", lookahead={"sources": ["oracle"]}), "lookahead.sources"),
    "window of 0": (pb.GenerateRequest(text="A", lookahead={"window_size": 0}), "lookahead.window_size"),
    "budget": (pb.GenerateRequest(text="A", lookahead={"row_budget": 2, "planner": False}), "lookahead.row_budget"),
    "empty id": (pb.GenerateRequest(text="A", request_id=""), "request_id"),
    "long id": (pb.GenerateRequest(text="A", request_id="x" * 129), "request_id"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_invalid_arguments_that_name_the_field(client: Client, name: str) -> None:
    request, field = BAD_REQUESTS[name]
    error = failure(lambda: generate(client, request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details.startswith(field), error.details
    assert client.server_info().counters.requests_by_outcome["refused"] == 1


@pytest.mark.parametrize(
    ("kind", "where"),
    [(pb.GenerateRequest, "request"), (pb.SamplingParams, "sampling"), (pb.ChatMessage, "messages.messages[1]")],
)
def test_fields_of_a_newer_client_are_refused_not_ignored(client: Client, kind: type, where: str) -> None:
    newer = kind.FromString(bytes([0x98, 0x06, 1]))  # field 99, a varint, 1
    request = newer if kind is pb.GenerateRequest else pb.GenerateRequest()
    if kind is pb.ChatMessage:
        request.messages.messages.extend([pb.ChatMessage(role="user", content="A"), newer])
    else:
        request.text = "A"
    if kind is pb.SamplingParams:
        request.sampling.MergeFrom(newer)
    error = failure(lambda: generate(client, request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details.startswith(f"{where} =") and "99" in error.details, error.details


def test_an_id_in_use_already_exists(client: Client) -> None:
    with client.generate("A", sampling=FOREVER, request_id="mine") as stream:
        next(stream)
        error = failure(lambda: client.complete("B", request_id="mine"))
        assert error.code is grpc.StatusCode.ALREADY_EXISTS and "request_id" in error.details
        assert next(stream).text  # the first is none the worse


def test_a_full_queue_exhausts_resources(client: Client, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    streams = [client.generate("A") for _ in range(4)]
    eventually(lambda: num_live(client) == 4)
    error = failure(lambda: client.complete("A"))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "max_waiting" in error.details
    engine.gate.set()
    assert all("".join(chunk.text for chunk in stream) == "BCDEFGHIJ" for stream in streams)


def test_a_message_over_the_limit_is_refused(client: Client) -> None:
    with grpc.insecure_channel(client.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = pb_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(text="A" * (MAX_MESSAGE_BYTES + 1)))
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = failure(lambda: client.complete("A" * (MAX_MESSAGE_BYTES - 100)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT  # it arrives, and is too long for the model


def test_the_client_names_what_it_cannot_send(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling\.temprature.*Known here: .*temperature"):
        client.generate("A", sampling={"temprature": 1})
    with pytest.raises(InvalidRequestError, match=r"sampling\.top_k"):
        client.generate("A", sampling={"top_k": "many"})
    with pytest.raises(InvalidRequestError, match="token_ids"):
        client.generate(token_ids=[2**40])
    with pytest.raises(InvalidRequestError, match="text = .*cannot be sent"):
        client.generate("half of \ud83d")
    with pytest.raises(InvalidRequestError, match="messages"):
        client.generate(messages=[{"role": "user", "contents": "A"}])
    with pytest.raises(InvalidRequestError, match="Give one of"):
        client.generate("A", token_ids=[1])


# Cancellation, deadlines


def test_cancellation_frees_the_sequence(client: Client, engine: ScriptedEngine) -> None:
    stream = client.generate("A", sampling=FOREVER)
    next(stream)
    stream.close()
    assert failure(lambda: list(stream)).code is grpc.StatusCode.CANCELLED
    eventually(lambda: not engine.has_work)
    eventually(lambda: client.server_info().counters.requests_by_outcome["cancelled"] == 1)


def test_cancellation_while_waiting_for_a_slot(client: Client, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    running = [client.generate("A", sampling=FOREVER) for _ in range(2)]
    eventually(lambda: num_live(client) == 2)
    waiting = client.generate("A")
    eventually(lambda: num_live(client) == 3)
    for stream in (waiting, *running):
        stream.close()
    engine.gate.set()
    eventually(lambda: client.server_info().counters.requests_by_outcome["cancelled"] == 3)
    assert not engine.has_work


def test_a_vanished_client_frees_the_sequence(server: ServerThread, client: Client, engine: ScriptedEngine) -> None:
    other = Client(server.address)
    next(other.generate("A", sampling=FOREVER))
    other.close()
    eventually(lambda: not engine.has_work)
    assert client.complete("A").text == "BCDEFGHIJ"


def test_a_deadline_ends_the_stream_and_frees_the_sequence(client: Client, engine: ScriptedEngine) -> None:
    started = time.monotonic()
    error = failure(lambda: list(client.generate("A", sampling=FOREVER, timeout_s=0.3)))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - started < 10
    eventually(lambda: not engine.has_work)
    eventually(lambda: client.server_info().counters.requests_by_outcome["cancelled"] == 1)


# Failure, health, shutdown


def test_workers_that_fail_make_the_server_unavailable(client: Client, engine: ScriptedEngine) -> None:
    stream = client.generate("A", sampling=FOREVER)
    next(stream)
    engine.error = WorkerError("rank 3 is gone")
    error = failure(lambda: list(stream))
    assert error.code is grpc.StatusCode.UNAVAILABLE and "rank 3 is gone" in error.details
    eventually(lambda: not client.is_serving())
    error = failure(lambda: client.complete("A"))
    assert error.code is grpc.StatusCode.UNAVAILABLE and "rank 3 is gone" in error.details
    assert client.server_info().counters.requests_by_outcome["error"] == 1


def test_a_defect_is_internal_and_logged(
    client: Client, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError(" ".join(("a", "bug")))

    engine.make_request = broken  # type: ignore[method-assign, assignment]
    error = failure(lambda: client.complete("A"))
    assert error.code is grpc.StatusCode.INTERNAL and "ZeroDivisionError" in error.details
    assert any(
        "ZeroDivisionError" in record.getMessage() and "in broken" in record.getMessage() for record in caplog.records
    )
    assert "a bug" not in error.details and "a bug" not in caplog.text  # it may be a client's text
    assert client.is_serving()


def test_a_step_with_a_defect_is_internal(client: Client, engine: ScriptedEngine) -> None:
    stream = client.generate("A", sampling=FOREVER)
    next(stream)
    engine.error = IndexError("a bug")
    error = failure(lambda: list(stream))
    assert error.code is grpc.StatusCode.INTERNAL and "IndexError" in error.details
    eventually(lambda: not client.is_serving())


def test_the_engine_refusing_at_the_last_moment_is_not_a_hang(client: Client, engine: ScriptedEngine) -> None:
    engine.refusal = ResourceExhaustedError("scheduler.max_waiting", 2, "no room", "Try again.")
    assert failure(lambda: client.complete("A")).code is grpc.StatusCode.INTERNAL


def test_health_covers_the_server_and_the_service(client: Client) -> None:
    for service in ("", SERVICE_NAME):
        answer = client._health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        client._health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_draining_finishes_live_streams_and_takes_no_new_ones(
    server: ServerThread, client: Client, engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    live = client.generate("A")
    assert engine.stepping.wait(20)
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(1) as threads:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        drained = threads.submit(server.drain, 20)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = failure(lambda: client.complete("A"))
        assert error.code is grpc.StatusCode.UNAVAILABLE and "shutting down" in error.details
        assert not drained.done()
        engine.gate.set()
        assert "".join(chunk.text for chunk in live) == "BCDEFGHIJ"
        drained.result(20)
        watch.cancel()


def test_streams_that_outlast_the_grace_are_told(server: ServerThread, client: Client) -> None:
    stream = client.generate("A", sampling=FOREVER)
    next(stream)
    server.drain(0.05)
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    error = failure(lambda: list(stream))
    assert error.code is grpc.StatusCode.UNAVAILABLE and "shut down" in error.details
    stopper.join(20)
    error = failure(client.server_info)
    assert error.code is grpc.StatusCode.UNAVAILABLE


def test_wait_ready_says_why_it_gave_up(server: ServerThread, client: Client) -> None:
    client.wait_ready(10)
    server.drain(1)
    with pytest.raises(CallError, match="NOT_SERVING"):
        client.wait_ready(0.2)
    with Client("127.0.0.1:1") as nobody, pytest.raises(CallError, match="cannot be reached"):
        nobody.wait_ready(0.2)


def test_a_port_in_use_is_a_config_error(server: ServerThread) -> None:
    port = server.address.rpartition(":")[2]
    engine = ScriptedEngine(Config.load(None, [f"server.port={port}"]))
    with pytest.raises(ConfigError, match=rf"server\.port.*{port}.*0 lets"), serving(engine):
        pass


def test_server_info_describes_the_setup(client: Client, engine: ScriptedEngine) -> None:
    client.complete("A")
    info = client.server_info()
    assert info.version
    assert (info.model.architecture, info.model.dtype, info.model.capacity) == ("LlamaForCausalLM", "float32", 64)
    assert info.model.vocab_size == 0x3000 and info.model.device in ("cpu", "cuda")
    assert (info.mesh.lp, info.mesh.tp, info.mesh.num_workers) == (1, 1, 1)
    assert list(info.lookahead.sources) == list(engine.config.lookahead.sources)
    assert info.lookahead.enabled and not info.lookahead.HasField("row_budget")
    assert info.sampling.max_new_tokens == 9 and info.sampling.HasField("temperature")
    counters = info.counters
    assert dict(counters.requests_by_outcome) == {"length": 1, "refused": 0}
    assert (counters.num_running, counters.num_waiting, counters.num_tokens) == (0, 0, 9)
    assert counters.num_steps >= 5 and counters.uptime_s > 0 and "forward" in counters.seconds_by_phase
