"""Conversations at their edges, forced with a scripted engine: order, stops, refusals, time-outs, and no slot leaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from cluster.client.client import Client
from cluster.client.conversation import Conversation
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.serving.converse import MAX_UNANSWERED_TURNS
from cluster.wire.statuses import CallError
from cluster.wire.transport import MAX_MESSAGE_BYTES
from runtime.config import Config
from runtime.errors import InvalidRequestError, WorkerError
from runtime.request import FinishReason
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import ServerThread, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

FOREVER = {"max_new_tokens": 10**6}
IDLE_S = 2.0


@pytest.fixture
def engine() -> ScriptedEngine:
    settings = ["server.port=0", "scheduler.max_sequences=3", "sampling.max_new_tokens=3"]
    engine = ScriptedEngine(Config.load(None, [*settings, f"server.session_idle_timeout_s={IDLE_S}"]), step_s=0.002)
    engine.capacity = 10**9
    return engine


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[ServerThread]:
    with serving(engine) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def client(server: ServerThread, engine: ScriptedEngine) -> Iterator[Client]:
    with Client(server.address, retries=0) as client:
        yield client
        if is_up(client):  # else the engine has ended
            eventually(lambda: not engine.sessions and not engine.has_work)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_up(client: Client) -> bool:
    try:
        return client.is_serving()
    except CallError:
        return False


def text_of(chunks: Iterator[Any]) -> str:
    return "".join(chunk.text for chunk in chunks)


def failure(call: Callable[[], object]) -> CallError:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value


def turn(text: str, **sampling: Any) -> pb.ConverseRequest:
    return pb.ConverseRequest(turn=pb.Turn(text=text, sampling=sampling))


STOP = pb.ConverseRequest(stop=pb.StopTurn())


class RawCall:
    """A call whose messages the test writes itself."""

    def __init__(self, client: Client, *messages: pb.ConverseRequest, open_: bool = False) -> None:
        self.done = threading.Event()
        if not open_:
            self.done.set()
        self.responses: list[pb.ConverseResponse] = []
        self._messages = messages
        self.call = client._generation.Converse(self._requests(), timeout=20)

    def _requests(self) -> Iterator[pb.ConverseRequest]:
        yield from self._messages
        self.done.wait(20)

    def read(self) -> grpc.StatusCode:
        """Everything up to the status."""
        try:
            for response in self.call:
                self.responses.append(response)
        except grpc.RpcError:
            pass
        finally:
            self.done.set()
        return self.call.code()

    @property
    def texts(self) -> list[str]:
        """The answers by turn."""
        answers = [""] * (1 + max((response.turn_index for response in self.responses), default=-1))
        for response in self.responses:
            answers[response.turn_index] += response.text
        return answers


# Turns


def test_turns_append_to_what_the_conversation_holds(client: Client, engine: ScriptedEngine) -> None:
    with client.converse() as conversation:
        first = list(conversation.ask("A"))
        assert [chunk.text for chunk in first] == ["B", "CD"]
        assert [chunk.num_accepted for chunk in first] == [0, 1]
        assert [chunk.finish_reason for chunk in first] == [None, FinishReason.LENGTH]
        assert text_of(conversation.ask("Kx")) == "LMN"
        (held,) = engine.sessions.values()
        assert "".join(map(chr, held)) == "ABCDKxLMN"
        chunks = list(conversation.ask("a"))
        usage = chunks[-1].usage
        assert usage is not None and [chunk.usage is None for chunk in chunks] == [True, False]
        assert (usage.num_prompt_tokens, usage.num_new_tokens, usage.num_seen_tokens) == (1, 3, 13)
        assert (usage.kept_last, usage.kept_sum) == (0.5, 0.75)
    assert {chunk.request_id for chunk in (*first, *chunks)} == {
        f"{conversation.session_id}#0",
        f"{conversation.session_id}#2",
    }


def test_every_kind_of_prompt_and_the_parameters_of_each_turn(client: Client, engine: ScriptedEngine) -> None:
    seen = []
    engine.validate = lambda request: seen.append(request)  # type: ignore[method-assign]
    message = {"role": "user", "content": "A"}
    sampling, lookahead = {"max_new_tokens": 1, "seed": 5}, {"window_size": 3}
    with client.converse() as conversation:
        list(conversation.ask(messages=[message], sampling=sampling, lookahead=lookahead))
        list(conversation.ask(messages=[message]))
        list(conversation.ask(token_ids=[65]))
    chat, later, ids = seen
    assert chat.prompt_ids == tuple(b"user:A\n") and later.prompt_ids == tuple(b"|user:A\n") and ids.prompt_ids == (65,)
    assert chat.sampling == engine.config.sampling.merged(sampling)
    assert chat.lookahead == engine.config.lookahead.merged(lookahead)
    assert later.sampling == ids.sampling == engine.config.sampling
    assert {request.session_id for request in seen} == {conversation.session_id}


def test_a_session_may_be_named(client: Client) -> None:
    with client.converse(session_id="mine") as named, client.converse() as other:
        assert next(named.ask("A")).request_id == "mine#0"
        assert next(other.ask("A")).request_id != "mine#0"
        with client.converse(session_id="mine") as third:
            error = failure(lambda: list(third.ask("B")))
        assert error.code is grpc.StatusCode.ALREADY_EXISTS and "session_id" in error.details
        assert text_of(named.ask("K")) == "LMN"


def test_turns_sent_ahead_are_answered_in_order(client: Client, engine: ScriptedEngine) -> None:
    """And closing the request stream ends the conversation once they are."""
    call = RawCall(client, turn("A"), turn("K"), turn("a"))
    assert call.read() is grpc.StatusCode.OK
    assert call.texts == ["BCD", "LMN", "bcd"]
    assert [response.finish_reason for response in call.responses] == [0, pb.FINISH_REASON_LENGTH] * 3
    assert client.server_info().cache.num_sessions == 0


def test_too_many_turns_at_once(server: ServerThread, client: Client, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    call = RawCall(client, *(turn("A") for _ in range(MAX_UNANSWERED_TURNS + 1)))
    assert engine.stepping.wait(20)
    (conversation,) = server.service._conversations
    eventually(lambda: conversation._inbox.qsize() == MAX_UNANSWERED_TURNS)  # all have been read; one runs
    engine.gate.set()
    assert call.read() is grpc.StatusCode.RESOURCE_EXHAUSTED and "Read their answers" in call.call.details()
    assert call.texts == ["BCD"] * MAX_UNANSWERED_TURNS


def test_conversations_and_requests_run_side_by_side(client: Client) -> None:
    with client.converse() as one, client.converse() as two:
        first, second = one.ask("A", sampling=FOREVER), two.ask("K", sampling=FOREVER)
        assert (next(first).text, next(second).text) == ("B", "L")
        assert client.complete("a").text == "bcd"
        assert client.server_info().cache.num_sessions == 2


# Stops


def test_a_stop_ends_the_turn_and_not_the_conversation(client: Client, engine: ScriptedEngine) -> None:
    with client.converse() as conversation:
        answer = conversation.ask("A", sampling=FOREVER)
        start = next(answer).text
        conversation.stop()
        rest = list(answer)
        assert rest[-1].finish_reason is FinishReason.CANCELLED and rest[-1].usage is not None
        said = start + text_of(iter(rest))
        assert rest[-1].usage.num_new_tokens == len(said)
        conversation.stop()  # nothing runs: nothing happens
        assert text_of(conversation.ask("K")) == "LMN"
        (held,) = engine.sessions.values()
        assert "".join(map(chr, held)) == f"A{said}KLMN"


def test_a_stop_ends_what_waits_too_but_not_what_follows(client: Client) -> None:
    call = RawCall(client, turn("A", max_new_tokens=10**6), turn("B"), turn("C"), STOP, STOP, turn("K"))
    assert call.read() is grpc.StatusCode.OK
    ends = [response.finish_reason for response in call.responses if response.HasField("usage")]
    assert ends == [pb.FINISH_REASON_CANCELLED] * 3 + [pb.FINISH_REASON_LENGTH]
    assert call.texts[1:] == ["", "", "LMN"]


def test_asking_again_stops_what_is_left_of_the_answer(client: Client) -> None:
    with client.converse() as conversation:
        unread = conversation.ask("A", sampling=FOREVER)
        next(unread)
        assert text_of(conversation.ask("K")) == "LMN"
        assert list(unread) == []


def test_what_cannot_be_sent_does_not_end_the_conversation(client: Client) -> None:
    with client.converse() as conversation:
        with pytest.raises(InvalidRequestError, match=r"sampling\.temprature"):
            conversation.ask("A", sampling={"temprature": 1})
        with pytest.raises(InvalidRequestError, match="Give one of"):
            conversation.ask()
        assert text_of(conversation.ask("A")) == "BCD"


# Refusals

NEWER = bytes([0x98, 0x06, 1])  # field 99, a varint, 1

BAD_MESSAGES = {
    "nothing": (pb.ConverseRequest(), "event"),
    "no prompt": (pb.ConverseRequest(turn=pb.Turn()), "prompt"),
    "empty text": (turn(""), "text"),
    "no messages": (pb.ConverseRequest(turn=pb.Turn(messages=pb.ChatMessages())), "messages"),
    "no token ids": (pb.ConverseRequest(turn=pb.Turn(token_ids=pb.TokenIds())), "token_ids"),
    "unknown token": (pb.ConverseRequest(turn=pb.Turn(token_ids=pb.TokenIds(ids=[0x3000]))), "token_ids"),
    "no new tokens": (turn("A", max_new_tokens=0), "sampling.max_new_tokens"),
    "NaN": (turn("A", temperature=float("nan")), "sampling.temperature"),
    "window of 0": (pb.ConverseRequest(turn=pb.Turn(text="A", lookahead={"window_size": 0})), "lookahead.window_size"),
    "empty id": (pb.ConverseRequest(turn=pb.Turn(text="A"), session_id=""), "session_id"),
    "long id": (pb.ConverseRequest(stop=pb.StopTurn(), session_id="x" * 129), "session_id"),
    "newer message": (pb.ConverseRequest.FromString(NEWER), "request = 'field 99'"),
    "newer turn": (pb.ConverseRequest(turn=pb.Turn.FromString(NEWER)), "turn = 'field 99'"),
    "newer stop": (pb.ConverseRequest(stop=pb.StopTurn.FromString(NEWER)), "stop = 'field 99'"),
    "newer sampling": (
        pb.ConverseRequest(turn=pb.Turn(text="A", sampling=pb.SamplingParams.FromString(NEWER))),
        "turn.sampling = 'field 99'",
    ),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_invalid_arguments_that_name_the_field(client: Client, name: str) -> None:
    message, field = BAD_MESSAGES[name]
    first = RawCall(client, message, open_=True)
    assert first.read() is grpc.StatusCode.INVALID_ARGUMENT and first.call.details().startswith(field)
    later = RawCall(client, turn("A"), message, turn("B"), open_=True)  # after the answer before it
    assert later.read() is grpc.StatusCode.INVALID_ARGUMENT and later.call.details().startswith(field)
    assert later.texts == ["BCD"]
    info = client.server_info()
    assert info.cache.num_sessions == 0 and info.counters.requests_by_outcome["refused"] == 2


def test_the_session_is_named_once(client: Client) -> None:
    again = pb.ConverseRequest(turn=pb.Turn(text="A"), session_id="mine")
    call = RawCall(client, again, again, open_=True)
    assert call.read() is grpc.StatusCode.INVALID_ARGUMENT and "first message only" in call.call.details()
    assert call.texts == ["BCD"]


@pytest.mark.parametrize("later", [False, True])
def test_bytes_that_are_no_message(client: Client, later: bool) -> None:
    messages = [turn("A").SerializeToString()] * later + [b"\xff\xff garbage"]
    with grpc.insecure_channel(client.address) as channel:
        call = channel.stream_stream("/outrider.v1.GenerationService/Converse")(iter(messages), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.complete("A").text == "BCD"


@pytest.mark.parametrize("later", [False, True])
def test_a_message_over_the_limit(client: Client, later: bool) -> None:
    messages = [turn("A", **FOREVER)] * later + [turn("A" * (MAX_MESSAGE_BYTES + 1))]
    with grpc.insecure_channel(client.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = pb_grpc.GenerationServiceStub(channel).Converse(iter(messages), timeout=20)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_that_says_nothing(client: Client) -> None:
    assert RawCall(client).read() is grpc.StatusCode.OK
    call = RawCall(client, open_=True)
    assert call.read() is grpc.StatusCode.DEADLINE_EXCEEDED and "session_idle_timeout_s" in call.call.details()


def test_all_sessions_taken(client: Client) -> None:
    with client.converse() as one:
        with client.converse() as two:
            assert text_of(one.ask("A")) == text_of(two.ask("A")) == "BCD"
            with client.converse() as three:
                error = failure(lambda: list(three.ask("A")))
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "scheduler.max_sessions = 2" in error.details and "Try again later" in error.details
            assert failure(lambda: list(three.ask("A"))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text_of(two.ask("K")) == "LMN"
        with client.converse() as four:  # the slot is free once the second is closed
            assert text_of(four.ask("A")) == "BCD"


def test_a_conversation_that_fills_its_cache(client: Client, engine: ScriptedEngine) -> None:
    engine.capacity = 8
    with client.converse() as conversation:
        assert text_of(conversation.ask("A")) == "BCD"
        error = failure(lambda: list(conversation.ask("Klmn")))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "cache.capacity = 8: the conversation fills its cache" in error.details
    assert "cache.policy=sink" in error.details and "sep" in error.details


# Ends


def test_cancellation_in_mid_turn_frees_the_slot(client: Client, engine: ScriptedEngine) -> None:
    conversation = client.converse()
    answer = conversation.ask("A", sampling=FOREVER)
    next(answer)
    conversation._call.cancel()
    assert failure(lambda: list(answer)).code is grpc.StatusCode.CANCELLED
    eventually(lambda: not engine.sessions and not engine.has_work)
    assert failure(lambda: list(conversation.ask("A"))).code is grpc.StatusCode.CANCELLED
    eventually(lambda: client.server_info().counters.requests_by_outcome["cancelled"] == 1)


def test_cancellation_between_turns_frees_the_slot(client: Client, engine: ScriptedEngine) -> None:
    conversation = client.converse()
    list(conversation.ask("A"))
    conversation._call.cancel()
    eventually(lambda: not engine.sessions)


def test_a_vanished_client_frees_the_slot(server: ServerThread, client: Client, engine: ScriptedEngine) -> None:
    other = Client(server.address)
    running, idle = other.converse(), other.converse()
    next(running.ask("A", sampling=FOREVER))
    list(idle.ask("A"))
    assert len(engine.sessions) == 2
    other.close()
    eventually(lambda: not engine.sessions and not engine.has_work)
    assert client.server_info().cache.num_sessions == 0


def test_closing_in_mid_turn_ends_the_turn(client: Client, engine: ScriptedEngine) -> None:
    conversation = client.converse()
    next(conversation.ask("A", sampling=FOREVER))
    started = time.monotonic()
    conversation.close()
    assert time.monotonic() - started < 5 and client.server_info().cache.num_sessions == 0
    conversation.close()
    assert failure(lambda: list(conversation.ask("A"))).code is grpc.StatusCode.CANCELLED


def test_leaving_without_a_turn(client: Client) -> None:
    with client.converse():
        pass


@pytest.mark.parametrize("sampling", [FOREVER, {}], ids=["mid-turn", "between turns"])
def test_a_deadline_ends_the_conversation(client: Client, engine: ScriptedEngine, sampling: dict) -> None:
    conversation = client.converse(timeout_s=0.5)
    next(conversation.ask("A", sampling=sampling))
    time.sleep(0.6)
    error = failure(lambda: list(conversation.ask("A")))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: not engine.sessions and not engine.has_work)


def test_an_idle_session_is_closed(client: Client, engine: ScriptedEngine) -> None:
    conversation = client.converse()
    started = time.monotonic()
    for _ in range(6):  # turns keep it open
        list(conversation.ask("A"))
        time.sleep(IDLE_S / 5)
    assert time.monotonic() - started > IDLE_S and engine.sessions
    eventually(lambda: not engine.sessions)
    error = failure(lambda: list(conversation.ask("A")))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "server.session_idle_timeout_s" in error.details and f"{IDLE_S:g} s" in error.details


def test_a_long_turn_is_not_idle(client: Client, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with client.converse() as conversation:
        answer = conversation.ask("A")
        time.sleep(IDLE_S * 1.25)
        engine.gate.set()
        assert text_of(answer) == "BCD"


def test_responses_that_nobody_reads_do_not_hold_the_slot(client: Client, engine: ScriptedEngine) -> None:
    engine.step_s = 0.0
    message = pb.ConverseRequest(turn=pb.Turn(text="A", sampling=FOREVER), session_id="x" * 128)
    with grpc.insecure_channel(client.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:  # a small window
        call = pb_grpc.GenerationServiceStub(channel).Converse(iter([message]), timeout=40)
        eventually(lambda: bool(engine.sessions))
        assert client.complete("K").text == "LMN"
        eventually(lambda: not engine.sessions and not engine.has_work)
        with pytest.raises(grpc.RpcError, match="not read"):
            list(call)
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# Failure, shutdown


def test_workers_that_fail(client: Client, engine: ScriptedEngine) -> None:
    idle, running = client.converse(), client.converse()
    list(idle.ask("A"))
    answer = running.ask("A", sampling=FOREVER)
    next(answer)
    engine.error = WorkerError("rank 3 is gone")
    for call in (lambda: list(answer), lambda: list(idle.ask("K"))):
        error = failure(call)
        assert error.code is grpc.StatusCode.UNAVAILABLE and "rank 3 is gone" in error.details
    assert client.server_info().cache.num_sessions == 0


def test_a_defect_is_internal_and_logged(
    client: Client, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    working, engine.make_request = engine.make_request, broken  # type: ignore[method-assign, assignment]
    with client.converse() as conversation:
        error = failure(lambda: list(conversation.ask("A")))
    assert error.code is grpc.StatusCode.INTERNAL and "ZeroDivisionError" in error.details
    assert any("ZeroDivisionError" in record.getMessage() for record in caplog.records)
    engine.make_request = working  # type: ignore[method-assign]
    with client.converse() as conversation:
        assert text_of(conversation.ask("A")) == "BCD"


def test_draining_answers_the_running_turn(server: ServerThread, client: Client, engine: ScriptedEngine) -> None:
    with client.converse() as idle:
        list(idle.ask("A"))
        engine.gate.clear()
        engine.stepping.clear()
        running = RawCall(client, turn("A"), turn("K"), open_=True)
        assert engine.stepping.wait(20)
        drained = threading.Thread(target=server.drain, args=(20,))
        drained.start()
        error = failure(lambda: list(idle.ask("A")))
        assert error.code is grpc.StatusCode.UNAVAILABLE and "shutting down" in error.details
        with client.converse() as late:
            assert failure(lambda: list(late.ask("A"))).code is grpc.StatusCode.UNAVAILABLE
        assert drained.is_alive()
        engine.gate.set()
        assert running.read() is grpc.StatusCode.UNAVAILABLE and "shutting down" in running.call.details()
        assert running.texts == ["BCD"]
        drained.join(20)


def test_turns_that_outlast_the_grace_are_told(server: ServerThread, client: Client) -> None:
    conversation: Conversation = client.converse()
    answer = conversation.ask("A", sampling=FOREVER)
    next(answer)
    server.drain(0.05)
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    error = failure(lambda: list(answer))
    assert error.code is grpc.StatusCode.UNAVAILABLE and "shut down" in error.details
    stopper.join(20)


def test_server_info_reports_the_cache(client: Client) -> None:
    with client.converse() as conversation:
        list(conversation.ask("A"))
        cache = client.server_info().cache
    assert (cache.policy, cache.bytes_per_token, cache.bytes_per_sequence) == ("full", 100, 6400)
    assert (cache.bytes_staged, cache.num_slots, cache.max_sessions, cache.num_sessions) == (51200, 3, 2, 1)
    assert cache.HasField("tokens_per_sequence")


def test_a_stream_of_many_messages_stalls_nobody(server: ServerThread, client: Client) -> None:
    stops = [STOP] * 200
    with grpc.insecure_channel(server.address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).Converse(iter(stops), timeout=20)
        assert client.complete("A").text == "BCD"
        assert list(call) == [] and call.code() is grpc.StatusCode.OK
