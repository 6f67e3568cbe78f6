"""Conversations that keep their cache slot: the tokens are those of one run over the whole text, token by token."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from runtime import Engine, InvalidRequestError, LookaheadConfig, ResourceExhaustedError, SamplingParams, WorkerError
from runtime.engine.loop import EngineLoop
from runtime.engine.session import Session
from runtime.equality import Equality
from runtime.request import FinishReason, StepOutput
from tests.models import save_tiny_model
from tests.oracles import POLICIES, Dense, kept_ratios, seen
from tests.runtime.engine.test_engine import PLAIN

VOCABULARY = 16
SUFFIX = LookaheadConfig(planner=False, sources=("suffix",), row_budget=24)
FIXED = LookaheadConfig(planner=False, window_size=5, ngram_size=4, guess_set_size=5)
GREEDY = SamplingParams(max_new_tokens=14, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=14, ignore_eos=True, temperature=0.7, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Dense]:
    """So few tokens that texts repeat themselves and candidates are accepted."""
    place = save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=VOCABULARY, seed=1)
    return place, Dense(place)


def some_talk(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def cache_of(policy: str, **settings) -> dict:
    cache = POLICIES[policy]
    return cache | ({"separators": (5, 9, 13)} if cache["policy"] == "sep" else {}) | settings


def make_engine(place: Path, cache: dict, **scheduler) -> Engine:
    return Engine.from_config(
        {
            "model": {"path": str(place)},
            "cache": cache,
            "scheduler": {"max_sequences": 3, "max_rows": 48, "max_waiting": 4} | scheduler,
        }
    )


@dataclass
class Talk:
    """A conversation with an engine, and its text."""

    engine: Engine
    session: Session
    text: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    """[start, stop) of each answer in the text."""
    outputs: list[StepOutput] = field(default_factory=list)
    """Of the newest turn."""

    @classmethod
    def start(cls, engine: Engine, session_id: str | None = None) -> Talk:
        return cls(engine, engine.open_session(session_id))

    def ask(self, prompt: list[int], sampling: SamplingParams, lookahead: LookaheadConfig = PLAIN) -> str:
        request = self.engine.make_request(prompt, sampling, lookahead, session=self.session)
        self.engine.add_request(request)
        self.text += prompt
        self.outputs = []
        return request.request_id

    def take(self, outputs: list[StepOutput], request_id: str) -> None:
        for output in outputs:
            if output.request_id == request_id:
                self.outputs.append(output)
                self.session.take(output)

    def finish(self, request_id: str) -> list[int]:
        """Step until the turn has ended; returns its answer."""
        while not (self.outputs and self.outputs[-1].finish_reason):
            self.take(self.engine.step(), request_id)
        return self.end_turn()

    def end_turn(self) -> list[int]:
        answer = [token for output in self.outputs for token in output.token_ids]
        self.answers.append((len(self.text), len(self.text) + len(answer)))
        self.text += answer
        return answer

    def turn(self, prompt: list[int], sampling: SamplingParams, lookahead: LookaheadConfig = PLAIN) -> list[int]:
        return self.finish(self.ask(prompt, sampling, lookahead))

    def divergences(self, dense: Dense, cache: dict, turns: dict[int, int] | None = None) -> list[float]:
        """Where an answer's token is not what the dense model chooses: by how much the logits differ."""
        logits = dense.logits(self.text, seen(cache, self.text, turns))
        positions = [p for start, stop in self.answers for p in range(start - 1, stop - 1)]
        gaps = [float(logits[p].max() - logits[p, self.text[p + 1]]) for p in positions]
        return [gap for gap in gaps if gap > 0]


PROMPTS = [some_talk(length, seed) for seed, length in enumerate((21, 5, 1, 30, 2))]


