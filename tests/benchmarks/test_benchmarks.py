"""What the streaming and quality benchmarks feed their models, and how they reckon with what comes back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from benchmarks.common import check_parts, full, perplexity, sep, sep_streaming_as_published, sink
from benchmarks.quality import gsm8k, stream_eval
from benchmarks.quality import main as quality
from benchmarks.streaming import long_text, token_time
from benchmarks.streaming import main as streaming
from runtime.config import CacheConfig, Config, ModelConfig
from runtime.engine.engine import Engine
from runtime.engine.scoring import Scorer
from tests.models import save_tiny_model


def encode(text: str, add_special_tokens: bool = True) -> list[int]:
    """One token per character, and one before the text."""
    return [0] * add_special_tokens + [ord(character) for character in text]


def line(question: str, answer: str) -> str:
    return json.dumps({"question": question, "answer": answer})


SOLUTION = "Half of 48 is <<48/2=24>>24.\nAll: 24+1,000 = <<24+1000=1024>>1,024.\n#### 1,024"
SHOT = gsm8k.Problem.parse(line("How many?", SOLUTION))
PROBLEM = gsm8k.Problem.parse(line("And now?", "Two.\n#### 2"))


def test_gsm8k_prompt_has_no_annotations_and_ends_where_the_answer_begins():
    assert gsm8k.prompt([SHOT], PROBLEM) == (
        "Q: How many?\nA: Half of 48 is 24.\nAll: 24+1,000 = 1,024.\nThe answer is 1024.\n\nQ: And now?\nA:"
    )
    prompt, answer = gsm8k.tokenise(encode, [SHOT], PROBLEM)
    assert prompt[0] == 0 and answer == encode(" Two.\nThe answer is 2.", add_special_tokens=False)


def test_gsm8k_reads_the_first_problems_and_refuses_an_answer_without_a_number(tmp_path: Path):
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(line(f"{number}?", f"#### {number}") for number in range(3)) + "\n\n")
    assert [problem.number for problem in gsm8k.read_problems(file, 2)] == ["0", "1"]
    assert len(gsm8k.read_problems(file)) == 3
    with pytest.raises(ValueError, match="####"):
        gsm8k.Problem.parse(line("?", "no number"))


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 3 + 4 = 7. The answer is 7.", "7", "7"),
        (" The answer is $1,200.\n\nQ: And 9?\nA: The answer is 9.", "1200", "1200"),
        (" So she has 3.50 left", None, "3.50"),
        (" It is -5 degrees", None, "-5"),
        (" nothing", None, None),
        (" The answer is unclear", None, None),
    ],
)
def test_gsm8k_answers_are_read_strictly_and_flexibly(text: str, strict: str | None, flexible: str | None):
    assert (gsm8k.strict_answer(text), gsm8k.flexible_answer(text)) == (strict, flexible)


def test_gsm8k_generation_ends_only_after_the_whole_number():
    assert not gsm8k.finished(" The answer is 12")
    assert not gsm8k.finished(" The answer is 12.")  # 12.5 may come
    assert gsm8k.finished(" The answer is 12.\n")
    assert gsm8k.finished(" I do not know.\n\nQ:")


@pytest.mark.parametrize("words", [True, False])
def test_stream_eval_questions_point_at_the_numbers_they_ask_for(words: bool):
    stream = stream_eval.make_stream(encode, num_lines=60, distances=[5, 20], words=words, seed=3)
    text = "".join(map(chr, stream.token_ids))
    names = re.findall(r"(?<!Query: )The REGISTER_CONTENT in line (\S+) is", text)
    assert len(set(names)) == 60
    assert len(stream.questions) == 4  # after lines 29, 39, 49, 59: the first that has 20 lines behind it is 20
    assert [question.num_lines for question in stream.questions] == [5, 20, 5, 20]
    for number, question in enumerate(stream.questions):
        asked = 29 + 10 * number - question.num_lines
        value = text[question.start : question.end]
        source = text.index(f"The REGISTER_CONTENT in line {names[asked]} is <{value}>\n")
        assert text[: question.start].endswith(f"Query: The REGISTER_CONTENT in line {names[asked]} is <")
        assert text.index(value, source) == question.start - question.num_tokens


def test_stream_eval_counts_the_digits_that_are_the_first_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scorer = Scorer(Config(model=ModelConfig(path=str(save_tiny_model(tmp_path))))).with_policy(sink(64))
    stream = stream_eval.make_stream(scorer.tokenizer.encode, num_lines=80, distances=[1])
    five = scorer.tokenizer.encode("5")[0]
    monkeypatch.setattr(type(scorer.decoder), "logits", lambda _, hidden: torch.eye(262)[five].expand(len(hidden), -1))
    values = [stream.token_ids[question.start : question.end] for question in stream.questions]
    answers = stream_eval.answers(stream, scorer.score(stream.token_ids))
    assert [answer.num_right for answer in answers] == [value.count(five) for value in values]
    assert any(answer.num_right for answer in answers) and all(answer.num_tokens == 5 for answer in answers)
    log_probs = torch.eye(262)[five].log_softmax(0)
    for answer, value in zip(answers, values, strict=True):
        assert answer.log_prob == pytest.approx(float(log_probs[value].sum()), abs=1e-4)
    assert not stream_eval.Answer(4, 5, 0.0).right and stream_eval.Answer(5, 5, 0.0).right


def test_equal_size_is_the_smallest_cache_that_keeps_as_much():
    lengths = [40, 100, 333]

    def kept(size: int) -> tuple[float, float]:
        """By counting what each token sees."""
        seen = [[min(size, position + 1) for position in range(length)] for length in lengths]
        last = np.mean([counts[-1] / len(counts) for counts in seen])
        return float(last), float(np.mean([sum(counts) / sum(range(1, len(counts) + 1)) for counts in seen]))

    for size in (1, 37, 99, 250):
        assert quality.equal_size(lengths, *kept(size)) == size
        last, summed = kept(size)
        assert quality.equal_size(lengths, last + 1e-6, summed) == size + 1
        assert quality.equal_size(lengths, last, summed + 1e-6) == size + 1
    assert quality.equal_size(lengths, 1.0, 1.0) == 333


def test_bounded_policies_are_compared_at_equal_capacity():
    for size in (128, 800, 1024):
        caches = long_text.policies(size, 5000)
        assert {name for name, cache in caches.items() if cache.size == size} == {
            "sink",
            "sink, original",
            "window, no sinks",
            "sep streaming",
            "sep streaming, paper's shares",
        }
        assert caches["full"].capacity == caches["sep n=256"].capacity == 5000
    published = sep_streaming_as_published(800)
    assert (published.max_separators, published.local) == (64, 256)


@dataclass
class FakeScore:
    log_probs: np.ndarray
    kept_last: float
    kept_sum: float
    seconds: float = 1.0


@dataclass
class FakeScorer:
    """Gives token t the log-probability -t / 100, and remembers what it was asked to score."""

    cache: CacheConfig = field(default_factory=lambda: full(100))
    scored: list[tuple[CacheConfig, list[int]]] = field(default_factory=list)

    def with_policy(self, cache: CacheConfig) -> FakeScorer:
        return FakeScorer(cache, self.scored)

    def score(self, token_ids: Sequence[int], on_progress: Callable[[int], object] | None = None) -> FakeScore:
        self.scored.append((self.cache, list(token_ids)))
        if on_progress:
            on_progress(len(token_ids))
        ids = np.array(token_ids[1:])
        kept = min(1.0, (self.cache.size or len(token_ids)) / len(token_ids))
        return FakeScore(-ids / 100, kept, kept)


def test_perplexity_is_split_by_position():
    scores = long_text.Scores(full(100), [np.log([0.5, 0.5, 0.25]), np.log([0.5, 0.125, 0.25])])
    assert scores.between(0, 1) == pytest.approx(2)
    assert scores.between(1, 2) == pytest.approx(4)
    assert scores.between(2, 3) == pytest.approx(4)
    assert math.isnan(scores.between(3, 9)) and math.isnan(perplexity(np.array([])))


def test_recomputed_positions_see_exactly_the_window_and_the_policies_are_read_at_the_same_ones():
    scorer, text = FakeScorer(), list(range(50))
    sample = long_text.recompute(scorer, [text], size=16, num_samples=4)
    assert list(sample.positions) == [15, 26, 37, 48]
    for position, (cache, ids) in zip(sample.positions, scorer.scored, strict=True):
        assert ids == list(range(position - 15, position + 2))  # the window, and the token scored
        assert cache.policy == "full" and cache.capacity >= len(ids)
    scores = long_text.score_policies(scorer, {"sink": sink(16)}, [text])["sink"]
    assert np.array_equal(sample.of(scores), sample.recomputed)


def test_perplexity_report_speaks_of_every_policy_and_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scorer, texts = FakeScorer(), [list(range(50)), list(range(50, 100))]
    results = long_text.score_policies(scorer, long_text.policies(32, 50), texts)
    sample = long_text.recompute(scorer, texts, 32, 5)
    figures = long_text.report(results, sample, segment=10, trained=20, size=32, out=tmp_path)
    assert (tmp_path / "perplexity.png").stat().st_size > 0
    shown = capsys.readouterr().out
    assert "past 20" in shown and all(figure["policy"] in shown for figure in figures["policies"])
    first = figures["policies"][0]
    assert len(first["segments"]) == 5 and set(first["perplexity"]) == {"to 20", "past 20", "all"}
    assert first["kept_last"] == pytest.approx(0.64)
    assert first["sample_perplexity"] == pytest.approx(figures["recomputed_sample_perplexity"])


def test_gsm8k_scores_only_the_answer_and_gives_sinks_what_sep_keeps(capsys: pytest.CaptureFixture[str]):
    scorer = FakeScorer()
    scorer.tokenizer = type("Characters", (), {"encode": staticmethod(encode)})  # type: ignore[attr-defined]
    scores = quality.score_answers(scorer, [SHOT], [PROBLEM, SHOT], num_neighbors=16)  # type: ignore[arg-type]
    answer = np.array(encode(PROBLEM.answer, add_special_tokens=False))
    assert np.array_equal(scores["full"].log_probs[0], -answer / 100)
    longest = max(len(ids) for _, ids in scorer.scored)
    caches = [cache for cache, _ in scorer.scored]
    assert {cache.size for cache in caches if cache.policy == "sink"} == {longest, 20}  # sep kept all here
    figures = quality.report_gsm8k(scores, {"full": quality.Exact(2, 1, 2, 30, 10)}, 1)
    assert [figure["policy"] for figure in figures["policies"]][:2] == ["full", "sep n=16"]
    assert "1/2" in capsys.readouterr().out


def test_retrieval_is_reported_by_distance_and_says_what_is_out_of_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stream = stream_eval.make_stream(encode, num_lines=60, distances=[1, 20])
    right, wrong = stream_eval.Answer(5, 5, -1.0), stream_eval.Answer(3, 5, -7.0)
    results = {
        "sink 200": stream_eval.Retrieval(sink(200), [right, wrong, right, wrong], 0.1, 0.2),
        "full": stream_eval.Retrieval(full(9999), [right, right, right, wrong], 1.0, 1.0),
    }
    figures = stream_eval.report(results, stream, tmp_path)
    assert [figure["accuracy"] for figure in figures["policies"]] == [{1: 1.0, 20: 0.0}, {1: 1.0, 20: 0.5}]
    assert [figure["digit_accuracy"][20] for figure in figures["policies"]] == [0.6, 0.8]
    assert figures["policies"][0]["log_prob"] == {1: -1.0, 20: -7.0}
    assert figures["policies"][0]["reach_tokens"] == 196 and figures["policies"][1]["reach_tokens"] is None
    shown = capsys.readouterr().out
    assert shown.count("(gone)") == 1 and "60% (gone)" in shown
    assert (tmp_path / "retrieval.png").stat().st_size > 0


def test_retrieve_asks_every_question_under_every_policy(tmp_path: Path):
    scorer = Scorer(Config(model=ModelConfig(path=str(save_tiny_model(tmp_path)))))
    stream = stream_eval.make_stream(scorer.tokenizer.encode, num_lines=20, distances=[5])
    results = stream_eval.retrieve(scorer, stream, size=64, num_neighbors=16)
    assert all(len(result.answers) == 2 for result in results.values())
    assert [stream_eval.reach(result.cache) for result in results.values()] == [60, 60, 64, 16, 55, None]
    assert results["full"].kept_sum == 1 > results["sep n=16"].kept_sum


def test_a_text_is_wanted_for_perplexity_and_has_to_be_long_enough():
    with pytest.raises(typer.BadParameter, match="--text FILE"):
        streaming.check_texts([], [], 10)
    with pytest.raises(typer.BadParameter, match="book.txt has 3 tokens"):
        streaming.check_texts([Path("book.txt")], [[1, 2, 3]], 10)
    streaming.check_texts([Path("book.txt")], [[1, 2, 3]], 3)


def test_an_unknown_part_is_refused():
    check_parts(["latency"], streaming.PARTS)
    with pytest.raises(typer.BadParameter, match="speed: no such part"):
        check_parts(["latency", "speed"], streaming.PARTS)


def test_sep_keeps_what_a_text_needs():
    assert (sep(500).capacity, sep(500).num_neighbors, sep(500, 32).num_neighbors) == (500, 256, 32)


# Whole runs on a tiny model


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_endless_stream_is_fed_to_the_token_and_decodes_one_token_per_step(tmp_path: Path):
    config = Config(model=ModelConfig(path=str(save_tiny_model(tmp_path))), cache=sink(32))
    with Engine.from_config(config.merged({"lookahead": {"enabled": False}})) as engine:
        stream = token_time.Stream(engine, np.arange(50))
        fed: list[int] = []
        stream.feed(1000, fed.append)
        assert stream.position == 1000 == fed[-1]
        stream.feed(20_000, fed.append)
        assert 20_000 <= stream.position <= 20_001 and max(np.diff(fed)) <= token_time.FEED_TURN + 1
        steps, position = engine.stats.num_steps, stream.position
        assert len(stream.decode(5)) == 5 and stream.position == position + 7
        assert engine.stats.num_steps - steps == 6  # the first made the token that follows the turn's own


def test_streaming_benchmark_runs_its_three_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "book.txt"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 10)
    streaming.main(
        part=list(streaming.PARTS),
        text=[text],
        tokens=600,
        cache_size=64,
        segment=200,
        recompute_samples=3,
        sizes="32,64",
        max_position=1500,
        rounds=2,
        threads=None,
        config=None,
        set_=[f"model.path={save_tiny_model(tmp_path / 'model')}"],
        out=tmp_path,
    )
    result = last_json(capsys)
    assert [figure["policy"] for figure in result["perplexity"]["policies"]] == list(long_text.policies(64, 600))
    assert result["perplexity"]["num_samples"] == 3
    assert [(row["cache_size"], row["ratio"] > 0) for row in result["latency"]] == [(32, True), (64, True)]
    assert [(row["position"], row["resident_mib"] > 0) for row in result["endless"]] == [(1000, True), (1500, True)]
    assert {path.name for path in tmp_path.glob("*.png")} == {"perplexity.png", "latency.png", "endless.png"}


def test_quality_benchmark_runs_both_parts_and_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quality, "MAX_ANSWER", 16)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(line(f"What is {n} and 1?", f"It is {n + 1}.\n#### {n + 1}") for n in range(4)))
    quality.main(
        part=None,
        gsm8k_file=problems,
        fewshot=problems,
        num_shots=2,
        limit=3,
        generate=1,
        num_neighbors=16,
        lines=20,
        numbered=False,
        distances="1,5",
        cache_size=64,
        threads=None,
        config=None,
        set_=[f"model.path={save_tiny_model(tmp_path / 'model')}"],
        out=tmp_path,
    )
    result = last_json(capsys)
    figures = {figure["policy"].split()[0]: figure for figure in result["gsm8k"]["policies"]}
    assert set(figures) == {"full", "sep", "sink", "window"} and figures["full"]["log_prob_against_full"] == 0
    assert figures["sink"]["kept_last"] >= figures["sep"]["kept_last"] < 1
    assert figures["sink"]["kept_sum"] >= figures["sep"]["kept_sum"]
    assert all(figure["num_problems"] == 1 and figure["num_tokens"] > 0 for figure in figures.values())
    assert result["streameval"]["num_questions"] == 2 and (tmp_path / "retrieval.png").exists()
