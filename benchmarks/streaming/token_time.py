"""Time of one decoded token: against the size of the cache, and against the position in an endless text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from rich.progress import track

from benchmarks.common import full, plot_lines, print_table, progress, sink, stderr
from runtime.config import Config, SamplingParams
from runtime.engine.engine import Engine

RESTING_POSITION = 10_000
FEED_TURN = 8192
"""Tokens per turn while a text is fed: nothing longer is ever in one piece."""

PAPER_MS = {256: (63, 31), 4096: (1411, 65)}
"""Cache size -> ms per token (recomputation, streaming) of Llama-2-7B on an A6000: StreamingLLM's figure 10."""


@dataclass
class Pair:
    """Two ways to make a token, measured in turns."""

    streaming: list[float] = field(default_factory=list)
    """Seconds per token, round by round."""
    other: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over the rounds of other / streaming."""
        return median(b / a for a, b in zip(self.streaming, self.other, strict=True))

    def ms(self) -> tuple[float, float]:
        return 1e3 * median(self.streaming), 1e3 * median(self.other)


def measure_latency(
    config: Config, sizes: Sequence[int], token_ids: np.ndarray, rounds: int, per_round: int = 8
) -> dict[int, Pair]:
    """Decoding with a full cache of each size beside a fresh prefill of that many tokens for one token, alternating."""
    results = {}
    with Engine.from_config(_alone(config, cache=full(max(sizes) + 16))) as dense:
        for size in track(sizes, "cache sizes", console=stderr, transient=True):
            prompt = token_ids[:size].tolist()
            pair = results[size] = Pair()
            with Engine.from_config(_alone(config, cache=sink(size))) as streaming:
                steps = streaming.stream(prompt, _endlessly())
                _seconds(steps, 2)
                for number in range(rounds):
                    for one in (True, False) if number % 2 else (False, True):
                        if one:
                            pair.streaming.append(median(_seconds(steps, per_round)))
                        else:
                            pair.other += _seconds(dense.stream(prompt, SamplingParams(max_new_tokens=1)), 1)
                steps.close()  # type: ignore[attr-defined]
    return results


def report_latency(results: dict[int, Pair], rounds: int, out: Path | None) -> list[dict[str, Any]]:
    """Print and draw; returns the figures for the JSON line."""
    rows, figures = [], []
    for size, pair in results.items():
        streaming, recomputed = pair.ms()
        theirs = PAPER_MS.get(size)
        quoted = [str(theirs[0]), str(theirs[1]), f"{theirs[0] / theirs[1]:.1f}"] if theirs else ["", "", ""]
        rows.append([str(size), f"{recomputed:.1f}", f"{streaming:.1f}", f"{pair.ratio:.1f}", *quoted])
        figures.append({"cache_size": size, "streaming_ms": streaming, "recompute_ms": recomputed, "ratio": pair.ratio})
    title = f"ms per token by cache size, medians of {rounds} alternating rounds"
    theirs_are = "StreamingLLM's (fig. 10, Llama-2-7B on an A6000): recomputed"
    columns = ["cache size", "recomputed", "streaming", "ratio", theirs_are, "streaming", "ratio"]
    print_table(title, columns, rows)
    if out:
        sizes = list(results)
        lines = {
            "window, recomputed": (sizes, [pair.ms()[1] for pair in results.values()]),
            "streaming": (sizes, [pair.ms()[0] for pair in results.values()]),
        }
        settings = {"xscale": "log", "yscale": "log", "xticks": sizes, "xticklabels": sizes}
        labels = ("cache size", "ms per token")
        plot_lines(out / "latency.png", "time per token by cache size", labels, lines, **settings)
    return figures


class Stream:
    """A conversation with an engine that is fed an endless text and, between pieces, decodes."""

    def __init__(self, engine: Engine, token_ids: np.ndarray) -> None:
        self._engine, self._token_ids = engine, token_ids
        self._session = engine.open_session()
        self.position = 0
        """Tokens of the sequence that have been read."""

    def feed(self, target: int, update: Callable[[int], object]) -> None:
        """Read the text, repeated as often as it takes, until the sequence has `target` tokens, or one more."""
        while self.position < target:
            count = min(FEED_TURN, target - self.position)
            ids = np.take(self._token_ids, range(self.position, self.position + count), mode="wrap")
            self._turn(ids.tolist(), 1)
            update(self.position)

    def decode(self, num_tokens: int) -> list[float]:
        """Seconds of each of `num_tokens` one-token steps."""
        prompt = np.take(self._token_ids, [self.position], mode="wrap").tolist()
        return self._turn(prompt, num_tokens + 1)[1:]

    def _turn(self, prompt: list[int], num_new: int) -> list[float]:
        """Seconds until each new token; the first one's are the prompt's, too."""
        sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
        times, started = [], time.perf_counter()
        for output in self._engine.stream(prompt, sampling, session=self._session):
            times.append(time.perf_counter() - started)
            self.position, started = output.usage.num_seen_tokens, time.perf_counter()
        return times


@dataclass(frozen=True)
class Checkpoint:
    """What a token costs at one position of the endless text."""

    position: int
    pair: Pair
    """The long stream (streaming) against the resting one (other)."""
    resident_bytes: int
    fed_per_s: float
    """Tokens per second while the text was fed up to here."""


def measure_endless(
    config: Config, size: int, token_ids: np.ndarray, max_position: int, rounds: int, per_round: int = 8
) -> list[Checkpoint]:
    """Feed a text up to `max_position`; at every power of ten, decode in turns with a stream that rests near
    position 10,000."""
    positions = [10**power for power in range(3, 20) if 10**power < max_position] + [max_position]
    checkpoints = []
    scheduler = config.scheduler.merged({"max_sequences": 2, "max_sessions": 2})
    with Engine.from_config(_alone(config, cache=sink(size), scheduler=scheduler)) as engine:
        long, resting = Stream(engine, token_ids), Stream(engine, token_ids)
        with progress(f"up to {max_position:,} tokens", max_position) as update:
            resting.feed(min(RESTING_POSITION, max_position), lambda _: None)
            for position in positions:
                before, started = long.position, time.perf_counter()
                long.feed(position, update)
                fed_per_s = (long.position - before) / (time.perf_counter() - started)
                pair = Pair()
                for number in range(rounds):
                    for stream in (long, resting) if number % 2 else (resting, long):
                        times = pair.streaming if stream is long else pair.other
                        times.append(median(stream.decode(per_round)))
                resident = psutil.Process().memory_info().rss
                checkpoints.append(Checkpoint(position, pair, resident, fed_per_s))
    return checkpoints


def report_endless(
    checkpoints: Sequence[Checkpoint], size: int, rounds: int, dtype: str, out: Path | None
) -> list[dict[str, Any]]:
    """Print and draw; returns the figures for the JSON line."""
    rows, figures = [], []
    for point in checkpoints:
        long, resting = point.pair.ms()
        ratio, megabytes = 1 / point.pair.ratio, point.resident_bytes / 2**20
        shown = [f"{long:.1f}", f"{resting:.1f}", f"{ratio:.3f}", f"{megabytes:.0f}", f"{point.fed_per_s:.0f}"]
        rows.append([f"{point.position:,}", *shown])
        figures.append(
            {"position": point.position, "ms": long, "resting_ms": resting, "ratio": ratio, "resident_mib": megabytes}
        )
    title = f"ms per token by position, sink cache of {size} tokens, {dtype}, medians of {rounds} alternating rounds"
    columns = ["ms", f"ms resting near {RESTING_POSITION:,}", "ratio", "resident MiB", "fed tokens/s"]
    print_table(title, ["position", *columns], rows)
    if out:
        xs = [point.position for point in checkpoints]
        lines = {
            "at this position": (xs, [point.pair.ms()[0] for point in checkpoints]),
            f"resting near {RESTING_POSITION:,}": (xs, [point.pair.ms()[1] for point in checkpoints]),
        }
        labels = ("position", "ms per token")
        plot_lines(out / "endless.png", "time per token by position", labels, lines, xscale="log", ylim=(0, None))
    return figures


def _alone(config: Config, **sections: Any) -> Config:
    """One process, one token per step."""
    return config.merged({"parallel": {}, "lookahead": {"enabled": False}, **sections})


def _endlessly() -> SamplingParams:
    return SamplingParams(max_new_tokens=2**30, ignore_eos=True)


def _seconds(steps: Iterator[Any], count: int) -> list[float]:
    """Time of each of the next `count` items."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - started)
    return times