@pytest.mark.parametrize("lookahead", [PLAIN, FIXED], ids=["off", "on"])
@pytest.mark.parametrize("policy", ["full", "sink", "sink-original", "sep", "streaming", "streaming-after-original"])
def test_a_conversation_is_one_run_over_the_whole_text(model, policy, lookahead) -> None:
    place, dense = model
    cache = cache_of(policy)
    with make_engine(place, cache) as engine:
        talk = Talk.start(engine)
        for prompt in PROMPTS:
            assert len(talk.turn(prompt, GREEDY, lookahead)) == 14
            usage = talk.outputs[-1].usage
            assert (usage.num_prompt_tokens, usage.num_new_tokens) == (len(prompt), 14)
            assert usage.num_seen_tokens == len(talk.text) - 1  # the newest token is stored with the next turn
            kept = kept_ratios(seen(cache, talk.text[: usage.num_seen_tokens]))
            assert (usage.kept_last, usage.kept_sum) == pytest.approx(kept)
        assert talk.session.num_turns == len(PROMPTS) and talk.session.last_token == talk.text[-1]
        divergences = talk.divergences(dense, cache)
        assert all(gap < 1e-4 for gap in divergences) and len(divergences) <= 1
        start, _ = talk.answers[-1]
        alone = engine.generate([talk.text[:start]], GREEDY, PLAIN)[0]
        equality = Equality(dense.gap_under(cache))
        equality.compare(talk.text[:start], talk.text[start:], alone.token_ids)
        assert equality.lossless, equality


@pytest.mark.parametrize("policy", ["full", "sink", "streaming"])
def test_sampled_turns_equal_a_single_request_with_the_same_text(model, policy) -> None:
    """Noise is keyed by the position in the whole text, and lookahead changes none of it."""
    place, _ = model
    with make_engine(place, cache_of(policy)) as engine:
        texts = []
        for lookahead in (PLAIN, SUFFIX):
            talk = Talk.start(engine)
            for prompt in PROMPTS:
                talk.turn(prompt, SAMPLED, lookahead)
            engine.close_session(talk.session)
            texts.append(talk.text)
        assert texts[0] == texts[1]
        start, stop = talk.answers[-1]
        alone = engine.generate([talk.text[:start]], SAMPLED, PLAIN)[0]
        assert list(alone.token_ids) == talk.text[start:stop]


