"""A retrieval test for streams, after StreamEval (Xiao et al., 2023, section 4.4, figure 9).

Lines bring numbers, one each; after every tenth, the text asks for the number of an earlier line and, before it
goes on, gives it. How many lines back cycles through a list, so that one text shows up to which distance a cache
policy still answers. The model is right where each token of the number is its first choice, given the text before it.
Lines are called by pairs of words, as in LongEval, or by numbers, as in StreamEval, which small models confuse.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import full, plot_lines, print_table, progress, sep, sep_streaming, sink, stderr
from runtime.config import CacheConfig
from runtime.engine.scoring import Score, Scorer

LINES_BETWEEN_QUESTIONS = 10
PREAMBLE = "Below is a record of lines I want you to remember.\n"
WORDS = (
    "apple river stone cloud tiger green piano table house sugar ocean train bread light chair queen knife paper glass "
    "horse music storm field lemon north beach clock dream eagle flame ghost heart jelly kite laser mango olive pearl "
    "quilt robot salad tower uncle violin wagon zebra"
).split()
MAX_LINES = len(WORDS) ** 2


@dataclass(frozen=True)
class Question:
    """Where a question's answer stands, and how far back the line it asks for."""

    start: int
    end: int
    """Tokens [start, end) of the text are the number's."""
    num_lines: int
    """Lines between the line asked for and the newest one."""
    num_tokens: int
    """Tokens between the first digit of the number in its own line and the question's answer."""


@dataclass(frozen=True)
class Stream:
    """A text with questions in it."""

    token_ids: list[int]
    questions: list[Question]
    tokens_per_line: float
    """Questions counted in: what one more line of distance costs."""


def make_stream(
    encode: Callable[..., Sequence[int]], num_lines: int, distances: Sequence[int], words: bool = True, seed: int = 0
) -> Stream:
    """A text of `num_lines` lines whose questions ask `distances` lines back, in turn; `encode` is a Tokenizer's."""
    rng = random.Random(seed)
    values = [str(rng.randrange(10_000, 100_000)) for _ in range(num_lines)]
    pairs = rng.sample(range(MAX_LINES), num_lines) if words else []
    names = [f"{WORDS[i // len(WORDS)]}-{WORDS[i % len(WORDS)]}" for i in pairs] or [str(i) for i in range(num_lines)]
    token_ids, digits_at = list(encode(PREAMBLE)), [0] * num_lines
    questions: list[Question] = []

    def write(text: str) -> int:
        """Append a piece; returns where it begins."""
        start = len(token_ids)
        token_ids.extend(encode(text, add_special_tokens=False))
        return start

    for line, value in enumerate(values):
        write(f"The REGISTER_CONTENT in line {names[line]} is <")
        digits_at[line] = write(value)
        write(">\n")
        distance = distances[len(questions) % len(distances)]
        if (line + 1) % LINES_BETWEEN_QUESTIONS == 0 and line >= max(distances):
            asked = line - distance
            write(f"Query: The REGISTER_CONTENT in line {names[asked]} is <")
            start = write(values[asked])
            questions.append(Question(start, len(token_ids), distance, start - digits_at[asked]))
            write(">\n")
    return Stream(token_ids, questions, len(token_ids) / num_lines)


@dataclass(frozen=True)
class Answer:
    """What the model made of one question."""

    num_right: int
    """Tokens of the number that were the first choice."""
    num_tokens: int
    log_prob: float
    """Of the whole number."""

    @property
    def right(self) -> bool:
        return self.num_right == self.num_tokens


def answers(stream: Stream, score: Score) -> list[Answer]:
    """What the model expected in place of each number."""
    right = score.first_choices == np.array(stream.token_ids[1:])
    spans = [slice(question.start - 1, question.end - 1) for question in stream.questions]
    return [Answer(int(right[span].sum()), right[span].size, float(score.log_probs[span].sum())) for span in spans]


@dataclass
class Retrieval:
    """One policy's answers to a stream's questions."""

    cache: CacheConfig
    answers: list[Answer]
    """Question by question."""
    kept_last: float
    kept_sum: float


def retrieve(scorer: Scorer, stream: Stream, size: int, num_neighbors: int) -> dict[str, Retrieval]:
    """Answer all questions under each policy."""
    length = len(stream.token_ids)
    caches = {
        f"sink {size}": sink(size),
        f"sink {size}, original": sink(size, positions="original"),
        f"window {size}, no sinks": sink(size, num_sinks=0),
        f"sep n={num_neighbors}": sep(length, num_neighbors),
        f"sep streaming {size}": sep_streaming(size),
        "full": full(length),
    }
    results = {}
    for name, cache in caches.items():
        with progress(name, length) as update:
            score = scorer.with_policy(cache).score(stream.token_ids, update)
        found = answers(stream, score)
        stderr.print(f"{name}: {sum(answer.right for answer in found)} of {len(found)}")
        results[name] = Retrieval(cache, found, score.kept_last, score.kept_sum)
    return results


def reach(cache: CacheConfig) -> int | None:
    """Tokens back from the current one, itself included, that are surely in the cache; None: all of them."""
    return cache.window or cache.num_neighbors or cache.local


def report(results: Mapping[str, Retrieval], stream: Stream, out: Path | None) -> dict[str, Any]:
    """Print accuracy by distance, and draw it; returns the figures for the JSON line."""
    figures: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    by_distance: dict[int, list[int]] = {}
    for number, question in enumerate(stream.questions):
        by_distance.setdefault(question.num_lines, []).append(number)
    asked = stream.questions
    tokens = {lines: int(np.mean([asked[i].num_tokens for i in numbers])) for lines, numbers in by_distance.items()}
    for name, result in results.items():
        window = reach(result.cache)
        accuracy, digits, log_prob, shown = {}, {}, {}, []
        for lines, numbers in by_distance.items():
            found = [result.answers[number] for number in numbers]
            accuracy[lines] = float(np.mean([answer.right for answer in found]))
            digits[lines] = sum(answer.num_right for answer in found) / sum(answer.num_tokens for answer in found)
            log_prob[lines] = float(np.mean([answer.log_prob for answer in found]))
            gone = window is not None and tokens[lines] >= window
            shown.append(f"{accuracy[lines]:.0%} / {digits[lines]:.0%}" + " (gone)" * gone)
        in_reach = "all" if window is None else f"{window} = {window / stream.tokens_per_line:.0f} lines"
        rows.append([name, f"{result.kept_last:.3f}", f"{result.kept_sum:.3f}", in_reach, *shown])
        figures.append(
            {
                "policy": name,
                "cache": result.cache.model_dump(mode="json", exclude_none=True),
                "kept_last": result.kept_last,
                "kept_sum": result.kept_sum,
                "reach_tokens": window,
                "accuracy": accuracy,
                "digit_accuracy": digits,
                "log_prob": log_prob,
            }
        )
    title = f"retrieval over {len(stream.token_ids)} tokens: whole numbers / digits right (gone: out of reach)"
    columns = [f"{lines} lines back, {count} tokens, {len(by_distance[lines])} x" for lines, count in tokens.items()]
    print_table(title, ["policy", "kept at the last token", "kept, summed", "surely kept", *columns], rows)
    if out:
        curves = {figure["policy"]: (list(tokens), list(figure["digit_accuracy"].values())) for figure in figures}
        plot_lines(out / "retrieval.png", "retrieval", ("lines back", "digits right"), curves, ylim=(0, 1))
    return {
        "num_tokens": len(stream.token_ids),
        "num_questions": len(stream.questions),
        "tokens_back": tokens,
        "policies": figures,
    }
