"""The step cost curve: measured, kept, corrected; and the settings chosen by it."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.cli import planning
from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.errors import ConfigError
from runtime.model.directory import load_spec
from runtime.tuning import choose, cost
from runtime.tuning.cost import CostCurve, RunningCost

PLAIN = LookaheadConfig(enabled=False)


def config_of(tiny_model, **sections) -> Config:
    return Config.from_dict(
        {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 2, "max_rows": 64}} | sections
    )


def test_a_curve_is_interpolated_never_falls_and_goes_on_beyond_its_end():
    table = CostCurve((1, 2, 4, 8), (1.0, 0.8, 2.0, 4.0)).table(10)
    assert table[1:5].tolist() == pytest.approx([0.8, 0.8, 1.4, 2.0])  # 1 row measured as dearer than 2: a hiccup
    assert table[[8, 9, 10]].tolist() == [4.0, 4.5, 5.0]
    assert (np.diff(table) >= 0).all()


def test_rows_beyond_a_curve_that_ends_in_noise_are_not_free():
    # On a busy machine a measurement may end at a few rows, the last of which seem to cost the same.
    seconds, alone = (0.0714, 0.0757, 0.1541, 0.1617, 0.1541), (0.0698, 0.0806, 0.0804, 0.0819, 0.0792)
    curve = CostCurve((1, 2, 4, 6, 8), seconds, alone=alone)
    assert curve.table(512)[512] > 8 * curve.table(512)[1]
    flat = CostCurve((1, 2), (0.5, 0.5)).table(101)
    assert flat[2] == 0.5 and flat[101] == pytest.approx(0.5 * 1.99)
    wide = CostCurve((1, 64), (0.5, 0.5)).table(101)  # rows are free indeed, as far as can be seen
    assert wide[101] == 0.5


def test_a_running_curve_follows_what_steps_take_and_shrugs_at_a_hiccup():
    running = RunningCost(CostCurve((1, 16, 64), (1.0, 2.0, 4.0)), 64)
    running.observe(16, 1000.0)
    running.now()
    for _ in range(7):
        running.observe(16, 2.0)
    assert running.seconds[16] < 2.2
    for _ in range(400):
        running.observe(64, 12.0)
    assert running.seconds[64] == pytest.approx(12.0, rel=0.05)
    assert 1.0 < running.seconds[1] < 4.0  # somewhat slower too: the machine may be


def test_a_start_takes_a_first_look_keeps_it_and_leaves_no_trace_in_the_cache(tiny_model, monkeypatch):
    monkeypatch.setattr(cost, "BUDGET_S", 3.0)  # where other programs work, too, enough for more than a look
    prompt, sampling = [3, 1, 4, 1, 5, 9, 2, 6], SamplingParams(max_new_tokens=24)
    config = config_of(tiny_model, scheduler={"max_sequences": 1, "max_rows": 48})
    with Engine.from_config(config.merged({"lookahead": PLAIN})) as engine:
        expected = engine.generate([prompt], sampling)[0].token_ids
        assert cost.stored(engine.config, engine.spec) is None
    with Engine.from_config(config) as engine:
        look = engine.cost.curve
        assert look.provisional and look.rows[0] == 1 and look.rows[-1] <= 48 and min(look.seconds) > 0
        assert engine.generate([prompt], sampling)[0].token_ids == expected
    with Engine.from_config(config) as engine:
        assert engine.cost.curve == look
        curve = engine.measure_cost()
        assert not curve.provisional and len(curve.rows) > len(look.rows)
        assert curve.measured_at and cost.stored(engine.config, engine.spec) == curve
        assert engine.generate([prompt], sampling)[0].token_ids == expected
    with Engine.from_config(config) as engine:
        assert engine.cost.curve == curve
        assert not engine.measure_aside()


def test_a_measurement_that_may_not_take_long_still_knows_the_curves_shape(tiny_model):
    """A millisecond a row, and 20 at most: 64 rows are timed once, others up to the first that takes longer."""

    class Slow:
        def execute(self, plan):
            time.sleep(plan.num_rows * 1e-3)

    config, spec = config_of(tiny_model, scheduler={"max_sequences": 1, "max_rows": 96}), load_spec(tiny_model)
    look = cost.Measurement(Slow(), config, spec, 8, rounds=2, budget_s=60, longest_s=0.02)
    assert look.run().rows == (1, 2, 4, 6, 8, 12, 16, 17, 24, 64)


def test_what_a_first_look_left_open_is_measured_while_nothing_is_to_be_done(tiny_model, monkeypatch):
    monkeypatch.setattr(cost, "BUDGET_S", 3.0)
    prompt, sampling = [3, 1, 4, 1, 5, 9, 2, 6], SamplingParams(max_new_tokens=24)
    config = config_of(tiny_model, scheduler={"max_sequences": 2, "max_rows": 44})
    with Engine.from_config(config) as engine:
        session = engine.open_session()
        first = [token for output in engine.stream(prompt, sampling, session=session) for token in output.token_ids]
        assert not engine.measure_aside()  # it would write over what the conversation has in its slot
        engine.close_session(session)
        for _ in range(5):
            assert engine.measure_aside()
        answer = engine.generate([prompt], sampling)[0].token_ids  # ends the measurement
        assert list(answer) == first and engine.cost.curve.provisional
        count = 0
        while engine.measure_aside():
            count += 1
        assert count > 10 and not engine.cost.curve.provisional
        assert cost.stored(engine.config, engine.spec) == engine.cost.curve
        assert engine.generate([prompt], sampling)[0].token_ids == answer


def test_a_measurement_that_other_programs_disturb_is_not_kept(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(cost, "STEADY", -1.0)
    with Engine.from_config(config_of(tiny_model, scheduler={"max_sequences": 1, "max_rows": 46})) as engine:
        assert engine.cost.curve.provisional and cost.stored(engine.config, engine.spec) is None
        while engine.measure_aside():
            pass
        assert engine.cost.curve.provisional and cost.stored(engine.config, engine.spec) is None
        assert not engine.measure_aside()  # for a while
        engine.measure_cost()  # was asked for: the steadiest of three
        assert capsys.readouterr().err.count("measuring again") == 2
        assert cost.stored(engine.config, engine.spec) == engine.cost.curve


def test_a_first_look_at_a_slow_model_is_one_step_and_an_assumption(tiny_model, monkeypatch):
    monkeypatch.setattr(cost, "GLANCE_S", 0.0)
    with Engine.from_config(config_of(tiny_model, scheduler={"max_sequences": 1, "max_rows": 45})) as engine:
        curve = engine.cost.curve
        assert curve.provisional and curve.rows == (1, 46)
        assert curve.seconds[1] == pytest.approx(curve.seconds[0] * 1.45)


def test_a_curve_that_cannot_be_read_is_measured_again(tiny_model):
    config = config_of(tiny_model, scheduler={"max_sequences": 1, "max_rows": 40})
    spec = load_spec(tiny_model)
    cost.store(config, spec, CostCurve((1, 2), (1.0, 2.0)))
    place = next(path for path in cost.cost_folder().iterdir() if json.loads(path.read_text())["seconds"] == [1.0, 2.0])
    assert cost.stored(config, spec) is not None
    place.write_text("{")
    assert cost.stored(config, spec) is None


def test_every_split_of_the_workers_is_a_candidate_and_types_are_if_open(tiny_model):
    spec = load_spec(tiny_model)

    def names(**sections):
        fixed = choose.candidates(config_of(tiny_model, **sections), spec)
        return [(c.parallel.lp, c.parallel.tp, c.model.dtype) for c in fixed]

    assert names(parallel={"split": "auto", "workers": 6}) == [
        (6, 1, "float32"), (3, 2, "float32"), (2, 3, "float32"), (1, 6, "float32")
    ]  # fmt: skip
    assert (1, 16, "float32") not in names(parallel={"split": "auto", "workers": 16})  # 9 query heads
    with pytest.raises(ConfigError, match="parallel.workers"):
        names(parallel={"split": "auto", "workers": 251})
    open_type = {"path": str(tiny_model), "dtype": "auto", "device": "cpu"}
    assert names(model=open_type) == [(1, 1, "bfloat16"), (1, 1, "float32")]
    assert names() == [(1, 1, "float32")]


def opener(curves: dict[tuple[int, int], CostCurve], opened: list):
    """Engines that would have measured these curves, by (lp, tp)."""

    @contextmanager
    def open_engine(config):
        split = config.parallel.lp, config.parallel.tp
        opened.append(split)
        if split not in curves:
            raise ConfigError("parallel.tp", split[1], "has no room", "Give it some.")
        cost.store(config, load_spec(Path(config.model.path)), curves[split])
        yield SimpleNamespace(cost=SimpleNamespace(curve=curves[split]), measure_cost=lambda: curves[split])

    return open_engine


def test_the_fastest_split_is_taken_and_measured_once(tiny_model, capsys):
    """Two replicas that share cheap rows beat two ranks whose single step is faster."""
    config = config_of(
        tiny_model, parallel={"split": "auto", "workers": 2}, scheduler={"max_rows": 33, "max_sequences": 2}
    )
    curves = {
        (2, 1): CostCurve((1, 32), (1.0, 1.1)),
        (1, 2): CostCurve((1, 32), (0.7, 3.0)),
    }
    opened: list = []
    fixed = choose.resolved(config, opener(curves, opened))
    assert (fixed.parallel.lp, fixed.parallel.tp, fixed.parallel.split) == (2, 1, "fixed")
    assert sorted(opened) == [(1, 2), (2, 1)]
    choices = choose.ranked(config, opener(curves, opened))
    assert len(opened) == 2 and choices[0].rows > 8 > choices[1].rows
    choose.ranked(config, opener(curves, opened), remeasure=True)
    assert len(opened) == 4


def test_a_split_that_cannot_run_is_passed_over(tiny_model):
    config = config_of(
        tiny_model, parallel={"split": "auto", "workers": 2}, scheduler={"max_rows": 34, "max_sequences": 2}
    )
    opened: list = []
    curves = {(2, 1): CostCurve((1, 32), (1.0, 1.1))}
    assert choose.resolved(config, opener(curves, opened)).parallel.lp == 2
    with pytest.raises(ConfigError, match="no room"):
        choose.resolved(config.merged({"scheduler": {"max_rows": 35, "max_sequences": 2}}), opener({}, []))


def test_plan_shows_the_curve_the_choice_and_its_reason(tiny_model, capsys, monkeypatch):
    curves = {(2, 1): CostCurve((1, 32), (0.010, 0.011), "today"), (1, 2): CostCurve((1, 32), (0.007, 0.03), "today")}
    monkeypatch.setattr(planning, "open_engine", opener(curves, []))
    config = config_of(
        tiny_model, parallel={"split": "auto", "workers": 2}, scheduler={"max_rows": 36, "max_sequences": 2}
    )
    planning.show(config, remeasure=False, as_json=False)
    out = capsys.readouterr().out
    assert "lp=2 tp=1 float32" in out and "lp=1 tp=2" in out and "10.00" in out and "planner decides" in out
    planning.show(config, remeasure=False, as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["chosen"] == "lp=2 tp=1 float32" and record["choices"][1]["curve"]["rows"] == [1, 32]
    assert record["choices"][0]["plain_tokens_per_s"] == pytest.approx(100)


def test_a_step_is_divided_among_replicas_only_where_that_is_faster():
    curve = CostCurve((1, 8, 64), (2.0, 2.2, 4.0), alone=(1.0, 1.5, 8.0))
    assert curve.table(64)[[1, 8, 64]].tolist() == [1.0, 1.5, 4.0]
    assert curve.shares(64)[[1, 8, 64]].tolist() == [False, False, True]
    running = RunningCost(curve, 64)
    for _ in range(200):
        running.observe(8, 3.0)
    assert running.seconds[8] == pytest.approx(3.0, rel=0.1)
    assert running.now().alone[1] / running.now().seconds[1] == pytest.approx(1.5 / 2.2)
