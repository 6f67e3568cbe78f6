"""Prefix reuse: a prompt that begins as a text in the cache is read from there on, and answered as if read in whole."""

from __future__ import annotations

import random

import numpy as np
import pytest

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.engine.reuse import LEAST, Place, TextsLeft
from runtime.errors import InvalidRequestError
from runtime.request import derived_seed

PLAIN = LookaheadConfig(enabled=False)
WIDE = LookaheadConfig(planner=False, window_size=4, ngram_size=3, row_budget=24)
SAMPLING = SamplingParams(max_new_tokens=20, temperature=0.9, seed=3, repetition_penalty=1.3, frequency_penalty=0.3)


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def engine_of(directory, reuse: bool, **scheduler) -> Engine:
    settings = {"max_sequences": 3, "max_rows": 64, "prefix_reuse": reuse, **scheduler}
    return Engine.from_config(Config.from_dict({"model": {"path": str(directory)}, "scheduler": settings}))


@pytest.fixture(scope="module")
def engines(tiny_model):
    with engine_of(tiny_model, True) as reusing, engine_of(tiny_model, False) as reading:
        yield reusing, reading


@pytest.mark.parametrize("lookahead", [PLAIN, WIDE], ids=["off", "on"])
def test_answers_are_those_of_reading_all(engines, lookahead):
    reusing, reading = engines
    system, reused = tokens(200, 1), 0
    asked = [[*system, *tokens(5, seed)] for seed in range(4)]
    asked += [asked[0], asked[1][:150], [*asked[2], 7, 8], tokens(40, 9), [*tokens(40, 9), *tokens(40, 10)]]
    for prompt in asked:
        one, other = (engine.generate([prompt], SAMPLING, lookahead)[0] for engine in (reusing, reading))
        assert one.token_ids == other.token_ids
        assert other.usage.num_reused_tokens == 0 and one.usage.num_prompt_tokens == len(prompt)
        reused += one.usage.num_reused_tokens
    assert reused >= 3 * 200 + 149 + 200 + 39


def test_an_answer_in_the_cache_is_reused_too_as_when_a_client_sends_all_turns_again(engines):
    reusing, reading = engines
    prompt = tokens(60, 20)
    said = reusing.generate([prompt], SAMPLING)[0]
    longer = [*prompt, *said.token_ids, *tokens(6, 21)]
    one, other = (engine.generate([longer], SAMPLING)[0] for engine in engines)
    assert one.token_ids == other.token_ids
    assert one.usage.num_reused_tokens == len(prompt) + len(said.token_ids) - 1  # the last one was never cached


def test_requests_in_company_read_their_common_beginning_once(engines):
    reusing, reading = engines
    rows = []
    execute = reusing.executor.execute
    reusing.executor.execute = lambda plan, *rest: (rows.append(plan.num_rows), execute(plan, *rest))[1]
    asked = [[*tokens(180, 30), *tokens(3, seed)] for seed in range(31, 36)]
    try:
        together = reusing.generate(asked, SAMPLING, PLAIN)
    finally:
        reusing.executor.execute = execute
    assert [one.token_ids for one in together] == [one.token_ids for one in reading.generate(asked, SAMPLING, PLAIN)]
    assert [one.usage.num_reused_tokens for one in together[1:]] == [180] * 4
    assert sum(rows) < 183 + 5 * (3 + 20)


def test_prompts_that_are_scored_are_read(engines):
    reusing, _ = engines
    prompt = tokens(50, 40)
    for _ in range(2):
        found = reusing.generate([prompt], {"max_new_tokens": 2, "prompt_logprobs": 0})[0]
        assert found.usage.num_reused_tokens == 0 and len(found.prompt_logprobs) == 50


def test_a_withdrawn_request_leaves_what_it_has_read(engines):
    reusing, reading = engines
    prompt = tokens(150, 50)
    reusing.add_request(reusing.make_request(prompt, SAMPLING, request_id="x"))
    reusing.step()
    reusing.abort("x")
    reusing.step()
    one, other = (engine.generate([[*prompt, 1, 2]], SAMPLING)[0] for engine in engines)
    assert one.token_ids == other.token_ids and one.usage.num_reused_tokens == 64


