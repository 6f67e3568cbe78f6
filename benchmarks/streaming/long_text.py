"""Perplexity over a long text, token by token, under each cache policy, and with the window recomputed for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    full,
    mean_and_error,
    perplexity,
    plot_lines,
    print_table,
    progress,
    sep,
    sep_streaming,
    sep_streaming_as_published,
    sink,
    stderr,
)
from runtime.config import CacheConfig
from runtime.engine.scoring import Scorer

RECOMPUTE = "window, recomputed"
"""Dense attention over the last `size` tokens from scratch for each token: what a bounded cache is measured by."""


def policies(size: int, length: int) -> dict[str, CacheConfig]:
    """The policies to compare: caches of `size` tokens, then those that grow with a text of `length`."""
    return {
        "sink": sink(size),
        "sink, original": sink(size, positions="original"),
        "window, no sinks": sink(size, num_sinks=0),
        "sep streaming": sep_streaming(size),
        "sep streaming, paper's shares": sep_streaming_as_published(size),
        "sep n=256": sep(length),
        "full": full(length),
    }


@dataclass
class Scores:
    """What one policy made of all texts."""

    cache: CacheConfig
    log_probs: list[np.ndarray] = field(default_factory=list)
    """Per text [n - 1]: of token i + 1, given tokens 0..i."""
    kept_last: list[float] = field(default_factory=list)
    kept_sum: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def between(self, start: int, end: int) -> float:
        """Perplexity of what was predicted at positions [start, end) of each text."""
        return perplexity(np.concatenate([values[start:end] for values in self.log_probs]))


@dataclass(frozen=True)
class Sample:
    """The same few positions of each text under every policy."""

    positions: np.ndarray
    """Of the newest token known, ascending."""
    recomputed: np.ndarray
    """[texts, positions] log-probabilities of the token after it, from a fresh forward."""

    def of(self, scores: Scores) -> np.ndarray:
        return np.stack([values[self.positions] for values in scores.log_probs])

    def against(self, scores: Scores) -> tuple[float, float]:
        """How much likelier the tokens were under a policy, in the mean, and its standard error."""
        return mean_and_error((self.of(scores) - self.recomputed).ravel())


def score_policies(scorer: Scorer, caches: Mapping[str, CacheConfig], texts: Sequence[list[int]]) -> dict[str, Scores]:
    """Every text under every policy."""
    total = sum(len(text) for text in texts)
    results = {}
    for name, cache in caches.items():
        result, done = Scores(cache), 0
        policy = scorer.with_policy(cache)
        with progress(name, total) as update:
            for text in texts:

                def advance(count: int, before: int = done) -> None:
                    update(before + count)

                score = policy.score(text, advance)
                result.log_probs.append(score.log_probs)
                result.kept_last.append(score.kept_last)
                result.kept_sum.append(score.kept_sum)
                result.seconds += score.seconds
                done += len(text)
        stderr.print(f"{name}: perplexity {result.between(0, total):.2f}, {total / result.seconds:.0f} tokens/s")
        results[name] = result
    return results


def recompute(scorer: Scorer, texts: Sequence[list[int]], size: int, num_samples: int) -> Sample:
    """Log-probabilities at `num_samples` positions of each text, spread evenly over those with `size` tokens behind
    them, each by a fresh forward over the last `size` tokens."""
    shortest = min(len(text) for text in texts)
    positions = np.linspace(size - 1, shortest - 2, min(num_samples, shortest - size)).round().astype(int)
    dense = scorer.with_policy(full(size + 1))
    values: list[float] = []
    with progress(RECOMPUTE, len(texts) * len(positions)) as update:
        for text in texts:
            for position in positions:
                values.append(dense.score(text[position - size + 1 : position + 2]).log_probs[-1])
                update(len(values))
    return Sample(positions, np.array(values).reshape(len(texts), len(positions)))


def report(
    results: Mapping[str, Scores], sample: Sample | None, segment: int, trained: int, size: int, out: Path | None
) -> dict[str, Any]:
    """Print and draw perplexities; returns them for the JSON line."""
    length = max(len(values) for scores in results.values() for values in scores.log_probs)
    num_texts = len(next(iter(results.values())).log_probs)
    starts = range(0, length, segment)
    spans = {f"{start} - {min(start + segment, length)}": (start, start + segment) for start in starts}
    totals = {f"to {trained}": (0, trained), f"past {trained}": (trained, length), "all": (0, length)}
    if length <= trained:
        totals = {"all": (0, length)}
    rows = [
        [name, *(f"{scores.between(*span):.2f}" for scores in results.values())]
        for name, span in (spans | totals).items()
    ]
    for name, pick in (("kept at the last token", "kept_last"), ("kept, summed", "kept_sum")):
        rows.append([name, *(f"{np.mean(getattr(scores, pick)):.3f}" for scores in results.values())])
    rows.append(["tokens/s", *(f"{num_texts * length / scores.seconds:.0f}" for scores in results.values())])
    title = f"perplexity by position, {num_texts} text(s), caches of {size} tokens, trained on {trained}"
    print_table(title, ["positions", *results], rows)
    if sample is not None:
        print_table(
            f"the same {sample.recomputed.size} positions past {size}, against {RECOMPUTE}",
            ["policy", "perplexity", "log-probability against recomputed"],
            [[RECOMPUTE, f"{perplexity(sample.recomputed):.2f}", ""]]
            + [
                [name, f"{perplexity(sample.of(scores)):.2f}", "{:+.3f} ± {:.3f}".format(*sample.against(scores))]
                for name, scores in results.items()
            ],
        )
    if out:
        lines = {
            name: ([start + segment / 2 for start, _ in spans.values()], [scores.between(*s) for s in spans.values()])
            for name, scores in results.items()
        }
        plot_lines(out / "perplexity.png", title, ("position", f"perplexity per {segment} tokens"), lines, yscale="log")
    return {
        "num_texts": num_texts,
        "num_tokens": length + 1,
        "cache_size": size,
        "segment": segment,
        "trained": trained,
        "policies": [
            {
                "policy": name,
                "cache": scores.cache.model_dump(mode="json", exclude_none=True),
                "perplexity": {total: scores.between(*span) for total, span in totals.items()},
                "segments": [scores.between(*span) for span in spans.values()],
                "kept_last": float(np.mean(scores.kept_last)),
                "kept_sum": float(np.mean(scores.kept_sum)),
                "sample_perplexity": perplexity(sample.of(scores)) if sample else None,
                "seconds": scores.seconds,
            }
            for name, scores in results.items()
        ],
        "recomputed_sample_perplexity": perplexity(sample.recomputed) if sample else None,
        "num_samples": sample.recomputed.size if sample else 0,
    }
