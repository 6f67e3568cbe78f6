"""Answers and conversations that are read again go on as if nothing had happened: after the caller comes back with the
tokens that it has, after the workers' caches were lost, and after an engine was started anew."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from runtime import Engine, InvalidRequestError, LookaheadConfig, SamplingParams
from runtime.lookahead import sequence
from runtime.request import AnswerSoFar, FinishReason, Past, Request, StepOutput, forks
from runtime.stops import AnswerText
from runtime.workers.executor import LocalExecutor
from tests.models import save_tiny_model
from tests.oracles import POLICIES

VOCABULARY = 16
PLAIN = LookaheadConfig(enabled=False)
AHEAD = LookaheadConfig(planner=False, window_size=5, ngram_size=4, row_budget=40)
LENGTH = 40
GREEDY = SamplingParams(max_new_tokens=LENGTH, ignore_eos=True)
SAMPLED = SamplingParams(
    max_new_tokens=LENGTH,
    ignore_eos=True,
    temperature=0.9,
    top_p=0.95,
    seed=11,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.4,
    logit_bias={3: 1.0},
    stop_token_ids=(7,),
    min_new_tokens=30,
)
PER_TURN = {
    "sink-turn": {"policy": "sink", "num_sinks": 2, "window": 38, "evict": "turn"},
    "streaming-turn": POLICIES["streaming"] | {"capacity": 54, "evict": "turn"},
}
"""Of which three turns of the talk below fill more than the cache."""
CACHES = POLICIES | PER_TURN
USUAL = ("full", "sink", "sep", "streaming", "streaming-after-original", *PER_TURN)
POLICY = [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in CACHES]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """So few tokens that texts repeat themselves and candidates are accepted."""
    return save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=VOCABULARY, seed=1)


def make_engine(place: Path, policy: str = "full", **scheduler) -> Engine:
    cache = CACHES[policy]
    return Engine.from_config(
        {
            "model": {"path": str(place)},
            "cache": cache | ({"separators": (5, 9, 13)} if cache["policy"] == "sep" else {}),
            "scheduler": {"max_sequences": 3, "max_rows": 48, "max_waiting": 4} | scheduler,
        }
    )


def some_prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def run(engine: Engine, request: Request) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    engine.add_request(request)
    while not (outputs and outputs[-1].finish_reason):
        outputs += engine.step()
    return outputs


def tokens(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(engine: Engine, request: Request, outputs: list[StepOutput]) -> str:
    shown = AnswerText(engine.tokenizer, request.prompt_ids, request.sampling, request.resume_from)
    return "".join(map(shown.push, outputs))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", [param for param in POLICY if param.values[0] not in PER_TURN])
def test_the_rest_of_a_resumed_answer_is_the_rest_of_the_answer(small_model, policy, sampling) -> None:
    draw = random.Random(policy)
    prompt = some_prompt(23, seed=2)
    with make_engine(small_model, policy) as engine:
        whole = tokens(outputs := run(engine, engine.make_request(prompt, sampling, PLAIN)))
        usage = outputs[-1].usage
        for cut in (1, len(whole) - 1, *draw.sample(range(2, len(whole) - 1), 3)):
            for lookahead in (PLAIN, AHEAD):
                so_far = [AnswerSoFar(tuple(whole[:cut]))]
                resumed = run(engine, engine.make_request(prompt, sampling, lookahead, so_far=so_far))
                assert tokens(resumed) == whole[cut:]
                last = resumed[-1]
                assert last.finish_reason is outputs[-1].finish_reason
                assert (last.usage.num_new_tokens, last.usage.num_resumed_tokens) == (len(whole), cut)
                assert last.usage.num_seen_tokens == usage.num_seen_tokens
                assert (last.usage.kept_last, last.usage.kept_sum) == (usage.kept_last, usage.kept_sum)


@pytest.mark.parametrize("lookahead", [PLAIN, AHEAD], ids=["off", "on"])
@pytest.mark.parametrize("policy", POLICY)
def test_caches_that_are_lost_in_the_middle_of_a_conversation_change_nothing(
    small_model, policy, lookahead, monkeypatch
):
    """Three turns, alone and beside a second conversation, whose caches are lost at random steps: while a prompt is
    read, while it is read again, and between turns."""
    monkeypatch.setattr(sequence, "HISTORY", 20)  # what was forgotten is read again, too
    turns = [(some_prompt(21, 3), GREEDY), (some_prompt(5, 4), SAMPLED), (some_prompt(13, 5), GREEDY)]
    short = [(p, s.model_copy(update={"max_new_tokens": 17, "min_new_tokens": 0})) for p, s in turns]

    def talk(lose: random.Random | None) -> tuple[list[list[int]], Past]:
        with make_engine(small_model, policy, max_rows=16) as engine:
            sessions = [engine.open_session() for _ in range(2)]
            answers = []
            for prompt, sampling in short:
                requests = [engine.make_request(prompt, sampling, lookahead, session=session) for session in sessions]
                found: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
                for request in requests:
                    engine.add_request(request)
                faults = lose.sample(range(1, 20), 3) if lose is not None else ()
                for number in itertools.takewhile(lambda _: engine.has_work, itertools.count()):
                    if number in faults:
                        lose_caches(engine)
                    for output in engine.step():
                        found[output.request_id].append(output)
                        sessions[output.request_id == requests[1].request_id].take(output)
                if lose is not None:
                    lose_caches(engine)
                answers += [tokens(outputs) for outputs in found.values()]
            kept = engine._scheduler.sessions[sessions[0].session_id]
            assert kept is not None
            return answers, kept.past()

    undisturbed = talk(None)
    for seed in range(2):
        assert talk(random.Random(seed)) == undisturbed


@pytest.mark.parametrize("policy", ["full", "streaming", *PER_TURN])
def test_a_conversation_goes_on_in_another_engine(small_model, policy) -> None:
    """From its past alone, and from the middle of its next answer."""
    sampling = SAMPLED.model_copy(update={"max_new_tokens": 17, "min_new_tokens": 0, "stop_token_ids": ()})
    prompts = [some_prompt(21, 3), some_prompt(5, 4), some_prompt(13, 5)]
    with make_engine(small_model, policy) as engine, make_engine(small_model, policy) as other:
        session = engine.open_session("talk")
        for prompt in prompts[:2]:
            for output in run(engine, engine.make_request(prompt, sampling, AHEAD, session=session)):
                session.take(output)
        kept = engine._scheduler.sessions["talk"]
        assert kept is not None
        past = kept.past()
        whole = tokens(run(engine, engine.make_request(prompts[2], sampling, AHEAD, session=session)))
        assert len(whole) > 5
        for cut in (0, 5):
            taken_up = other.open_session(past=past)
            assert taken_up.last_token == past.token_ids[-1]
            so_far = [AnswerSoFar(tuple(whole[:cut]))]
            request = other.make_request(prompts[2], sampling, AHEAD, session=taken_up, so_far=so_far)
            assert tokens(run(other, request)) == whole[cut:]
            again = other._scheduler.sessions[taken_up.session_id]
            assert again is not None and again.past() == kept.past()
            other.close_session(taken_up)


CONTROLLED = {
    "stop texts": dict(stop=("qu", "x1"), min_new_tokens=4),
    "stop text shown": dict(stop=("zz",), include_stop=True),
    "a schema": dict(
        json_schema='{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}'
    ),
    "a regex": dict(regex="(ab|é)+[0-9]{3,60}"),
    "log-probabilities": dict(logprobs=3),
}


@pytest.fixture(scope="module")
def engine(tiny_model):
    config = {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 4, "max_rows": 64}}
    with Engine.from_config(config) as engine:
        yield engine


@pytest.mark.parametrize("name", CONTROLLED)
def test_controls_of_a_resumed_answer_know_what_came_before(engine, name) -> None:
    """Its text, too: the parts before and behind the cut are the whole, in the middle of a character and of what may
    become a stop text."""
    num_cuts = 0
    for seed in range(3):
        sampling = SamplingParams(max_new_tokens=40, temperature=1.3, top_k=60, seed=seed, **CONTROLLED[name])
        request = engine.make_request("Resume é", sampling, PLAIN)
        outputs = run(engine, request)
        whole, shown = tokens(outputs), text(engine, request, outputs)
        for cut in range(1, len(whole), 3):
            resumed = engine.make_request("Resume é", sampling, AHEAD, so_far=[AnswerSoFar(tuple(whole[:cut]))])
            rest = run(engine, resumed)
            assert tokens(rest) == whole[cut:]
            assert (rest[-1].finish_reason, rest[-1].is_stopped) == (outputs[-1].finish_reason, outputs[-1].is_stopped)
            before = text(engine, request, [output for output in outputs[:cut]])
            assert before + text(engine, resumed, rest) == shown
            assert [one for output in rest for one in output.logprobs] == [
                one for output in outputs for one in output.logprobs
            ][cut:]
            num_cuts += 1
    assert num_cuts > 8


def test_each_of_several_answers_is_resumed_where_it_was(engine) -> None:
    sampling = SamplingParams(max_new_tokens=24, temperature=1.0, seed=5, n=4)
    whole = [answer.token_ids for answer in engine.generate(["Several"], sampling, PLAIN)]
    so_far = [
        AnswerSoFar(whole[0][:7], 0),
        AnswerSoFar((), 1),
        AnswerSoFar(whole[2], 2, has_ended=True),
        AnswerSoFar(whole[3][:1], 3),
    ]
    request = engine.make_request("Several", sampling, AHEAD, so_far=so_far)
    found: dict[int, list[int]] = {}
    requests = forks(request)
    assert [each.index for each in requests] == [0, 1, 3]
    for each in requests:
        engine.add_request(each)
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.index, []).extend(output.token_ids)
    assert {index: tuple(rest) for index, rest in found.items()} == {0: whole[0][7:], 1: whole[1], 3: whole[3][1:]}


BAD = {
    "too long": ([AnswerSoFar((65,) * 9)], dict(max_new_tokens=9), "max_new_tokens = 9"),
    "an end token": ([AnswerSoFar((65, 261, 66))], {}, "token 261 ends an answer"),
    "a stop token": ([AnswerSoFar((65, 66))], dict(stop_token_ids=(66,)), "token 66 ends an answer"),
    "a stop text": ([AnswerSoFar((32, 33, 34))], dict(stop=("AB",)), "is complete with its token 1"),
    "against the grammar": ([AnswerSoFar((65, 66))], dict(regex="A[0-9]+"), "is not what sampling.regex allows"),
    "no token": ([AnswerSoFar((65, 900))], {}, "not a token id"),
    "another answer": ([AnswerSoFar((65,), index=1)], {}, "1 are asked for"),
    "twice": ([AnswerSoFar((65,)), AnswerSoFar((66,))], {}, "twice"),
    "nothing left": ([AnswerSoFar((65,), has_ended=True)], {}, "every answer has ended"),
    "a full cache": ([AnswerSoFar((65,) * 509)], dict(max_new_tokens=600), "the cache was full"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_the_beginning_of_an_answer_is_refused(engine, name) -> None:
    so_far, sampling, problem = BAD[name]
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        engine.make_request("Bad", SamplingParams(**sampling), so_far=so_far)
    assert caught.value.field.startswith("resume_from")


def test_a_turn_withdrawn_while_its_conversation_is_read_again_leaves_no_trace(small_model) -> None:
    for policy in ("full", "sink-turn"):
        with make_engine(small_model, policy, max_rows=16) as engine:
            short = GREEDY.model_copy(update={"max_new_tokens": 17})
            answers = []
            for loses in (False, True):
                session = engine.open_session()
                for output in run(engine, engine.make_request(some_prompt(21, 3), short, PLAIN, session=session)):
                    session.take(output)
                if loses:
                    lose_caches(engine)
                    request = engine.make_request(some_prompt(9, 8), short, PLAIN, session=session)
                    engine.add_request(request)
                    assert engine.step() == []
                    engine.abort(request.request_id)
                    (output,) = engine.step()
                    assert output.finish_reason is FinishReason.CANCELLED
                    session.take(output)
                    assert session.last_token is not None
                answers.append(tokens(run(engine, engine.make_request([1, 2, 3], short, PLAIN, session=session))))
                engine.close_session(session)
            assert answers[0] == answers[1]


def lose_caches(engine: Engine) -> None:
    """As where the workers are started anew."""
    engine.executor.close()
    engine.executor = LocalExecutor(engine.config, engine.spec)
    engine.read_again()
