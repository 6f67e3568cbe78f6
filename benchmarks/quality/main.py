"""What cache policies cost in quality, each with the share of keys and values it keeps.

GSM8K, 8-shot chain of thought (`--gsm8k`, `--fewshot`): perplexity of the reference answers, given the prompt, under
full attention, sep, and sink caches at least as large as what sep keeps on these texts; with `--generate M`, exact
match of greedy answers to the first M problems. And a StreamEval-style retrieval test, which needs no data: from how
many lines back each policy still answers.

    python -m benchmarks.quality --gsm8k test.jsonl --fewshot train.jsonl --limit 40 --generate 20 --out out
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

from benchmarks.common import (
    check_parts,
    full,
    mean_and_error,
    perplexity,
    print_json,
    print_table,
    progress,
    sep,
    sink,
    stderr,
)
from benchmarks.quality import gsm8k, stream_eval
from runtime.config import CacheConfig, Config, SamplingParams
from runtime.engine.engine import Engine
from runtime.engine.scoring import Scorer

PARTS = ("gsm8k", "streameval")
MAX_ANSWER = 320
"""Most tokens of a generated answer."""


def main(
    part: Annotated[list[str] | None, typer.Option(help="gsm8k, streameval; default: what there is data for.")] = None,
    gsm8k_file: Annotated[
        Path | None, typer.Option("--gsm8k", exists=True, dir_okay=False, help="GSM8K problems, JSON lines.")
    ] = None,
    fewshot: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Solved problems for the prompt, JSON lines.")
    ] = None,
    num_shots: int = 8,
    limit: Annotated[int, typer.Option(help="gsm8k: problems whose answers are scored.")] = 40,
    generate: Annotated[int, typer.Option(help="gsm8k: problems answered by generation, too.")] = 0,
    num_neighbors: Annotated[int, typer.Option(help="sep: n.")] = 256,
    lines: Annotated[int, typer.Option(help="streameval: lines of the text.")] = 600,
    numbered: Annotated[bool, typer.Option(help="streameval: call lines by numbers, not by words.")] = False,
    distances: Annotated[str, typer.Option(help="streameval: lines back, comma-separated.")] = "5,10,20,40,80",
    cache_size: Annotated[int, typer.Option(help="streameval: tokens a bounded cache holds.")] = 1024,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    config: Annotated[Path | None, typer.Option(help="Run config, YAML; its cache section is not used.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write plots (PNG) into this directory.")] = None,
) -> None:
    """Measure quality, policy by policy."""
    data = gsm8k_file is not None and fewshot is not None
    parts = set(part or (PARTS if data else ("streameval",)))
    check_parts(parts, PARTS)
    if "gsm8k" in parts and not data:
        raise typer.BadParameter("gsm8k wants --gsm8k FILE and --fewshot FILE.", param_hint="--part")
    run_config = Config.load(config, set_)
    if threads:
        torch.set_num_threads(threads)
    result: dict[str, Any] = {"benchmark": "quality", "config": run_config.model_dump(mode="json")}
    scorer = Scorer(run_config)
    if "gsm8k" in parts:
        assert gsm8k_file is not None and fewshot is not None
        shots = gsm8k.read_problems(fewshot, num_shots)
        problems = gsm8k.read_problems(gsm8k_file, limit)
        scores = score_answers(scorer, shots, problems, num_neighbors)
        exact = count_exact(run_config, scores, shots, problems[:generate]) if generate else {}
        result["gsm8k"] = report_gsm8k(scores, exact, len(shots))
    if "streameval" in parts:
        back = [int(distance) for distance in distances.split(",")]
        if not max(back) + stream_eval.LINES_BETWEEN_QUESTIONS < lines <= stream_eval.MAX_LINES:
            least = max(back) + stream_eval.LINES_BETWEEN_QUESTIONS + 1
            problem = f"{lines}: distances up to {max(back)} want {least} to {stream_eval.MAX_LINES} lines."
            raise typer.BadParameter(problem, param_hint="--lines")
        stream = stream_eval.make_stream(scorer.tokenizer.encode, lines, back, words=not numbered)
        result["streameval"] = stream_eval.report(
            stream_eval.retrieve(scorer, stream, cache_size, num_neighbors), stream, out
        )
    if missing := set(PARTS) - parts:
        stderr.print(f"left out: {', '.join(sorted(missing))}")
    print_json(result)


# GSM8K


@dataclass
class Answers:
    """One policy's view of the reference answers."""

    cache: CacheConfig
    log_probs: list[np.ndarray] = field(default_factory=list)
    """Per problem, of its answer's tokens."""
    kept_last: list[float] = field(default_factory=list)
    kept_sum: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return perplexity(np.concatenate(self.log_probs))

    def against(self, other: Answers) -> tuple[float, float]:
        """Mean difference in log-probability per token, and its standard error over the problems."""
        pairs = zip(self.log_probs, other.log_probs, strict=True)
        return mean_and_error([float(ours.mean() - theirs.mean()) for ours, theirs in pairs])


