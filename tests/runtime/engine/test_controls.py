"""Every control of what is generated, with lookahead on and off, alone and in company, and beside a dense reference."""

from __future__ import annotations

import random

import pytest

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.errors import InvalidRequestError
from tests.dense import DenseReference

PLAIN = LookaheadConfig(enabled=False)
WIDE = LookaheadConfig(planner=False, window_size=5, ngram_size=4, row_budget=40)

CONTROLS: dict[str, dict] = {
    "min_p": dict(min_p=0.05),
    "repetition_penalty": dict(repetition_penalty=1.3),
    "presence_penalty": dict(presence_penalty=1.5),
    "frequency_penalty": dict(frequency_penalty=0.7),
    "negative penalties": dict(frequency_penalty=-0.2, presence_penalty=-0.5),
    "logit_bias": dict(logit_bias={97: 3.0, 101: -100.0, 32: 1.5}),
    "min_new_tokens": dict(min_new_tokens=20, stop_token_ids=tuple(range(0, 256, 2))),
    "all": dict(
        min_p=0.01,
        top_k=60,
        top_p=0.97,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={5: 2.0},
        min_new_tokens=3,
        stop_token_ids=(9, 10, 11),
    ),
}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Some that repeat themselves, so that guesses are right, too."""
    generator = random.Random(seed)
    return [generator.choices(range(256), k=generator.randint(2, 12)) * 4 for _ in range(count)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    config = {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 4, "max_rows": 192}}
    with Engine.from_config(config) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny_model):
    return DenseReference(tiny_model)


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CONTROLS)
def test_lookahead_changes_nothing_and_neither_does_company(engine, reference, name, temperature):
    sampling = SamplingParams(max_new_tokens=40, temperature=temperature, seed=5, **CONTROLS[name])
    alone = [engine.generate([prompt], sampling, PLAIN)[0] for prompt in prompts(4)]
    together = engine.generate(prompts(4), sampling, WIDE)
    for prompt, one, other in zip(prompts(4), alone, together, strict=True):
        assert other.token_ids == one.token_ids and other.finish_reason == one.finish_reason
        reference.check(prompt, one.token_ids, sampling)
    assert sum(len(one.token_ids) for one in alone) > 60


def test_differing_requests_in_company_are_what_they_are_alone(engine):
    given = [
        SamplingParams(max_new_tokens=30, temperature=temperature, seed=index, **control)
        for index, (control, temperature) in enumerate((c, t) for c in CONTROLS.values() for t in (0.0, 1.1))
    ]
    asked = prompts(len(given), seed=3)
    alone = [engine.generate([prompt], one, PLAIN)[0].token_ids for prompt, one in zip(asked, given, strict=True)]
    found: dict[str, list[int]] = {}
    for index, (prompt, one) in enumerate(zip(asked, given, strict=True)):
        engine.add_request(engine.make_request(prompt, one, WIDE, request_id=str(index)))
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    assert [tuple(found[str(index)]) for index in range(len(given))] == alone


def test_penalties_count_the_turns_before_as_the_prompt(engine, reference):
    first, second = [3, 4, 5, 3, 4, 5], [6, 7, 3, 4]
    sampling = SamplingParams(max_new_tokens=20, repetition_penalty=1.5, frequency_penalty=1.0, ignore_eos=True)
    for lookahead in (PLAIN, WIDE):
        session = engine.open_session()
        said = [
            tuple(token for output in engine.stream(turn, sampling, lookahead, session) for token in output.token_ids)
            for turn in (first, second)
        ]
        engine.close_session(session)
        reference.check(first, said[0], sampling)
        reference.check([*first, *said[0], *second], said[1], sampling)


def test_the_first_end_token_comes_when_it_may(engine):
    prompt = prompts(1)[0]
    free = engine.generate([prompt], SamplingParams(max_new_tokens=40, ignore_eos=True))[0].token_ids
    for least in (0, 1, 7):
        sampling = SamplingParams(
            max_new_tokens=40, min_new_tokens=least, stop_token_ids=tuple(set(free)), ignore_eos=True
        )
        found = engine.generate([prompt], sampling)[0].token_ids
        assert len(found) > least and not set(found[:least]) & set(free)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (dict(min_p=1.5), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(presence_penalty=3.0), "presence_penalty"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty"),
        (dict(logit_bias={1: 200.0}), "logit_bias"),
        (dict(logit_bias={token: 0.0 for token in range(2000)}), "logit_bias"),
        (dict(logit_bias={262: 1.0}), "logit_bias"),
        (dict(logit_bias={-1: 1.0}), "logit_bias"),
        (dict(logit_bias="5:1"), "logit_bias"),
        (dict(min_new_tokens=10, max_new_tokens=5), "min_new_tokens"),
        (dict(min_new_tokens=True), "min_new_tokens"),
        (dict(min_new_tokens=2, stop_token_ids=tuple(range(600))), "stop_token_ids"),
    ],
)
def test_what_cannot_be_is_refused_by_name(engine, given, field):
    with pytest.raises(InvalidRequestError, match=field):
        engine.make_request([1, 2], given)


def test_sequences_leave_nothing_behind(engine):
    sampling = SamplingParams(max_new_tokens=5, repetition_penalty=1.2, logit_bias={3: 1.0})
    engine.generate(prompts(4), sampling)
    state = engine.executor._worker.controls
    engine.generate([[1, 2, 3]] * 4, SamplingParams(max_new_tokens=2))
    assert not state._biases
    assert all(history.length < 10 for history in state._histories.values())


def test_an_engine_config_has_the_controls_as_defaults():
    config = Config.load(None, ["sampling.logit_bias={5: -1.5, 7: 2}", "sampling.min_p=0.1"])
    assert config.sampling.logit_bias == {5: -1.5, 7: 2.0} and config.sampling.min_p == 0.1


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_stop_texts_end_an_answer_wherever_they_are_complete(engine, temperature):
    """Two characters of a free answer, across tokens as the model's are bytes; on and off, and behind each other."""
    prompt, free = prompts(1)[0], dict(max_new_tokens=50, temperature=temperature, ignore_eos=True, seed=2)
    whole = engine.generate([prompt], free, PLAIN)[0]
    cut_runs = 0
    for start in range(2, 40, 5):
        stop = whole.text[start : start + 3]
        end = whole.text.index(stop) + len(stop)
        for include in (False, True):
            sampling = {**free, "stop": (stop, "never there"), "include_stop": include}
            one, other = (engine.generate([prompt], sampling, setting)[0] for setting in (PLAIN, WIDE))
            assert one.token_ids == other.token_ids == whole.token_ids[: len(one.token_ids)]
            assert one.text == other.text == whole.text[: end if include else end - len(stop)]
            assert one.finish_reason == other.finish_reason == "stop"
            cut_runs += other.run_lengths[-1] > 1
        shown = [output.token_ids for output in engine.stream(prompt, {**free, "stop": (stop,)}, WIDE)]
        assert sum(shown, ()) == one.token_ids
    assert cut_runs


