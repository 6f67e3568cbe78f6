"""The benchmark of training: its verdicts, its policies at an equal share, and a run of it from end to end."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.training import main as benchmark
from benchmarks.training.orders import ORDERS, Order, verdict
from benchmarks.training.runs import SMALL, Scale, plans
from benchmarks.training.serving import SINKS

STRICT = Order("x", ("worse", "a"), ("better", "b"))
NOT_WORSE = Order("x", ("worse", "a"), ("better", "b"), strict=False)


@pytest.mark.parametrize(
    ("order", "worse", "better", "holds"),
    [
        (STRICT, [2.0, 2.1, 2.2], [1.9, 2.0, 2.1], True),
        (STRICT, [2.0, 2.1, 2.2], [2.1, 2.2, 2.3], False),
        (STRICT, [2.0, 2.5, 2.0], [1.9, 2.7, 1.8], False),  # within two standard errors
        (NOT_WORSE, [2.0, 2.1, 2.2], [2.005, 2.105, 2.205], True),
        (NOT_WORSE, [2.0, 2.1, 2.2], [2.1, 2.2, 2.3], False),
    ],
)
def test_an_order_holds_beyond_two_standard_errors(order, worse, better, holds) -> None:
    losses = {("worse", "a"): np.array(worse), ("better", "b"): np.array(better)}
    assert verdict(order, lambda *key: losses[key])["holds"] is holds


def test_policies_are_compared_at_the_share_that_is_nearest() -> None:
    def share(cache, strided) -> float:
        if strided:
            return 1 / strided["stride"]
        return cache["window"] / SMALL.length if "window" in cache else 0.26

    by_name = {plan.name: plan for plan in plans(SMALL, share)}
    assert by_name["sink"].cache["window"] == 33 and by_name["strided"].strided["stride"] == 4
    served = {*by_name, *(f"{count} + rest" for count in SINKS)}
    assert all({*order.worse, *order.better} <= served for order in ORDERS)


@pytest.mark.slow
def test_a_small_run_trains_serves_and_compares(tmp_path, monkeypatch, capsys) -> None:
    tiny = Scale(**{**asdict(SMALL), **dict(hidden_size=16, intermediate_size=24, vocab_size=280, length=32)})
    tiny = Scale(**{**asdict(tiny), **dict(steps=2, batch_size=2, validation_samples=3, streams=2, stream_length=80)})
    monkeypatch.setattr(benchmark, "SMALL", tiny)
    text = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    words = ["and", "he", "said", "unto", "them,", "lo;", "the", "sea.", "Why?", "came"]
    text.write_text(" ".join(rng.choice(words, 4000)))
    benchmark.main(work=tmp_path / "work", small=True, seeds=1, steps=None, jobs=1, text=text, out=tmp_path / "out")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {order["claim"] for order in result["orders"]} == {order.claim for order in ORDERS}
    assert max(result["training_to_serving"].values()) < 1e-4  # what was trained is what is served
    assert result["shares"]["full"] == 1 and abs(result["shares"]["sink"] - result["shares"]["sep"]) < 0.1
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
