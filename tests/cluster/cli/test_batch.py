"""Batches: records in, records out, in order, whatever some of them are."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest

from cluster.cli import batch
from cluster.wire.answers import Chunk
from runtime.errors import ConfigError, InvalidRequestError
from runtime.request import FinishReason, Usage


class Echo:
    """Answers with the prompt's own characters, two per step; remembers what it was asked."""

    def __init__(self, delays=()):
        self.calls, self.closed, self.most_at_once = [], False, 0
        self._delays, self._live, self._lock = dict(delays), 0, threading.Lock()

    def stream(self, prompt, sampling, lookahead):
        with self._lock:
            self.calls.append((prompt, dict(sampling), dict(lookahead)))
            self._live += 1
            self.most_at_once = max(self.most_at_once, self._live)
        if prompt == "refuse me":
            raise InvalidRequestError("prompt", prompt, "is refused", "Ask for something else.")
        if prompt == "interrupt":
            raise KeyboardInterrupt
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        time.sleep(self._delays.get(text, 0))
        usage = Usage(num_prompt_tokens=1, num_new_tokens=3, num_steps=2, num_rows=8, ttft_s=0.1, latency_s=0.2)
        usage = dataclasses.replace(usage, num_seen_tokens=4, kept_last=0.5, kept_sum=0.75)
        yield Chunk("r", text[:1], (1, 2), 1, None, None)
        yield Chunk("r", text[1:], (3,), 0, FinishReason.STOP, usage)
        with self._lock:
            self._live -= 1

    def close(self):
        self.closed = True


def run(tmp_path, lines, backend=None, **options):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    backend = backend or Echo()
    totals = batch.run(source, target, backend, defaults=options.pop("defaults", {}), **options)
    return [json.loads(line) for line in target.read_text().rstrip("\n").split("\n")], totals, backend


def test_record_has_every_field(tmp_path):
    (result,), totals, _ = run(tmp_path, [{"id": "a", "prompt": "hello"}])
    assert result == {
        "id": "a",
        "text": "hello",
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "num_prompt_tokens": 1,
        "num_new_tokens": 3,
        "num_steps": 2,
        "tokens_per_step": 1.5,
        "rows_per_step": 4.0,
        "ttft_s": 0.1,
        "latency_s": 0.2,
        "num_seen_tokens": 4,
        "kept_last": 0.5,
        "kept_sum": 0.75,
    }
    assert (totals.num_records, totals.num_errors, totals.num_tokens, totals.num_steps) == (1, 0, 3, 2)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_order_of_the_input_is_kept(tmp_path, concurrency):
    prompts = [f"p{index}" for index in range(6)]
    backend = Echo(delays={"p0": 0.2, "p3": 0.1})
    results, _, _ = run(tmp_path, [{"prompt": prompt} for prompt in prompts], backend, concurrency=concurrency)
    assert [result["text"] for result in results] == prompts
    assert backend.most_at_once == concurrency


def test_bad_lines_get_errors_and_the_rest_is_answered(tmp_path):
    lines = [
        {"id": 1, "prompt": "one"},
        "{not json",
        {"id": 3, "prompt": "three", "temprature": 0.5},
        {"id": 4, "prompt": "four", "messages": []},
        {"id": 5},
        "[1, 2]",
        "",
        {"id": 8, "prompt": 7},
        {"id": 9, "token_ids": [1, "x"]},
        {"id": 10, "prompt": "x", "lookahead": "off"},
        {"id": 11, "prompt": "refuse me"},
        {"id": 12, "prompt": "last"},
    ]
    results, totals, _ = run(tmp_path, lines)
    assert [result["id"] for result in results] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [index for index, result in enumerate(results) if "error" not in result] == [0, 11]
    assert totals.num_errors == 10
    assert "temprature" in results[2]["error"] and "temperature" in results[2]["error"]  # the key, and what is known
    assert "is refused" in results[10]["error"]
    assert all(set(result) == {"id", "error"} for result in results[1:11])


@pytest.mark.parametrize(
    ("record", "expected_id", "expected_prompt"),
    [
        ({"prompt": "raw"}, 1, "raw"),
        ({"id": "x", "question_id": 7, "prompt": "raw"}, "x", "raw"),
        ({"task_id": "HumanEval/1", "prompt": "def f", "entry_point": "f", "test": ""}, "HumanEval/1", "def f"),
        (
            {"question_id": 81, "category": "writing", "turns": ["first", "second"], "reference": []},
            81,
            [{"role": "user", "content": "first"}],
        ),
        ({"messages": [{"role": "user", "content": "hi"}]}, 1, [{"role": "user", "content": "hi"}]),
        ({"token_ids": [5, 6]}, 1, [5, 6]),
    ],
)
def test_forms_of_a_record(record, expected_id, expected_prompt):
    parsed = batch.parse(json.dumps(record), 1)
    assert (parsed.id, parsed.prompt) == (expected_id, expected_prompt)


def test_parameters_of_the_record_come_before_the_defaults(tmp_path):
    record = {"prompt": "x", "max_new_tokens": 5, "seed": 3, "lookahead": {"enabled": False}}
    defaults = {"sampling": {"max_new_tokens": 9, "temperature": 0.5}, "lookahead": {"window_size": 4}}
    _, _, backend = run(tmp_path, [record, {"prompt": "y"}], defaults=defaults)
    sampling = {"max_new_tokens": 5, "temperature": 0.5, "seed": 3}
    assert backend.calls[0] == ("x", sampling, {"window_size": 4, "enabled": False})
    assert backend.calls[1] == ("y", {"max_new_tokens": 9, "temperature": 0.5}, {"window_size": 4})


def test_limit_takes_the_first_lines(tmp_path):
    results, _, _ = run(tmp_path, [{"prompt": f"p{index}"} for index in range(5)], limit=2)
    assert [result["text"] for result in results] == ["p0", "p1"]


def test_line_separators_inside_a_text_do_not_split_the_line(tmp_path):
    text = "one\u2028two\x85three"  # JSON allows both unescaped
    results, _, _ = run(tmp_path, [json.dumps({"prompt": text}, ensure_ascii=False)])
    assert [result["text"] for result in results] == [text]


def test_interrupted_run_leaves_complete_lines(tmp_path):
    backend = Echo()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "interrupt"}, {"prompt": "four"}], backend)
    text = (tmp_path / "out.jsonl").read_text()
    assert text.endswith("\n") and [json.loads(line)["text"] for line in text.splitlines()] == ["one", "two"]
    assert backend.closed


def test_unreadable_input_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"IN = .*No such file"):
        batch.read_lines(tmp_path / "absent.jsonl", None)
    (tmp_path / "empty.jsonl").write_text("")
    assert batch.read_lines(tmp_path / "empty.jsonl", None) == []