def score_answers(
    scorer: Scorer, shots: Sequence[gsm8k.Problem], problems: Sequence[gsm8k.Problem], num_neighbors: int
) -> dict[str, Answers]:
    """Teacher-forced log-probabilities of the answers. The sink caches are the smallest that keep what sep keeps."""
    texts = [gsm8k.tokenise(scorer.tokenizer.encode, shots, problem) for problem in problems]
    lengths = [len(prompt) + len(answer) for prompt, answer in texts]
    capacity = max(lengths) + MAX_ANSWER
    results: dict[str, Answers] = {}

    def score(name: str, cache: CacheConfig) -> Answers:
        policy, result = scorer.with_policy(cache), Answers(cache)
        with progress(name, sum(lengths)) as update:
            for done, (prompt, answer) in enumerate(texts):
                score = policy.score([*prompt, *answer])
                result.log_probs.append(score.log_probs[len(prompt) - 1 :])
                result.kept_last.append(score.kept_last)
                result.kept_sum.append(score.kept_sum)
                update(sum(lengths[: done + 1]))
        stderr.print(f"{name}: perplexity {result.perplexity:.3f}")
        results[name] = result
        return result

    score("full", full(capacity))
    kept = score(f"sep n={num_neighbors}", sep(capacity, num_neighbors))
    size = equal_size(lengths, float(np.mean(kept.kept_last)), float(np.mean(kept.kept_sum)))
    without_separators = num_neighbors + (kept.cache.num_initial or 0)
    score(f"sink {without_separators}, sep's window", sink(without_separators))
    score(f"sink {size}", sink(size))
    score(f"sink {size}, original", sink(size, positions="original"))
    score(f"window {size}, no sinks", sink(size, num_sinks=0))
    return results


def equal_size(lengths: Sequence[int], kept_last: float, kept_sum: float) -> int:
    """The smallest cache (sinks and window) that keeps, on average over texts of these lengths, at least these shares
    of the keys and values: at the last token, and summed over all tokens."""

    def enough(size: int) -> bool:
        last = np.mean([min(size, n) / n for n in lengths])
        summed = np.mean([np.minimum(np.arange(1, n + 1), size).sum() / (n * (n + 1) / 2) for n in lengths])
        return bool(last >= kept_last and summed >= kept_sum)

    low, high = 1, max(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


@dataclass
class Exact:
    """Exact matches of generated answers."""

    num_problems: int = 0
    strict: int = 0
    """The number after "The answer is"."""
    flexible: int = 0
    """The last number of the answer."""
    num_tokens: int = 0
    num_steps: int = 0


def count_exact(
    config: Config, scores: Mapping[str, Answers], shots: Sequence[gsm8k.Problem], problems: Sequence[gsm8k.Problem]
) -> dict[str, Exact]:
    """Greedy answers under each policy, lookahead as configured."""
    results = {}
    for name, answers in scores.items():
        exact = results[name] = Exact()
        with Engine.from_config(config.merged({"cache": answers.cache})) as engine:
            for problem in track(problems, f"{name}, generating", console=stderr, transient=True):
                text = generate_answer(engine, gsm8k.prompt(shots, problem), exact)
                exact.num_problems += 1
                exact.strict += gsm8k.strict_answer(text) == problem.number
                exact.flexible += gsm8k.flexible_answer(text) == problem.number
        stderr.print(f"{name}: {exact.strict} strict, {exact.flexible} flexible of {exact.num_problems}")
    return results


def generate_answer(engine: Engine, prompt: str, exact: Exact) -> str:
    """The answer's text, up to where it gives its number or goes on to another question."""
    text_ids: list[int] = []
    for output in engine.stream(prompt, SamplingParams(max_new_tokens=MAX_ANSWER)):
        text_ids += output.text_ids
        exact.num_tokens += len(output.token_ids)
        exact.num_steps += 1
        if gsm8k.finished(engine.tokenizer.decode(text_ids)):
            break
    return engine.tokenizer.decode(text_ids)


def report_gsm8k(scores: Mapping[str, Answers], exact: Mapping[str, Exact], num_shots: int) -> dict[str, Any]:
    rows, figures = [], []
    reference = scores["full"]
    for name, answers in scores.items():
        kept = float(np.mean(answers.kept_last)), float(np.mean(answers.kept_sum))
        difference, error = answers.against(reference)
        row = [name, f"{kept[0]:.3f}", f"{kept[1]:.3f}", f"{answers.perplexity:.3f}"]
        row.append("" if answers is reference else f"{difference:+.4f} ± {error:.4f}")
        figure: dict[str, Any] = {
            "policy": name,
            "cache": answers.cache.model_dump(mode="json", exclude_none=True),
            "kept_last": kept[0],
            "kept_sum": kept[1],
            "answer_perplexity": answers.perplexity,
            "log_prob_against_full": difference,
            "standard_error": error if math.isfinite(error) else None,
        }
        if name in exact:
            found = exact[name]
            row += [f"{found.strict}/{found.num_problems}", f"{found.flexible}/{found.num_problems}"]
            row.append(f"{found.num_tokens / found.num_steps:.2f}")
            figure |= vars(found)
        rows.append(row)
        figures.append(figure)
    num_tokens = sum(values.size for values in reference.log_probs)
    title = f"GSM8K, {num_shots} shots, {len(reference.log_probs)} reference answers of {num_tokens} tokens"
    columns = ["policy", "kept at the last token", "kept, summed", "perplexity", "log-probability against full"]
    print_table(title, columns + (["strict", "flexible", "tokens/step"] if exact else []), rows)
    return {
        "num_shots": num_shots,
        "num_problems": len(reference.log_probs),
        "num_answer_tokens": num_tokens,
        "policies": figures,
    }
