"""The figures of a load test, on timings made up here, against what a hand computes."""

from __future__ import annotations

import math

import pytest

from cluster.cli.bench import read_paces
from cluster.cli.bench.asking import read_lengths
from cluster.cli.bench.figures import Spread, Timed, read_goals, summed
from cluster.cli.bench.load import Pace, arrivals
from runtime.errors import ConfigError

# Seven tokens in three chunks (2, 4, 1): the first after 0.5 s, the end after 1.7 s.
FIRST = Timed([0.5, 1.1, 1.7], 1.7, num_prompt_tokens=10, num_new_tokens=7)
# Three tokens, a chunk each.
SECOND = Timed([0.1, 0.2, 0.4], 0.4, num_prompt_tokens=20, num_new_tokens=3)
# One token: no time per output token behind the first, and no gap.
THIRD = Timed([0.3], 0.3, num_prompt_tokens=30, num_new_tokens=1)
FAILED = Timed([0.2], 9.0, num_prompt_tokens=40, num_new_tokens=5, error="HTTP 503", message="full")


def test_one_requests_figures() -> None:
    assert FIRST.ttft_s == 0.5 and FIRST.e2el_s == 1.7
    assert FIRST.tpot_s == pytest.approx((1.7 - 0.5) / 6)
    assert FIRST.itl_s == pytest.approx([0.6, 0.6])
    assert SECOND.tpot_s == pytest.approx(0.15)
    assert THIRD.tpot_s is None and THIRD.itl_s == []


def test_a_spread_is_mean_median_and_the_interpolated_99th_percentile() -> None:
    spread = Spread.of([0.001 * value for value in range(1, 102)])
    assert spread is not None
    assert (spread.mean, spread.median, spread.p99) == pytest.approx((51.0, 51.0, 100.0))
    two = Spread.of([0.1, 0.2])
    assert two is not None and (two.mean, two.median, two.p99) == pytest.approx((150.0, 150.0, 199.0))
    assert Spread.of([]) is None


def test_a_loads_figures() -> None:
    figures = summed("2 streams", 2, 4.0, [FIRST, FAILED, SECOND, THIRD], {})
    assert (figures.num_requests, figures.num_answered, figures.errors) == (4, 3, {"HTTP 503": 1})
    assert figures.first_error == "full"
    assert figures.requests_per_s == 3 / 4 and figures.tokens_per_s == 11 / 4
    assert figures.total_tokens_per_s == (11 + 60) / 4
    assert figures.tokens_per_chunk == 11 / 7
    assert figures.ttft is not None and figures.itl is not None and figures.tpot is not None
    assert figures.ttft.mean == pytest.approx(300.0) and figures.ttft.median == pytest.approx(300.0)
    assert figures.tpot.mean == pytest.approx((200 + 150) / 2)
    assert figures.itl.mean == pytest.approx((600 + 600 + 100 + 200) / 4)
    assert figures.itl.median == pytest.approx(400.0)
    assert figures.e2el is not None and figures.e2el.mean == pytest.approx((1700 + 400 + 300) / 3)
    assert figures.num_good is None and figures.good_per_s is None
    record = figures.record()
    assert record["ttft_ms"]["p99"] == figures.ttft.p99 and record["tokens_per_s"] == 11 / 4 and "ttft" not in record


@pytest.mark.parametrize(
    ("goals", "num_good"),
    [
        ("ttft:300", 2),  # 500, 100, 300
        ("ttft:300 tpot:100", 1),  # the one without a tpot meets it
        ("ttft:1000,tpot:199", 2),
        ("e2el:400", 2),
        ("e2el:0.1", 0),
    ],
)
def test_goodput_counts_answers_that_meet_every_goal(goals: str, num_good: int) -> None:
    figures = summed("", 1, 4.0, [FIRST, SECOND, THIRD, FAILED], read_goals(goals))
    assert figures.num_good == num_good and figures.good_per_s == num_good / 4


def test_a_load_without_answers_has_no_figures() -> None:
    figures = summed("", 1, 0.0, [FAILED], {"ttft": 1.0})
    assert (figures.ttft, figures.itl, figures.num_good, figures.tokens_per_chunk) == (None, None, 0, 0.0)
    assert figures.record()["ttft_ms"] is None and math.isfinite(figures.tokens_per_s)


def test_arrivals_are_poisson_and_repeat_with_their_seed() -> None:
    times = arrivals(50.0, 20_001, seed=3)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0.0 and mean == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution: the deviation is the mean, and a share of 1 - 1/e is below it.
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.03)
    assert sum(gap < mean for gap in gaps) / len(gaps) == pytest.approx(1 - 1 / math.e, abs=0.01)
    assert times == arrivals(50.0, 20_001, seed=3) != arrivals(50.0, 20_001, seed=4)


def test_options_that_mean_something() -> None:
    assert read_paces(None, None) == [Pace(concurrency=1)]
    assert read_paces("1,8", None) == [Pace(concurrency=1), Pace(concurrency=8)]
    assert read_paces(None, "0.5") == [Pace(rate=0.5)]
    assert read_lengths("64") == (64, 64) and read_lengths("64:4000") == (64, 4000)
    assert read_goals("ttft:500,tpot:20") == {"ttft": 500.0, "tpot": 20.0} and read_goals(None) == {}


@pytest.mark.parametrize("text", ["0", "x", "1,", "1.5", "-1", "99999"])
def test_a_concurrency_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="^--concurrency"):
        read_paces(text, None)


def test_other_options_that_mean_nothing_are_refused() -> None:
    for rates in ("0", "nan", "inf", "x"):
        with pytest.raises(ConfigError, match="^--request-rate"):
            read_paces(None, rates)
    with pytest.raises(ConfigError, match="Give one of them"):
        read_paces("1", "1")
    for text in ("0", "9:3", "x", "-1"):
        with pytest.raises(ConfigError, match="^--prompt-tokens"):
            read_lengths(text)
    for text in ("ttft", "itl:3", "ttft:0", "ttft:x", "tpot:inf"):
        with pytest.raises(ConfigError, match="^--goodput"):
            read_goals(text)
