"""What the model says behind each single token: asked once, kept, and what it would really say."""

from __future__ import annotations

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


def ask(engine, say=lambda text: None):
    return priming.primed(engine._executor, engine.config, engine.spec, engine.tokenizer.opening(), TOP_K, say)


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
    said: list[str] = []
    first = ask(engine, said.append)
    monkeypatch.setattr(engine._executor, "execute", None)
    assert np.array_equal(ask(engine, said.append), first)
    assert len(said) == 1


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
