"""Random combinations of controls on every mesh: tokens, texts and log-probabilities of one process alone, one token
at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.request import Completion

pytestmark = pytest.mark.system

PLAIN = LookaheadConfig(enabled=False)
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2)]
FEW, MANY = 10, 200
FORMS: list[dict[str, Any]] = [
    {"regex": "([a-f]{2,4} ){3,6}!"},
    {"choice": ("red green", "red blue", "violet")},
    {"json_schema": '{"type":"object","properties":{"a":{"enum":["x","yy"]},"b":{"type":"integer"}},"required":["a"]}'},
]


def combination(seed: int) -> tuple[list[int], SamplingParams]:
    """A prompt that repeats itself, and parameters of which each is there as often as not."""
    pick = random.Random(seed)
    values: dict[str, Any] = {"max_new_tokens": pick.randint(8, 24), "seed": seed}
    for name, options in {
        "temperature": (0.0, 0.3, 0.8, 1.0, 1.7),
        "top_k": (0, 1, 5, 40),
        "top_p": (1.0, 0.95, 0.5),
        "min_p": (0.0, 0.02, 0.3),
        "repetition_penalty": (1.0, 0.8, 1.2, 2.0),
        "presence_penalty": (0.0, -0.7, 1.0),
        "frequency_penalty": (0.0, 0.4, -0.3),
        "logit_bias": ({}, {7: 2.0, 98: -100.0}),
        "stop": ((), ("ab", "\n"), ("a", "bc")),
        "logprobs": (None, 0, 4),
        "prompt_logprobs": (None, None, 1),
    }.items():
        values[name] = pick.choice(options)
    if pick.random() < 0.3:
        values |= pick.choice(FORMS)
    elif pick.random() < 0.4:
        values |= {"min_new_tokens": 5, "stop_token_ids": tuple(pick.choices(range(256), k=40))}
    return pick.choices(range(256), k=pick.randint(1, 9)) * pick.randint(1, 5), SamplingParams(**values)


def check(tiny_model, lp: int, tp: int, count: int) -> None:
    settings = {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 4, "max_rows": 96}}
    lookahead = LookaheadConfig(planner=False, window_size=4, ngram_size=3, row_budget=20)
    asked = [combination(seed) for seed in range(count)]
    with Engine.from_config(Config.from_dict(settings)) as engine:
        alone = [engine.generate([prompt], sampling, PLAIN)[0] for prompt, sampling in asked]
    settings["parallel"] = {"lp": lp, "tp": tp}
    with Engine.from_config(Config.from_dict(settings)) as engine:
        for (prompt, sampling), expected in zip(asked, alone, strict=True):
            same(engine.generate([prompt], sampling, lookahead)[0], expected, sampling)
        together: dict[str, list[int]] = {}
        for number, (prompt, sampling) in enumerate(asked):
            engine.add_request(engine.make_request(prompt, sampling, lookahead, request_id=str(number)))
        while engine.has_work:
            for output in engine.step():
                together.setdefault(output.request_id, []).extend(output.token_ids)
    assert [tuple(together[str(number)]) for number in range(count)] == [one.token_ids for one in alone]
    assert sum(len(one.token_ids) for one in alone) > 5 * count


def same(found: Completion, expected: Completion, sampling: SamplingParams) -> None:
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text), sampling
    assert found.finish_reason == expected.finish_reason
    told, known = (
        [one for one in (*each.logprobs, *each.prompt_logprobs) if one is not None] for each in (found, expected)
    )
    for one, other in zip(told, known, strict=True):
        assert abs(one.logprob - other.logprob) < 1e-4 and len(one.top) == len(other.top)
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(one.top, other.top, strict=True))


@pytest.mark.parametrize(("lp", "tp"), MESHES)
def test_controls_mean_the_same_on_every_mesh(tiny_model, lp, tp):
    check(tiny_model, lp, tp, FEW)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("lp", "tp"), MESHES)
def test_many_combinations_of_controls_mean_the_same_on_every_mesh(tiny_model, lp, tp):
    check(tiny_model, lp, tp, MANY)
