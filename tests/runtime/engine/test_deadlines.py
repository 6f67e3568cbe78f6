"""Who comes first, who gets rows first, and who is refused: by priority and deadline, and as ever without them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from runtime import Engine, InvalidRequestError, LookaheadConfig, SamplingParams
from runtime.engine.deadlines import Pace
from runtime.errors import DeadlineError
from runtime.request import FinishReason, Request

AHEAD = LookaheadConfig(planner=False, window_size=5, ngram_size=4, row_budget=30)
SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)
PROMPT = [65, 66, 67] * 4


def make_engine(place: Path, **scheduler) -> Engine:
    settings = {"max_sequences": 1, "max_rows": 64} | scheduler
    return Engine.from_config({"model": {"path": str(place)}, "scheduler": settings})


def test_the_queue_is_by_priority_then_deadline_then_arrival(tiny_model) -> None:
    with make_engine(tiny_model) as engine:
        asked = {
            "running": {},
            "first": {},
            "second": {},
            "late": {"deadline_s": 900.0},
            "soon": {"deadline_s": 500.0},
            "low, soon": {"priority": -1, "deadline_s": 100.0},
            "high": {"priority": 2},
            "high, soon": {"priority": 2, "deadline_s": 700.0},
        }
        ended = []
        for name, urgency in asked.items():
            engine.add_request(engine.make_request(PROMPT, SHORT, AHEAD, name, **urgency))
            if name == "running":
                engine.step()
        while engine.has_work:
            ended += [output.request_id for output in engine.step() if output.finish_reason is not None]
        assert ended == ["running", "high, soon", "high", "soon", "late", "first", "second", "low, soon"]


def test_what_cannot_be_in_time_is_refused_before_it_runs(tiny_model) -> None:
    with make_engine(tiny_model) as engine:
        engine.generate([PROMPT] * 2, SamplingParams(max_new_tokens=40, ignore_eos=True))  # its pace is known now
        num_rows = engine.stats.num_rows
        asked = SamplingParams(max_new_tokens=400)
        (answer,) = engine.generate([PROMPT], asked, deadline_s=0.002)
        assert answer.finish_reason is FinishReason.ERROR and answer.token_ids == ()
        assert answer.error is not None and "s at best" in answer.error and "max_new_tokens" in answer.error
        assert engine.stats.num_rows == num_rows
        (answer,) = engine.generate([PROMPT], SHORT, deadline_s=600.0)
        assert answer.finish_reason is FinishReason.LENGTH


def test_an_answer_ends_when_its_deadline_has_passed_and_others_go_on(tiny_model) -> None:
    with make_engine(tiny_model, max_sequences=2) as engine:
        long = SamplingParams(max_new_tokens=450, ignore_eos=True)
        expected = engine.generate([PROMPT], SHORT)[0].token_ids
        engine._scheduler.pace = Pace()  # nothing is known: it is begun
        outputs = []
        for output in engine.stream(PROMPT, long, deadline_s=0.05):
            outputs.append(output)
            time.sleep(0.02)
        assert outputs[-1].finish_reason is FinishReason.ERROR and isinstance(outputs[-1].failure, DeadlineError)
        assert 0 < outputs[-1].usage.num_new_tokens < 450 and "had come when it passed" in str(outputs[-1].failure)
        assert engine.generate([PROMPT], SHORT)[0].token_ids == expected


def test_the_others_do_not_guess_while_one_would_be_late(tiny_model, monkeypatch) -> None:
    sampling = SamplingParams(max_new_tokens=30, temperature=0.8, seed=1, ignore_eos=True)
    prompts = [PROMPT, [70, 71] * 5, [80, 81, 82] * 3]
    with make_engine(tiny_model, max_sequences=3) as engine:
        expected = [answer.token_ids for answer in engine.generate(prompts, sampling, AHEAD)]
        scheduler = engine._scheduler
        monkeypatch.setattr(scheduler.pace, "is_late", lambda sequence, _: sequence.request.request_id == "1")
        for index, prompt in enumerate(prompts):
            deadline_s = 1000.0 if index == 1 else None
            engine.add_request(engine.make_request(prompt, sampling, AHEAD, str(index), deadline_s=deadline_s))
        found: dict[str, list[int]] = {"0": [], "1": [], "2": []}
        rows: list[dict[str, int]] = []
        plan = scheduler.plan

        def watched(**options):
            step = plan(**options)
            rows.append({part.sequence.request.request_id: len(part.rows) for part in step.parts})
            return step

        monkeypatch.setattr(scheduler, "plan", watched)
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.token_ids
        assert [tuple(tokens) for tokens in found.values()] == expected
        beside = [step for step in rows[1:] if "1" in step and len(step) > 1]
        assert len(beside) > 3 and all(step.get("0", 1) == step.get("2", 1) == 1 for step in beside)
        assert max(step["1"] for step in beside) == 30
        assert max(max(step.values()) for step in rows if "1" not in step) > 1  # then they guess again


def test_pace_is_what_steps_have_shown() -> None:
    pace = Pace()
    request = Request(
        "r", (1,) * 100, SamplingParams(max_new_tokens=50), LookaheadConfig(), deadline_s=2.0, arrival_s=0.0
    )
    assert pace.refusal(request, 1.0) is None and pace.refusal(request, 2.1) is not None
    for _ in range(100):
        pace.observe(0.04, num_tokens=8, num_sequences=4, alone=0.5)  # 0.5 * 0.04 s for 2 tokens of one alone
        pace.observe_reading(0.1, num_rows=50)
    assert pace.token_s == pytest.approx(0.01) and pace.row_s == pytest.approx(0.002)
    assert pace.at_best_s(100, 50) == pytest.approx(0.7)
    assert pace.refusal(request, 1.2) is None
    error = pace.refusal(request, 1.4)
    assert error is not None and "0.70 s at best" in str(error) and "0.60 s of its 2 s" in str(error) and error.remedy


@pytest.mark.parametrize(
    ("urgency", "field"),
    [
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": "1"}, "deadline_s"),
    ],
)
def test_what_is_no_priority_and_no_deadline_is_refused(tiny_model, urgency, field) -> None:
    with make_engine(tiny_model) as engine, pytest.raises(InvalidRequestError) as caught:
        engine.make_request(PROMPT, SHORT, **urgency)
    assert caught.value.field == field