def test_conversations_begin_with_what_is_there_and_leave_what_they_had(engines):
    reusing, reading = engines
    system = tokens(100, 60)
    reusing.generate([system], SAMPLING)
    answers = []
    for engine in engines:
        session = engine.open_session()
        outputs = [list(engine.stream(turn, SAMPLING, session=session)) for turn in ([*system, 3, 4], [5, 6])]
        engine.close_session(session)
        answers.append([tuple(t for o in turn for t in o.token_ids) for turn in outputs])
        if engine is reusing:
            assert outputs[0][-1].usage.num_reused_tokens == 100 and outputs[1][-1].usage.num_reused_tokens == 0
    assert answers[0] == answers[1]
    text = [*system, 3, 4, *answers[0][0], 5, 6]
    assert reusing.generate([[*text, 1]], SAMPLING)[0].usage.num_reused_tokens == len(text)


def test_a_measurement_writes_over_what_was_left(engines):
    reusing, reading = engines
    prompt = tokens(90, 70)
    reusing.generate([prompt], SAMPLING)
    reusing.measure_cost()
    one, other = (engine.generate([[*prompt, 2]], SAMPLING)[0] for engine in engines)
    assert one.token_ids == other.token_ids and one.usage.num_reused_tokens == 0


def test_where_a_request_begins():
    left, prompt = TextsLeft(), np.arange(100)
    assert left.place(prompt, [0, 1], []) == Place(0)
    left.leave(0, list(range(50)))
    left.leave(1, [5, 6, 7] * 20)
    assert left.place(prompt, [0, 1, 2], []) == Place(0, 0, 50)
    assert left.place(np.arange(300, 400), [0, 1], []) == Place(0)  # the one left longest ago
    assert left.place(np.arange(300, 400), [0, 1, 2], []) == Place(2)
    assert left.place(prompt, [1, 2], [(0, list(range(90)), 89)]) == Place(2, 0, 89)
    assert left.place(prompt, [1, 2], [(0, list(range(90)), 10)]) is None  # it is being read
    assert left.place(prompt[: LEAST - 1], [1], [(0, list(range(90)), 10)]) == Place(1)
    left.take(0)
    assert left.place(prompt, [0, 1, 2], []) == Place(0)
    left.leave(0, [1] * (LEAST - 1))
    assert left.place(np.full(50, 1), [0], []) == Place(0)


@pytest.mark.parametrize("lookahead", [PLAIN, WIDE], ids=["off", "on"])
def test_n_answers_are_those_to_n_requests_with_the_derived_seeds_and_read_the_prompt_once(engines, lookahead):
    reusing, reading = engines
    prompt, rows = tokens(170, 80), []
    sampling = SAMPLING.model_copy(update={"n": 5})
    execute = reusing.executor.execute
    reusing.executor.execute = lambda plan, *rest: (rows.append(plan.num_rows), execute(plan, *rest))[1]
    try:
        found = reusing.generate([prompt], sampling, lookahead)
    finally:
        reusing.executor.execute = execute
    seeds = [derived_seed(SAMPLING.seed, index) for index in range(5)]
    assert len(set(seeds)) == 5 and seeds[0] == SAMPLING.seed and all(0 <= seed < 2**63 for seed in seeds)
    for index, one in enumerate(found):
        alone = SAMPLING.model_copy(update={"seed": seeds[index]})
        assert one.index == index and one.token_ids == reading.generate([prompt], alone, PLAIN)[0].token_ids
    assert len({one.token_ids for one in found}) > 1
    if lookahead is PLAIN:
        assert sum(rows) <= 170 + 5 * (1 + 20)
    streamed: dict[int, list[int]] = {}
    for output in reusing.stream(prompt, sampling, lookahead):
        streamed.setdefault(output.index, []).extend(output.token_ids)
    assert [tuple(streamed[index]) for index in range(5)] == [one.token_ids for one in found]


def test_several_answers_are_not_for_a_turn_and_no_single_request(engines):
    reusing, _ = engines
    session = reusing.open_session()
    with pytest.raises(InvalidRequestError, match="sampling.n"):
        next(reusing.stream([1, 2], {"n": 2}, session=session))
    reusing.close_session(session)
    with pytest.raises(InvalidRequestError, match="sampling.n"):
        reusing.add_request(reusing.make_request([1, 2], {"n": 2}))
    with pytest.raises(InvalidRequestError, match="n"):
        reusing.make_request([1, 2], {"n": 65})
