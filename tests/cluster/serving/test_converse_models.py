"""Real models in real conversations: the tokens are those of one request with the whole text, and slots come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.client.client import Client
from cluster.wire.answers import Chunk
from cluster.wire.statuses import CallError
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.request import FinishReason
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

SETTINGS = ["server.port=0", "model.device=cpu", "scheduler.max_sequences=3", "sampling.ignore_eos=true"]
LOOKAHEAD = [
    "lookahead.planner=false",
    "lookahead.window_size=4",
    "lookahead.ngram_size=3",
    "lookahead.guess_set_size=4",
]
SINK = ["cache.policy=sink", "cache.num_sinks=2", "cache.window=24"]
PLAIN = {"enabled": False}
FOREVER = {"max_new_tokens": 480}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine.from_config(Config.load(None, [f"model.path={tiny_model}", *SETTINGS, *LOOKAHEAD])) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    with serving(engine) as server, Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def sink_engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine.from_config(Config.load(None, [f"model.path={tiny_model}", *SETTINGS, *LOOKAHEAD, *SINK])) as engine:
        yield engine


@pytest.fixture(scope="module")
def sink_client(sink_engine: Engine) -> Iterator[Client]:
    with serving(sink_engine) as server, Client(server.address) as client:
        yield client


@pytest.fixture(autouse=True)
def no_slot_leaks(engine: Engine, client: Client) -> Iterator[None]:
    yield
    eventually(lambda: not engine._scheduler.sessions and not engine.has_work)
    assert client.server_info().cache.num_sessions == 0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ids_of(chunks: Iterator[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


TURNS = ["abc abc abc", "and so on", "x", "é 漢字 👋, abc abc"]


@pytest.mark.parametrize("lookahead", [PLAIN, {}], ids=["plain", "lookahead"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 7}], ids=["greedy", "sampled"])
def test_a_turn_gives_what_the_whole_text_gives(
    client: Client, engine: Engine, sampling: dict, lookahead: dict
) -> None:
    sampling = {"max_new_tokens": 15, **sampling}
    text: list[int] = []
    with client.converse() as conversation, client.converse() as company:
        endless = company.ask("abc", sampling=FOREVER)
        for prompt in TURNS:
            text += engine.tokenizer.encode(prompt)
            next(endless)
            answer = ids_of(conversation.ask(prompt, sampling=sampling, lookahead=lookahead))
            assert tuple(answer) == client.complete(token_ids=text, sampling=sampling, lookahead=PLAIN).token_ids
            text += answer


def test_nothing_is_computed_again(client: Client, engine: Engine) -> None:
    with client.converse() as conversation:
        for index, prompt in enumerate(TURNS):
            before = engine.stats.num_rows
            *_, last = conversation.ask(prompt, sampling={"max_new_tokens": 10}, lookahead=PLAIN)
            # The answer's last token is not in the cache yet: it comes with the next turn.
            assert engine.stats.num_rows - before == len(engine.tokenizer.encode(prompt)) + 9 + (index > 0)
            assert last.usage is not None and last.usage.num_prompt_tokens == len(engine.tokenizer.encode(prompt))


def test_messages_follow_the_template(client: Client, engine: Engine) -> None:
    sampling = {"max_new_tokens": 5}
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "abc"}]
    then = [{"role": "user", "content": "def"}]
    with client.converse() as conversation:
        first = ids_of(conversation.ask(messages=messages, sampling=sampling))
        second = ids_of(conversation.ask(messages=then, sampling=sampling))
    text = engine.tokenizer.encode_chat(messages) + first
    assert tuple(first) == client.complete(messages=messages, sampling=sampling).token_ids
    text += engine.tokenizer.encode("\n<|user|>def\n<|assistant|>")
    assert tuple(second) == client.complete(token_ids=text, sampling=sampling).token_ids


def test_a_stopped_answer_stays_in_the_conversation(client: Client, engine: Engine) -> None:
    with client.converse() as conversation:
        answer = conversation.ask("abc", sampling={"max_new_tokens": 400}, lookahead=PLAIN)
        said = list(next(answer).token_ids)
        conversation.stop()
        rest = list(answer)
        said += ids_of(iter(rest))
        assert rest[-1].finish_reason is FinishReason.CANCELLED and 0 < len(said) < 400
        text = engine.tokenizer.encode("abc") + said + engine.tokenizer.encode("def")
        again = ids_of(conversation.ask("def", sampling={"max_new_tokens": 10}))
    assert tuple(again) == client.complete(token_ids=text, sampling={"max_new_tokens": 10}).token_ids


def test_a_conversation_fills_its_cache(client: Client, engine: Engine) -> None:
    with client.converse() as conversation:
        *_, last = conversation.ask("a" * 400, sampling={"max_new_tokens": 1000}, lookahead=PLAIN)
        assert last.finish_reason is FinishReason.LENGTH and last.usage is not None
        assert last.usage.num_new_tokens == 112 and last.usage.kept_last == last.usage.kept_sum == 1
        with pytest.raises(CallError, match=r"RESOURCE_EXHAUSTED.*fills its cache.*cache\.policy=sink"):
            list(conversation.ask("a"))


def test_cancelling_and_vanishing_free_the_slots(client: Client, engine: Engine) -> None:
    for _ in range(3):
        with Client(client.address) as other:
            conversations = [other.converse(), other.converse()]
            for conversation in conversations:
                next(conversation.ask("abc", sampling=FOREVER, lookahead=PLAIN))
            assert len(engine._scheduler.sessions) == 2
            conversations[0]._call.cancel()
        eventually(lambda: not engine._scheduler.sessions and not engine.has_work)


def test_more_conversations_than_slots_one_after_the_other(client: Client) -> None:
    answers = set()
    for _ in range(7):
        with client.converse() as conversation:
            answers.add(tuple(ids_of(conversation.ask("abc", sampling={"max_new_tokens": 5}))))
    assert len(answers) == 1  # nothing of the one before is left in the slot


def test_an_endless_conversation_costs_the_same_per_turn(sink_client: Client, sink_engine: Engine) -> None:
    """30 turns through a window of 24: each runs its own rows only, and each token sees 26."""
    rows, seen, kept = [], [], []
    cache = sink_client.server_info().cache
    assert cache.policy == "sink" and 25 <= cache.max_stored_tokens < 64
    assert cache.bytes_per_sequence == cache.bytes_per_token * cache.max_stored_tokens
    assert cache.bytes_per_token == 3 * 2 * 3 * 8 * 4  # layers, keys and values, heads, head_dim, float32
    assert not cache.HasField("tokens_per_sequence")
    with sink_client.converse() as conversation:
        for index in range(30):
            before = sink_engine.stats.num_rows
            prompt = f"turn {index:02} "
            *_, last = conversation.ask(prompt, sampling={"max_new_tokens": 12}, lookahead=PLAIN)
            assert last.usage is not None and last.finish_reason is FinishReason.LENGTH
            rows.append(sink_engine.stats.num_rows - before)
            seen.append(last.usage.num_seen_tokens)
            kept.append(last.usage.kept_last * last.usage.num_seen_tokens)
    assert set(rows[1:]) == {8 + 12}
    assert seen == [8 + 11 + 20 * index for index in range(30)]
    assert kept[2:] == pytest.approx([26] * 28)
    eventually(lambda: not sink_engine._scheduler.sessions)


def test_eviction_does_not_change_the_tokens_that_lookahead_gives(sink_client: Client) -> None:
    def talk(lookahead: dict) -> list[int]:
        with sink_client.converse() as conversation:
            return [t for p in TURNS * 2 for t in ids_of(conversation.ask(p, sampling=sampling, lookahead=lookahead))]

    sampling: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.5}
    assert talk({}) == talk(PLAIN)


def test_a_turn_too_long_for_eviction_per_turn(tiny_model: Path) -> None:
    settings = [f"model.path={tiny_model}", *SETTINGS, *SINK, "cache.evict=turn"]
    with Engine.from_config(Config.load(None, settings)) as engine:
        with serving(engine) as server, Client(server.address) as client:
            with client.converse() as conversation:
                assert len(ids_of(conversation.ask("abcdef", sampling={"max_new_tokens": 10}))) == 10
                assert len(ids_of(conversation.ask("abcdef", sampling={"max_new_tokens": 10}))) == 10
                with pytest.raises(CallError) as caught:
                    list(conversation.ask("abcdef", sampling={"max_new_tokens": 40}))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT and "max_new_tokens" in caught.value.details


def test_the_embedded_model_converses() -> None:
    """A turn behind an answer that ended by itself continues as the template of the whole conversation does."""
    questions = ["What is the capital of France?", "And of Spain?"]
    messages: list[dict[str, str]] = []
    with Engine.from_config(Config.load(None, ["server.port=0", "model.device=cpu"])) as engine:
        with serving(engine) as server, Client(server.address) as client:
            with client.converse() as conversation:
                for question in questions:
                    messages.append({"role": "user", "content": question})
                    chunks = list(conversation.ask(messages=messages[-1:]))
                    assert chunks[-1].finish_reason is FinishReason.STOP
                    answer = "".join(chunk.text for chunk in chunks)
                    assert client.complete(messages=messages).token_ids == tuple(ids_of(iter(chunks)))
                    messages.append({"role": "assistant", "content": answer})
    assert "Paris" in messages[1]["content"] and "Madrid" in messages[3]["content"]
