"""What the model says behind each single token: asked once, kept, and what it would really say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime import Engine, LookaheadConfig, SamplingParams
from runtime.engine.scheduler import TOP_K
from runtime.step import TOP_BITS
from runtime.tuning import priming


@pytest.fixture
def engine(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(priming, "primed_folder", lambda: tmp_path)
    model, scheduler = {"path": str(tiny_model), "dtype": "float32"}, {"max_rows": 100}
    with Engine.from_config({"model": model, "scheduler": scheduler, "lookahead": {"enabled": False}}) as engine:
        yield engine


def ask(engine):
    return priming.primed(engine.executor, engine.config, engine.spec, engine.tokenizer.opening(), TOP_K)


def test_bigrams_are_what_the_model_says_behind_the_opening_and_the_token(engine, monkeypatch):
    monkeypatch.setattr(priming, "BUDGET_S", 60.0)
    top = ask(engine)
    assert top.shape == (engine.spec.vocab_size, TOP_K)
    opening = engine.tokenizer.opening()
    tokens = [0, 5, 77, engine.spec.vocab_size - 1]
    one = SamplingParams(max_new_tokens=1, ignore_eos=True)
    for token in tokens:
        answer = engine.generate([[*opening, token]], one)[0]
        assert answer.token_ids == (int(top[token, 0]) >> TOP_BITS,)


def test_bigrams_are_asked_for_once_and_then_read(engine, monkeypatch):
    first = ask(engine)
    monkeypatch.setattr(engine.executor, "execute", None)
    assert np.array_equal(ask(engine), first)


def test_those_of_the_embedded_model_come_with_the_program(engine):
    """Nothing is asked: the executor is not there."""
    config = engine.config.merged({"model": {"path": None}})
    shipped = priming.shipped()
    assert shipped.shape == (49_152, TOP_K) and (shipped >> TOP_BITS).max() < 49_152
    spec = replace(engine.spec, vocab_size=49_152)
    assert np.array_equal(priming.primed(None, config, spec, [1, 2, 3], TOP_K), shipped)


def test_where_time_is_short_the_first_tokens_are_known(engine, monkeypatch):
    monkeypatch.setattr(priming, "BUDGET_S", 0.0)
    top = ask(engine)
    assert 0 < len(top) < engine.spec.vocab_size


def test_primed_lookahead_emits_what_one_at_a_time_emits(tiny_model):
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
    lookahead = LookaheadConfig(planner=False, sources=("recycle",), row_budget=16)
    with Engine.from_config({"model": {"path": str(tiny_model), "dtype": "float32"}}) as engine:
        assert engine.knowledge.bigrams is not None
        plain = engine.generate([[3, 4, 5]], sampling, LookaheadConfig(enabled=False))[0]
        answer = engine.generate([[3, 4, 5]], sampling, lookahead)[0]
        engine.knowledge = type(engine.knowledge)()
        cold = engine.generate([[3, 4, 5]], sampling, lookahead)[0]
    assert answer.token_ids == plain.token_ids == cold.token_ids
    assert answer.usage.num_rows > cold.usage.num_rows  # there is something to propose from the first step on
