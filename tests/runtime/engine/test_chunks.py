"""Prompts are read in chunks beside running answers, and these do not stall: by the cost curve, without a clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.config import SchedulerConfig
from runtime.engine.chunks import LEAST, Chunks
from runtime.tuning.cost import CostCurve
from tests.zoo import some_tokens

CURVE = CostCurve((1, 33, 2000), (1.0, 1.3, 41.0))
"""Rows are nearly free up to 32, then 0.02 steps each."""
LOOKAHEAD = LookaheadConfig(sources=("suffix", "recycle"))


@contextmanager
def engine_with(place: Path, max_stall: float) -> Iterator[Engine]:
    scheduler = {"max_rows": 512, "max_stall": max_stall}
    with Engine.from_config(Config.from_dict({"model": {"path": str(place)}, "scheduler": scheduler})) as engine:
        engine.use_curve(CURVE)
        engine._scheduler.observe = lambda *_: None  # type: ignore[method-assign]  # the curve is what steps take
        yield engine


def gaps(engine: Engine, num_answers: int, prompt: list[int]) -> tuple[list[float], list[tuple[int, ...]]]:
    """The seconds by the curve between the outputs of some running answers while long prompts come; all tokens."""
    answer, short = SamplingParams(max_new_tokens=150, ignore_eos=True), SamplingParams(max_new_tokens=1)
    running = [engine.make_request(some_tokens(5, seed=i), answer, LOOKAHEAD) for i in range(num_answers)]
    intruders = [engine.make_request([*prompt, i], short, LOOKAHEAD) for i in range(8)]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in running + intruders}
    waited: dict[str, float] = dict.fromkeys(tokens, 0.0)
    found: list[float] = []
    rows_before = 0
    for request in running:
        engine.add_request(request)
    for step in range(10_000):
        if step >= 20 and step % 6 == 0 and intruders:
            engine.add_request(intruders.pop())
        outputs = engine.step()
        seconds = engine.cost.seconds[engine.stats.num_rows - rows_before]
        rows_before = engine.stats.num_rows
        for name in waited:
            waited[name] += seconds
        for output in outputs:
            if output.request_id in [request.request_id for request in running] and tokens[output.request_id]:
                found.append(float(waited[output.request_id]))
            waited[output.request_id] = 0.0
            tokens[output.request_id] += output.token_ids
        if not engine.has_work:
            break
    return found, [tuple(run) for run in tokens.values()]


@pytest.mark.parametrize("num_answers", [1, 8])
def test_running_answers_do_not_stall_while_long_prompts_come(tiny_model: Path, num_answers: int) -> None:
    prompt = some_tokens(440, seed=77)
    with engine_with(tiny_model, 2.0) as engine:
        even, tokens = gaps(engine, num_answers, prompt)
    with engine_with(tiny_model, 1000.0) as engine:
        uneven, same = gaps(engine, num_answers, prompt)
    assert np.percentile(even, 99) <= 3 * statistics.median(even)
    assert np.percentile(uneven, 99) > 3 * statistics.median(uneven)  # as it would be
    assert tokens == same


def test_a_chunk_is_what_the_curve_allows() -> None:
    seconds = CURVE.table(512)
    chunks = Chunks(SchedulerConfig(max_stall=2.0))
    for _ in range(200):
        chunks.decoded(20, 1)
    usual, most = 20, chunks.most_rows(1, seconds)
    assert seconds[usual + most] <= 2.0 * seconds[usual] < seconds[usual + most + 1]
    assert chunks.guess_rows == 20
    assert chunks.most_rows(8, seconds) > most  # beside longer steps, longer chunks
    for _ in range(200):
        chunks.observe(2.0, 1.0)  # rows that take twice what the curve says, as over a long text
    assert chunks.most_rows(1, seconds) == LEAST
    assert Chunks(SchedulerConfig(max_stall=1000.0)).most_rows(1, seconds) == 256
    steep = CostCurve((1, 513), (1.0, 1000.0)).table(512)
    assert Chunks(SchedulerConfig()).most_rows(1, steep) == LEAST


def test_a_prompt_alone_has_the_whole_step(tiny_model: Path) -> None:
    with engine_with(tiny_model, 2.0) as engine:
        engine.add_request(engine.make_request(some_tokens(440, seed=1), SamplingParams(max_new_tokens=1)))
        engine.step()
        assert engine.stats.num_rows == 440