@pytest.mark.parametrize("lookahead", [PLAIN, SUFFIX], ids=["off", "suffix"])
@pytest.mark.parametrize(
    "policy", ["sink", "sink-original", "sink-none", "streaming", "streaming-original", "streaming-recent"]
)
def test_eviction_per_turn_equals_its_oracle(model, policy, lookahead) -> None:
    """A turn makes room for its prompt and the longest answer it may have, and nothing goes while it runs.

    Answers end where they may or, by a stop token, earlier: the next turn finds the same tokens stored,
    whether the last of them came one at a time or as an accepted run.
    """
    place, dense = model
    cache = cache_of(policy, evict="turn")
    size = cache.get("capacity") or cache["num_sinks"] + cache["window"]
    always = cache.get("num_initial", 0) + cache.get("max_separators", 0) + cache.get("local", 0)
    room = size - (always or cache["num_sinks"])
    num_compactions = num_runs = num_stopped = 0
    with make_engine(place, cache) as engine:
        for seed in range(6):
            rng = np.random.default_rng(seed)
            talk, turns = Talk.start(engine), {}
            for _ in range(10):
                num_prompt = int(rng.integers(1, room // 2 + 1))
                num_new = int(rng.integers(1, room - num_prompt + 1))
                stops = tuple(rng.integers(0, VOCABULARY, 2).tolist())
                sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True, stop_token_ids=stops)
                turns[max(len(talk.text) - 1, 0)] = num_prompt + num_new
                answer = talk.turn(rng.integers(0, VOCABULARY, num_prompt).tolist(), sampling, lookahead)
                num_stopped += talk.outputs[-1].finish_reason is FinishReason.STOP
                num_runs += sum(len(output.token_ids) > 1 for output in talk.outputs)
                assert 1 <= len(answer) <= num_new
            engine.close_session(talk.session)
            divergences = talk.divergences(dense, cache, turns)
            assert all(gap < 1e-4 for gap in divergences) and len(divergences) <= 1
            views = seen(cache, talk.text, turns)
            num_compactions += sum(not one.keys() <= other.keys() for one, other in zip(views, views[1:], strict=False))
            assert max(map(len, views[:-1])) <= size  # the text's last token is not stored any more
    assert num_compactions > 10 and num_stopped > 5
    assert lookahead is PLAIN or num_runs > 5


@pytest.mark.parametrize("policy", ["sink", "streaming"])
def test_a_turn_that_eviction_cannot_make_room_for_is_refused(model, policy) -> None:
    place, _ = model
    cache = cache_of(policy, evict="turn")
    with make_engine(place, cache) as engine:
        talk = Talk.start(engine)
        talk.turn([1, 2], SamplingParams(max_new_tokens=2, ignore_eos=True))
        too_long = SamplingParams(max_new_tokens=40)
        with pytest.raises(InvalidRequestError) as error:
            engine.make_request([1, 2], too_long, session=talk.session)
        assert error.value.field == "sampling.max_new_tokens" and error.value.remedy
        talk.turn([3], SamplingParams(max_new_tokens=2, ignore_eos=True))
        assert talk.session.num_turns == 2


def test_conversations_and_requests_in_company(model) -> None:
    """Two conversations and requests of their own, all in the same steps: each as if alone."""
    place, dense = model
    for policy in ("sink", "sep", "streaming"):
        cache = cache_of(policy)
        with make_engine(place, cache, max_sequences=3) as engine:
            talks = [Talk.start(engine), Talk.start(engine)]
            for turn in range(4):
                running = {}
                for index, talk in enumerate(talks):
                    running[talk.ask(some_talk(3 + 9 * index, seed=10 * turn + index), GREEDY, SUFFIX)] = talk
                lone = engine.make_request(some_talk(25, seed=turn), GREEDY, SUFFIX)
                engine.add_request(lone)
                answer = []
                while engine.has_work:
                    outputs = engine.step()
                    for request_id, talk in running.items():
                        talk.take(outputs, request_id)
                    answer += [
                        t for output in outputs if output.request_id == lone.request_id for t in output.token_ids
                    ]
                for talk in talks:
                    assert len(talk.end_turn()) == 14
                alone = engine.generate([lone.prompt_ids], GREEDY, PLAIN)[0]
                equality = Equality(dense.gap_under(cache))
                equality.compare(lone.prompt_ids, alone.token_ids, answer)
                assert equality.lossless
            for talk in talks:
                divergences = talk.divergences(dense, cache)
                assert all(gap < 1e-4 for gap in divergences) and len(divergences) <= 1


# Slots


def test_sessions_hold_slots_and_free_them(model) -> None:
    place, dense = model
    cache = cache_of("sink")
    with make_engine(place, cache, max_sequences=2, max_sessions=2) as engine:
        for round_ in range(3):  # more conversations than slots, one after the other
            talks = [Talk.start(engine, f"{round_}-{index}") for index in range(2)]
            with pytest.raises(ResourceExhaustedError, match="max_sessions"):
                engine.open_session()
            with pytest.raises(InvalidRequestError, match="session"):
                engine.open_session(f"{round_}-0")
            for index, talk in enumerate(talks):
                talk.turn(some_talk(20, seed=round_ + 5 * index), GREEDY, SUFFIX)
                talk.turn(some_talk(3, seed=round_ + 5 * index), GREEDY, SUFFIX)
            waiting = engine.make_request([1, 2, 3], GREEDY)
            engine.add_request(waiting)
            engine.step()
            assert (engine.num_running, engine.num_waiting) == (0, 1)  # both slots are held
            engine.close_session(talks[0].session)
            outputs = []
            while engine.has_work:
                outputs += engine.step()
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            engine.close_session(talks[1].session)
            for talk in talks:
                assert all(gap < 1e-4 for gap in talk.divergences(dense, cache))
        assert len(engine.generate([[1], [2], [3]], GREEDY)) == 3


def test_one_turn_at_a_time(model) -> None:
    place, _ = model
    with make_engine(place, cache_of("sink")) as engine:
        talk = Talk.start(engine)
        request_id = talk.ask([1, 2], GREEDY)
        with pytest.raises(InvalidRequestError) as error:
            engine.add_request(engine.make_request([3], GREEDY, session=talk.session))
        assert error.value.field == "session_id"
        talk.finish(request_id)
        talk.turn([3], GREEDY)
        engine.close_session(talk.session)
        with pytest.raises(InvalidRequestError, match="session_id"):
            engine.add_request(engine.make_request([3], GREEDY, session=talk.session))


def test_a_closed_conversation_ends_its_turn(model) -> None:
    place, _ = model
    with make_engine(place, cache_of("streaming")) as engine:
        talk = Talk.start(engine)
        request_id = talk.ask([1, 2], SamplingParams(max_new_tokens=500, ignore_eos=True))
        for _ in range(30):
            talk.take(engine.step(), request_id)
        engine.close_session(talk.session)
        talk.finish(request_id)
        assert talk.outputs[-1].finish_reason is FinishReason.CANCELLED
        assert not engine.has_work
        assert len(engine.generate([[1], [2], [3], [4]], GREEDY)) == 4


@pytest.mark.parametrize("policy", ["full", "sink", "sep", "streaming"])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
def test_after_a_withdrawn_turn_the_conversation_goes_on(model, policy, num_steps) -> None:
    """Withdrawn while it waits, while its prompt is read, or while it is answered: what has been read stays."""
    place, dense = model
    cache = cache_of(policy)
    long_prompt = some_talk(40, seed=3)
    with make_engine(place, cache, max_rows=24, max_sequences=3) as engine:
        talk = Talk.start(engine)
        talk.turn(some_talk(6, seed=2), GREEDY, SUFFIX)
        before = len(talk.text)
        request_id = talk.ask(long_prompt, SamplingParams(max_new_tokens=400, ignore_eos=True), SUFFIX)
        for _ in range(num_steps):
            talk.take(engine.step(), request_id)
        engine.abort(request_id)
        talk.take(engine.step(), request_id)
        assert talk.outputs[-1].finish_reason is FinishReason.CANCELLED
        answer = talk.end_turn()
        if not answer:  # the conversation has a part of the prompt: the next usage tells how much
            talk.answers.pop()
        second = some_talk(4, seed=5)
        talk.turn(second, GREEDY)
        num_seen = talk.outputs[-1].usage.num_seen_tokens
        num_read = len(long_prompt)
        if not answer:
            num_read = num_seen + 1 - before - len(second) - 14
            assert 0 <= num_read < len(long_prompt) and (num_steps > 0 or num_read == 0)
            del talk.text[before + num_read : before + len(long_prompt)]
            start, stop = talk.answers.pop()
            talk.answers.append((start - len(long_prompt) + num_read, stop - len(long_prompt) + num_read))
        divergences = talk.divergences(dense, cache)
        assert all(gap < 1e-4 for gap in divergences) and len(divergences) <= 1


@pytest.mark.parametrize("policy", ["full", "sep"])
def test_a_turn_that_no_longer_fits_gets_one_output(model, policy) -> None:
    place, dense = model
    cache = cache_of(policy, capacity=48)
    with make_engine(place, cache) as engine:
        talk = Talk.start(engine)
        while True:
            answer = talk.turn(some_talk(5, seed=len(talk.text)), GREEDY, SUFFIX)
            if len(answer) < 14:
                break
        assert talk.outputs[-1].finish_reason is FinishReason.LENGTH
        text = list(talk.text)
        assert all(gap < 1e-4 for gap in talk.divergences(dense, cache))
        assert max(map(len, seen(cache, text))) == 48
        for _ in range(2):
            assert talk.turn([1, 2, 3], GREEDY) == []
            assert len(talk.outputs) == 1 and talk.outputs[0].token_ids == ()
            assert talk.outputs[0].finish_reason is FinishReason.LENGTH
        engine.close_session(talk.session)
        assert len(engine.generate([[1], [2], [3], [4]], GREEDY)) == 4


def test_texts_longer_than_the_engine_remembers(model, monkeypatch) -> None:
    """The coordinator forgets the oldest tokens of an endless text; nothing depends on them."""
    from runtime.lookahead import sequence

    monkeypatch.setattr(sequence, "HISTORY", 20)
    place, dense = model
    cache = cache_of("streaming")
    with make_engine(place, cache) as engine:
        for lookahead in (SUFFIX, FIXED):
            talk = Talk.start(engine)
            for prompt in PROMPTS:
                talk.turn(prompt, GREEDY, lookahead)
            engine.close_session(talk.session)
            divergences = talk.divergences(dense, cache)
            assert all(gap < 1e-4 for gap in divergences) and len(divergences) <= 1


# The engine's thread


def test_conversations_through_the_loop(model) -> None:
    """Turns submitted from the caller's thread, each once the one before has ended."""
    place, dense = model
    cache = cache_of("streaming")
    with make_engine(place, cache) as engine:
        loop = EngineLoop(engine)
        try:
            sessions = [loop.open_session(), loop.open_session("named")]
            with pytest.raises(ResourceExhaustedError, match="max_sessions"):
                loop.open_session()
            assert loop.stats.num_sessions == 2
            talks = [Talk(engine, session) for session in sessions]
            for turn in range(3):
                ended = []
                for index, talk in enumerate(talks):
                    prompt = some_talk(4 + 9 * index, seed=40 + turn)
                    request = engine.make_request(prompt, GREEDY, SUFFIX, session=talk.session)
                    talk.text += prompt
                    talk.outputs, done = [], threading.Event()
                    ended.append(done)
                    loop.submit(request, partial(_take_in_callback, talk, done))
                    if turn == 0 and index == 0:
                        with pytest.raises(InvalidRequestError, match="session_id"):
                            loop.submit(engine.make_request([1], GREEDY, session=talk.session), print)
                for talk, done in zip(talks, ended, strict=True):
                    assert done.wait(30)
                    assert len(talk.end_turn()) == 14
            for talk in talks:
                assert all(gap < 1e-4 for gap in talk.divergences(dense, cache))
            endless = SamplingParams(max_new_tokens=10**6, ignore_eos=True)
            started, done = threading.Event(), threading.Event()
            talks[0].outputs = []
            request = engine.make_request([3], endless, session=sessions[0])
            loop.submit(request, lambda output: (started.set(), _take_in_callback(talks[0], done, output)))
            assert started.wait(30)
            for _ in range(2):
                loop.close_session(sessions[0])
            assert done.wait(30) and talks[0].outputs[-1].finish_reason is FinishReason.CANCELLED
            with pytest.raises(InvalidRequestError, match="session_id"):
                loop.submit(engine.make_request([1], GREEDY, session=sessions[0]), print)
            loop.close_session(sessions[1])
            assert loop.stats.num_sessions == 0
            loop.open_session("named")
        finally:
            loop.close()
        with pytest.raises(WorkerError):
            loop.open_session()


def _take_in_callback(talk: Talk, done: threading.Event, output: StepOutput) -> None:
    talk.outputs.append(output)
    talk.session.take(output)
    if output.finish_reason is not None:
        done.set()


def test_a_conversation_whose_first_turn_never_began_still_begins(tiny_model) -> None:
    """Withdrawn while it waited, the first turn leaves nothing: the next one is encoded as a beginning."""
    messages = [{"role": "user", "content": "hi"}]
    with Engine.from_config({"model": {"path": str(tiny_model)}}) as engine:
        session = engine.open_session()
        request = engine.make_request(messages, session=session)
        engine.add_request(request)
        engine.abort(request.request_id)
        for output in engine.step():
            session.take(output)
        assert output.finish_reason is FinishReason.CANCELLED
        assert engine.make_request(messages, session=session).prompt_ids == request.prompt_ids
