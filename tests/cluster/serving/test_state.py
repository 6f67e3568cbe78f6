"""Conversations outlive their server where it keeps them on disk: after a restart, after a torn write, in the middle of
an answer; and where they cannot be kept, that is said and nothing else happens."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from cluster.client.client import Client
from cluster.serving import state
from cluster.serving.state import SessionStore, TurnRecord, past_of
from cluster.wire.statuses import CallError, LostSessionError
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.errors import ConfigError
from runtime.request import FinishReason, Past, TurnStart
from tests.cluster.cutter import Cutter, cutter
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

TURNS = [
    TurnRecord(5, TurnStart(0, 9), (1, 2, 3, 4, 5, 6, 7), True),
    TurnRecord(3, TurnStart(6, 7), (8, 9), False),
    TurnRecord(2, None, (), False),
    TurnRecord(1, TurnStart(9, 3), (10, 11), True),
]


def store_at(place: Path, max_bytes: int = 1 << 20, identity: str = "it") -> SessionStore:
    return SessionStore(place, max_bytes, identity)


def test_turns_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    log = store.begin("a session")
    for turn in TURNS:
        log.append(turn)
    log.release()
    store.close()
    for count in (4, 3, 1, 0):  # what is behind is taken back, and stays away
        store = store_at(tmp_path)
        log = store.take_up("a session", count)
        assert log.turns == TURNS[:count]
        log.release()
        store.close()
    assert past_of(TURNS) == Past(tuple(range(1, 12)), 5, (TurnStart(0, 9), TurnStart(6, 7), TurnStart(9, 3)), True)
    assert past_of(TURNS[:3]) == Past(tuple(range(1, 10)), 5, (TurnStart(0, 9), TurnStart(6, 7)), False)
    assert past_of(TURNS[2:3]) is None


def test_a_torn_or_damaged_tail_is_cut_and_what_is_whole_is_kept(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    log = store.begin("s")
    sizes = []
    for turn in TURNS:
        log.append(turn)
        sizes.append(log.path.stat().st_size)
    log.release()
    whole = log.path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        cut = draw.randrange(sizes[0], len(whole))
        damaged = bytearray(whole)
        if draw.random() < 0.5:
            del damaged[cut:]
        else:
            damaged[cut] ^= 1 << draw.randrange(8)
        log.path.write_bytes(damaged)
        num_whole = sum(size <= cut for size in sizes)
        with pytest.raises(LostSessionError, match=f"only {num_whole} of its {num_whole + 1} turns"):
            store.take_up("s", num_whole + 1)
        log = store.take_up("s", num_whole)
        assert log.turns == TURNS[:num_whole]
        log.append(TURNS[0])  # it goes on behind what was whole
        log.release()
        log = store.take_up("s", num_whole + 1)
        assert log.turns == [*TURNS[:num_whole], TURNS[0]]
        log.release()
        log.path.write_bytes(whole)


def test_the_session_left_longest_ago_makes_room(tmp_path: Path) -> None:
    store = store_at(tmp_path, max_bytes=1500)
    for name in "abcdefgh":
        log = store.begin(name)
        log.append(TurnRecord(50, TurnStart(0, 60), tuple(range(60)), True))
        log.release()
        os.utime(log.path, ns=(time.time_ns(),) * 2)
    assert store.num_bytes <= 1500
    store.take_up("h", 1).release()
    with pytest.raises(LostSessionError, match="not known"):
        store.take_up("a", 1)
    big = store.begin("big")
    big.append(TurnRecord(1, TurnStart(0, 999), tuple(range(900)), True))
    assert not big.is_good and not big.path.exists()
    store.close()
    assert store_at(tmp_path, max_bytes=1500).num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.turns"))


def test_whose_sessions_they_are_is_checked(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.begin("s").release()
    with pytest.raises(ConfigError, match="server that is running"):
        store_at(tmp_path)
    store.close()
    other = store_at(tmp_path, identity="another model")
    with pytest.raises(LostSessionError, match="another model or cache"):
        other.take_up("s", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir"):
        store_at(tmp_path / "file")


POLICIES = {
    "full": ["cache.policy=full"],
    "sink per turn": ["cache.policy=sink", "cache.num_sinks=2", "cache.window=60", "cache.evict=turn"],
}
SAMPLING = {"max_new_tokens": 16, "temperature": 1.0, "seed": 2, "top_k": 50}
QUESTIONS = ["First question", "Second é", "Third one", "And the last of them"]


def make_engine(model: Path, *settings: str) -> Engine:
    common = [f"model.path={model}", "server.port=0", "scheduler.max_sequences=3", "scheduler.max_sessions=3"]
    return Engine.from_config(Config.load(None, [*common, *settings]))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_conversation_survives_its_server(tiny_model: Path, tmp_path: Path, policy: str) -> None:
    """Its server is another one behind each turn and in the middle of each answer; client and answers do not notice."""
    settings = [*POLICIES[policy], f"server.state_dir={tmp_path}"]
    with make_engine(tiny_model, *settings) as engine, serving(engine) as server:
        with Client(server.address) as client, client.converse() as talk:
            expected = [list(talk.ask(question, sampling=SAMPLING)) for question in QUESTIONS]
        assert not list(tmp_path.glob("*.turns"))  # its client has ended it
    with Restarted(tiny_model, *settings) as server, Client(server.address) as client:
        client.wait_ready()
        talk = client.converse()
        for number, question in enumerate(QUESTIONS):
            if number:
                server.restart()
            answer = talk.ask(question, sampling=SAMPLING)
            chunks = [next(answer) for _ in range(number)]
            if number < 3:
                server.restart()
            chunks += answer
            for field in ("token_ids", "text"):
                assert joined(chunks, field) == joined(expected[number], field)
            assert chunks[-1].usage.num_seen_tokens == expected[number][-1].usage.num_seen_tokens
            assert chunks[-1].usage.kept_sum == expected[number][-1].usage.kept_sum
        assert len(list(tmp_path.glob("*.turns"))) == 1
        talk.close()
        assert not list(tmp_path.glob("*.turns"))


class Restarted:
    """A server that can become another one behind the same address, with none of the first one's memory but its
    disk."""

    def __init__(self, model: Path, *settings: str) -> None:
        self._start = lambda: make_engine(model, *settings)
        self._stack = ExitStack()

    def __enter__(self) -> Restarted:
        self._between = Cutter(self._serve())
        self.address = self._between.address
        return self

    def _serve(self) -> str:
        return self._stack.enter_context(serving(self._stack.enter_context(self._start()))).address

    def restart(self) -> None:
        self._between.refuses = True
        self._between.cut()
        self._stack.close()
        self._between.target = self._serve()
        self._between.refuses = False

    def __exit__(self, *_: object) -> None:
        self._between.close()
        self._stack.close()


def joined(chunks: list, field: str) -> list:
    return [item for chunk in chunks for item in getattr(chunk, field)]


def test_a_stopped_turn_is_part_of_what_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    long = SAMPLING | {"max_new_tokens": 60}
    with Restarted(tiny_model, f"server.state_dir={tmp_path}") as server, Client(server.address) as client:
        talk = client.converse("mine")
        answer = talk.ask("One", sampling=long)
        said = list(next(answer).token_ids)
        talk.stop()
        *rest, last = answer
        said += joined([*rest, last], "token_ids")
        assert last.finish_reason is FinishReason.CANCELLED
        server.restart()
        after = joined(list(talk.ask("Two", sampling=SAMPLING)), "token_ids")
        talk.close()
    with make_engine(tiny_model) as engine:
        prompt = [*engine.tokenizer.encode("One"), *said, *engine.tokenizer.encode("Two", add_special_tokens=False)]
        assert tuple(after) == engine.generate([prompt], SAMPLING)[0].token_ids


def test_a_full_disk_costs_the_log_and_not_the_conversation(tiny_model, tmp_path, monkeypatch, caplog) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with make_engine(tiny_model, f"server.state_dir={tmp_path}") as engine, serving(engine) as server:
        with Client(server.address) as client, client.converse() as talk, caplog.at_level(logging.WARNING):
            list(talk.ask("One", sampling=SAMPLING))
            monkeypatch.setattr(state.os, "write", no_space)
            second = list(talk.ask("Two", sampling=SAMPLING))
            third = list(talk.ask("Three", sampling=SAMPLING))
            assert second[-1].usage and third[-1].usage and not talk._is_kept
    assert caplog.text.count("will not be there after a restart") == 1 and "No space left" in caplog.text
    assert not list(tmp_path.glob("*.turns"))


def test_without_a_state_dir_the_end_of_the_server_is_an_error(tiny_model: Path) -> None:
    with make_engine(tiny_model) as engine, serving(engine) as server, cutter(server.address) as between:
        with Client(between.address) as client:
            talk = client.converse()
            answer = talk.ask("One", sampling=SAMPLING | {"max_new_tokens": 400})
            next(answer)
            between.cut()
            with pytest.raises(CallError) as caught:
                list(answer)
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_lost_session_is_said_to_be_lost(tiny_model: Path, tmp_path: Path) -> None:
    with make_engine(tiny_model, f"server.state_dir={tmp_path}") as engine, serving(engine) as server:
        with cutter(server.address) as between, Client(between.address) as client:
            talk = client.converse()
            list(talk.ask("One", sampling=SAMPLING))
            between.refuses = True
            between.cut()
            (path,) = tmp_path.glob("*.turns")
            deadline = time.monotonic() + 10
            while server.service._conversations and time.monotonic() < deadline:
                time.sleep(0.01)
            path.unlink()
            threading.Timer(0.2, setattr, (between, "refuses", False)).start()
            with pytest.raises(CallError, match="not known here") as caught:
                list(talk.ask("Two", sampling=SAMPLING))
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