def test_a_stop_text_ends_a_turn_and_not_the_conversation(engine, reference):
    sampling = dict(max_new_tokens=40, ignore_eos=True)
    prompt = prompts(1)[0]
    stop = engine.generate([prompt], sampling, PLAIN)[0].text[6:9]
    answers = []
    for lookahead in (PLAIN, WIDE):
        session = engine.open_session()
        turns = [(prompt, {**sampling, "stop": (stop,)}), ([7, 8, 9], sampling)]
        answers.append([[t for o in engine.stream(p, s, lookahead, session) for t in o.token_ids] for p, s in turns])
        engine.close_session(session)
    assert answers[0] == answers[1] and len(answers[0][0]) < 12
    reference.check([*prompt, *answers[0][0], 7, 8, 9], answers[0][1], SamplingParams(**sampling))


def test_a_stop_text_counts_behind_the_least_length(engine):
    prompt, free = prompts(1)[0], dict(max_new_tokens=50, ignore_eos=True)
    whole = engine.generate([prompt], free)[0]
    every = tuple(set(whole.text))
    sampling = {**free, "min_new_tokens": 9, "stop": every}
    one, other = (engine.generate([prompt], sampling, setting)[0] for setting in (PLAIN, WIDE))
    assert one.token_ids == other.token_ids and len(one.token_ids) > 9
    assert one.text == other.text and len(one.text) >= 2


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_log_probabilities_are_the_models_own(engine, reference, temperature):
    sampling = SamplingParams(
        max_new_tokens=20, temperature=temperature, top_p=0.9, repetition_penalty=1.2, logprobs=3, prompt_logprobs=2
    )
    given = prompts(3, seed=4)
    together = engine.generate(given, sampling, WIDE)
    for prompt, found in zip(given, together, strict=True):
        alone = engine.generate([prompt], sampling, PLAIN)[0]
        assert alone.token_ids == found.token_ids
        text = [*prompt, *found.token_ids]
        expected = reference.logits(text).log_softmax(-1)
        assert found.prompt_logprobs[0] is None and len(found.prompt_logprobs) == len(prompt)
        assert len(found.logprobs) == len(found.token_ids)
        for completion in (found, alone):
            told = [*completion.prompt_logprobs[1:], *completion.logprobs]
            for place, one in enumerate(told):
                row = expected[place]
                assert abs(one.logprob - row[text[place + 1]]) < 1e-4
                best = row.topk(2 if place < len(prompt) - 1 else 3)
                assert max(abs(value - e) for (_, value), e in zip(one.top, best.values, strict=True)) < 1e-4
                assert all(abs(row[token] - value) < 1e-4 for token, value in one.top)
    assert engine.generate([given[0]], {"max_new_tokens": 2, "logprobs": 0})[0].logprobs[0].top == ()


def test_a_long_prompts_log_probabilities_come_in_parts(engine, reference):
    prompt = random.Random(1).choices(range(256), k=450)  # of steps of 192 rows
    found = engine.generate([prompt, prompt[:100]], {"max_new_tokens": 3, "prompt_logprobs": 0})
    expected = reference.logits(prompt).log_softmax(-1)
    for completion in found:
        assert len(completion.prompt_logprobs) == len(completion.prompt_ids)
        for place, one in enumerate(completion.prompt_logprobs[1:]):
            assert abs(one.logprob - expected[place][prompt[place + 1]]) < 1e-4


def test_a_turns_first_token_has_a_log_probability_behind_the_turn_before(engine, reference):
    session = engine.open_session()
    first, second = [1, 2, 3, 4], [9, 8, 7]
    said = [t for o in engine.stream(first, {"max_new_tokens": 4}, session=session) for t in o.token_ids]
    outputs = list(engine.stream(second, {"max_new_tokens": 2, "prompt_logprobs": 0}, session=session))
    engine.close_session(session)
    text = [*first, *said, *second]
    expected = reference.logits(text).log_softmax(-1)
    told = outputs[0].prompt_logprobs
    assert [round(one.logprob, 3) for one in told] == [
        round(float(expected[place - 1][text[place]]), 3) for place in range(len(text) - 3, len(text))
    ]
    assert not any(output.prompt_logprobs for output in outputs[1:])
