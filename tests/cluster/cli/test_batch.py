"""Batches: records in, records out, in order, whatever some of them are, and whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest

from cluster.cli import batch
from cluster.cli.batch import job, output, progress, records, results
from cluster.wire.answers import Chunk
from cluster.wire.statuses import CallError
from runtime.errors import ConfigError, InvalidRequestError, ResourceExhaustedError, WorkerError
from runtime.request import FinishReason, Usage

ROOT = Path(__file__).resolve().parents[3]


class Echo:
    """Answers with the prompt's own characters, two per step; remembers what it was asked. `script` has what is raised
    instead, by prompt: for each time that it is asked, an error, or a function to call first, or None."""

    def __init__(self, delays=(), script=()):
        self.calls, self.closed, self.most_at_once = [], False, 0
        self.urgencies = []
        self._delays, self._live, self._lock = dict(delays), 0, threading.Lock()
        self._script = {prompt: list(steps) for prompt, steps in dict(script).items()}

    def stream(self, prompt, sampling, lookahead, **urgency):
        with self._lock:
            self.calls.append((prompt, dict(sampling), dict(lookahead)))
            self.urgencies.append(urgency)
            self._live += 1
            self.most_at_once = max(self.most_at_once, self._live)
        try:
            text = prompt if isinstance(prompt, str) else json.dumps(prompt)
            steps = self._script.get(text) or [None]
            step = steps.pop(0)
            if isinstance(step, BaseException):
                raise step
            if step is not None:
                step()
            time.sleep(self._delays.get(text, 0))
            usage = Usage(num_prompt_tokens=1, num_new_tokens=3, num_steps=2, num_rows=8, ttft_s=0.1, latency_s=0.2)
            usage = dataclasses.replace(usage, num_seen_tokens=4, kept_last=0.5, kept_sum=0.75)
            yield Chunk("r", text[:1], (1, 2), 1, None, None)
            yield Chunk("r", text[1:], (3,), 0, FinishReason.STOP, usage)
        finally:
            with self._lock:
                self._live -= 1

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(job, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(job, "LONGEST_WAIT_S", 0.01)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


class Place:
    """A folder with IN and OUT."""

    def __init__(self, folder: Path):
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.partial = folder / "out.jsonl.partial"

    def fill(self, *lines):
        texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
        texts = [text if isinstance(text, bytes) else text.encode() for text in texts]
        self.source.write_bytes(b"".join(text + b"\n" for text in texts))
        return self

    def run(self, backend=None, defaults=None, source=None, target=None, **options):
        backend = backend or Echo()
        totals = batch.Totals()
        batch.run(
            source or self.source,
            target or self.target,
            lambda: (backend, defaults or {}),
            totals=totals,
            **options,
        )
        return totals

    def results(self, path=None):
        text = (path or self.target).read_bytes().decode("utf-8")
        assert not text or text.endswith("\n")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def texts(self, path=None):
        return [result.get("text") for result in self.results(path)]

    @property
    def names(self):
        return sorted(path.name for path in self.target.parent.iterdir())


def prompts(*texts):
    return [{"id": text, "prompt": text} for text in texts]


FULL = ResourceExhaustedError("scheduler.max_waiting", 2, "the queue is full", "Try again later.")


def call_error(code, details="scripted"):
    return CallError("host:1", code, details)


# Answers


def test_record_has_every_field(place):
    totals = place.fill({"id": "a", "prompt": "hello"}).run()
    assert place.results() == [
        {
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
    ]
    assert (totals.num_records, totals.num_errors, totals.num_tokens, totals.num_steps) == (1, 0, 3, 2)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_order_of_the_input_is_kept(place, concurrency):
    texts = [f"p{index}" for index in range(6)]
    backend = Echo(delays={"p0": 0.2, "p3": 0.1})
    place.fill(*prompts(*texts)).run(backend, concurrency=concurrency)
    assert place.texts() == texts
    assert backend.most_at_once == concurrency


def test_parameters_of_the_record_come_before_the_defaults(place):
    record = {"prompt": "x", "max_new_tokens": 5, "seed": 3, "lookahead": {"enabled": False}}
    defaults = {"sampling": {"max_new_tokens": 9, "temperature": 0.5}, "lookahead": {"window_size": 4}}
    backend = Echo()
    place.fill(record, {"prompt": "y"}).run(backend, defaults)
    sampling = {"max_new_tokens": 5, "temperature": 0.5, "seed": 3}
    assert backend.calls[0] == ("x", sampling, {"window_size": 4, "enabled": False})
    assert backend.calls[1] == ("y", {"max_new_tokens": 9, "temperature": 0.5}, {"window_size": 4})


@pytest.mark.parametrize(
    ("record", "expected_id", "expected_prompt"),
    [
        ({"prompt": "raw"}, 1, "raw"),
        ({"id": None, "prompt": "raw"}, 1, "raw"),
        ({"id": "", "prompt": "raw"}, "", "raw"),
        ({"id": 0, "prompt": "raw"}, 0, "raw"),
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


# Lines


def test_bad_records_get_errors_and_the_rest_is_answered(place):
    place.fill(
        {"id": 1, "prompt": "one"},
        "{not json",
        {"id": 3, "prompt": "three", "temprature": 0.5},
        {"id": 4, "prompt": "four", "messages": []},
        {"id": 5},
        "[1, 2]",
        {"id": 7, "prompt": 7},
        {"id": 8, "token_ids": [1, "x"]},
        {"id": 9, "prompt": "x", "lookahead": "off"},
        {"id": 10, "prompt": "refuse me"},
        {"id": 11, "prompt": "a defect"},
        {"id": 12, "prompt": "last"},
    )
    refusal = InvalidRequestError("prompt", "refuse me", "is refused", "Ask for something else.")
    totals = place.run(Echo(script={"refuse me": [refusal], "a defect": [TypeError("oops")]}))
    results = place.results()
    assert [result["id"] for result in results] == list(range(1, 13))
    assert [index for index, result in enumerate(results) if "error" not in result] == [0, 11]
    assert totals.num_errors == 10
    assert "temprature" in results[2]["error"] and "temperature" in results[2]["error"]  # the key, and what is known
    assert "is refused" in results[9]["error"] and "TypeError: oops" in results[10]["error"]
    assert all(set(result) == {"id", "error"} for result in results[1:11])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt":' * 100_000, "nested too deeply"),
        ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "prompt"),
        ('{"lookahead": ' + "[" * 900 + "]" * 900 + ', "prompt": "x"}', "lookahead"),
        ('{"id": "\\ud83d", "prompt": "x"}', "surrogate"),
        ('{"prompt": "\\udc00"}', "surrogate"),
        ('{"prompt": "x", "\\uD800": 1}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "\\ud83d\\ud83d"}]}', "surrogate"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "UTF-8"),
        (b"\x00\x00\x00", "JSON"),
        ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "JSON"),
        ('{"prompt": "x", "temperature": NaN}', "NaN"),
        ('{"prompt": "x", "temperature": -Infinity}', "-Infinity"),
        ('{"prompt": "x", "id": 1, "id": 2}', "'id' stands twice"),
        ('"prompt"', "not an object"),
        ("null", "not an object"),
        ('{"prompt": "x"} {"prompt": "y"}', "JSON"),
        ('{"prompt": "x", "id": ["a"]}', "id"),
        ('{"prompt": "x", "id": {"a": 1}}', "id"),
        ('{"prompt": "x", "id": 1.5}', "id"),
        ('{"prompt": "x", "id": true}', "id"),
        ('{"prompt": "x", "id": 1e999}', "id"),
        (json.dumps({"prompt": "x", "k" * 100_000: 1}), "unknown key"),
    ],
)
def test_an_odd_line_costs_that_record_only(place, line, named):
    totals = place.fill({"id": "before", "prompt": "a"}, line, {"id": "behind", "prompt": "b"}).run()
    before, odd, behind = place.results()
    assert (before["text"], behind["text"], totals.num_errors) == ("a", "b", 1)
    assert odd["id"] == 2 and len(odd["error"]) <= results.MAX_ERROR_LENGTH
    assert named in odd["error"] or "k" * 1000 in odd["error"]


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text(place):
    place.fill('{"id": "\\ud83d\\ude00", "prompt": "\\\\ud83d"}').run()
    (result,) = place.results()
    assert (result["id"], result["text"]) == ("\U0001f600", "\\ud83d")


def test_line_ends_marks_and_empty_lines_are_no_part_of_records(place):
    mark = b"\xef\xbb\xbf"
    place.source.write_bytes(
        mark + b'{"prompt": "a"}\r\n\r\n  \t\n' + mark + b'{"prompt": "b"}\r\n' + b'{"prompt": "c"}\n\n' + mark + b"\n"
        b'{"prompt": "no end"}'
    )
    place.run()
    assert place.texts() == ["a", "b", "c", "no end"]
    assert [result["id"] for result in place.results()] == [1, 4, 5, 8]  # the lines' numbers in the file


def test_line_separators_inside_a_text_do_not_split_the_line(place):
    text = "one\u2028two\x85three"  # JSON allows both unescaped
    place.fill(json.dumps({"prompt": text}, ensure_ascii=False)).run()
    assert place.texts() == [text]
    assert len(place.target.read_bytes().splitlines()) == 1


def test_a_line_may_be_long_but_not_endless(place, monkeypatch):
    place.fill({"prompt": "x" * 3_000_000}, {"prompt": "b"}).run()
    assert place.texts() == ["x" * 3_000_000, "b"]
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1_000_000)
    place.run()
    too_long, behind = place.results()
    assert "longer than 1000000 bytes" in too_long["error"] and behind["text"] == "b"


def test_no_output_line_has_what_other_readers_refuse():
    line = results.encoded({"id": "\ud83d", "error": "\udc00", "ttft_s": float("nan"), "latency_s": float("inf")})
    assert json.loads(line.decode("utf-8")) == {"id": "?", "error": "?", "ttft_s": None, "latency_s": None}


# The input


def test_limit_takes_the_first_records(place):
    place.fill("", *prompts("a", "b", "c")).run(limit=2)
    assert place.texts() == ["a", "b"]


def test_input_is_a_stream_of_which_only_a_window_is_read(place):
    """An endless input; the first record is slow. Reading stops at the window, and at the limit."""
    read_fd, write_fd = os.pipe()
    num_written, enough = 0, threading.Event()

    def feed():
        nonlocal num_written
        try:
            while True:
                os.write(
                    write_fd,
                    json.dumps({"prompt": f"p{num_written}", "test": "x" * 5000, "task_id": num_written}).encode()
                    + b"\n",
                )
                num_written += 1
        except BrokenPipeError:
            pass
        finally:
            os.close(write_fd)

    feeder = threading.Thread(target=feed)
    feeder.start()
    backend = Echo(script={"p0": [lambda: enough.wait(10)]})
    timer = threading.Timer(0.5, lambda: (seen.append((num_written, len(backend.calls))), enough.set()))
    seen: list[tuple[int, int]] = []
    timer.start()
    place.run(backend, source=Path(f"/dev/fd/{read_fd}"), concurrency=2, limit=500)
    os.close(read_fd)
    feeder.join(10)
    (written, asked), window = seen[0], job.MIN_WINDOW
    slack = 2 + (65536 + 2 * records._CHUNK_BYTES) // 5000
    assert asked <= window and written <= window + slack  # while the first record was not answered
    assert len(place.results()) == 500 and num_written <= 500 + window + slack


def test_an_answer_comes_before_the_next_record_is_there(tmp_path):
    """Whoever asks over a pipe may wait for the answer first."""
    ours, theirs = os.pipe(), os.pipe()
    place = Place(tmp_path)
    arguments = dict(source=Path(f"/dev/fd/{ours[0]}"), target=Path(f"/dev/fd/{theirs[1]}"))
    runner = threading.Thread(target=place.run, kwargs=arguments)
    runner.start()
    with os.fdopen(theirs[0], "rb") as answers:
        for text in ("one", "two"):
            os.write(ours[1], json.dumps({"prompt": text}).encode() + b"\n")
            assert json.loads(answers.readline())["text"] == text
        os.close(ours[1])
        runner.join(10)
        os.close(theirs[1])
        assert answers.read() == b"" and not runner.is_alive()
    os.close(ours[0])


def test_named_pipes_in_and_out(place, tmp_path):
    source, target = tmp_path / "in.fifo", tmp_path / "out.fifo"
    os.mkfifo(source)
    os.mkfifo(target)
    text = "".join(json.dumps(record) + "\n" for record in prompts("a", "b"))
    got = []
    ends = [
        threading.Thread(target=source.write_text, args=(text,)),
        threading.Thread(target=lambda: got.append(target.read_text())),
    ]
    for end in ends:
        end.start()
    place.run(source=source, target=target)
    for end in ends:
        end.join(10)
    assert [json.loads(line)["text"] for line in got[0].splitlines()] == ["a", "b"]
    assert place.names == ["in.fifo", "out.fifo"]


def test_unreadable_input_is_a_config_error(place, tmp_path):
    with pytest.raises(ConfigError, match=r"IN = .*No such file"):
        batch.read_lines(tmp_path / "absent.jsonl", None)
    for source, problem in ((tmp_path / "absent.jsonl", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=f"IN = .*{problem}"):
            place.run(source=source)
    assert not place.target.exists()
    (tmp_path / "empty.jsonl").write_text("")
    assert batch.read_lines(tmp_path / "empty.jsonl", None) == []
    assert place.run(source=tmp_path / "empty.jsonl").num_records == 0
    assert place.target.read_text() == ""


def test_an_input_that_breaks_off_keeps_what_was_answered(place, monkeypatch):
    place.fill(*prompts("a", "b"))
    chunks = iter([place.source.read_bytes(), OSError(errno.EIO, "Input/output error")])

    def read(self):
        chunk = next(chunks)
        if isinstance(chunk, OSError):
            raise chunk
        return chunk

    monkeypatch.setattr(records.Input, "_read", read)
    with pytest.raises(batch.StoppedError, match="cannot be read any further.*--resume"):
        place.run()
    assert place.texts() == ["a", "b"]


# The output


def test_output_is_checked_before_anybody_is_asked(place, tmp_path):
    def connect():
        raise AssertionError("too early")

    place.fill(*prompts("a"))
    link, name = tmp_path / "link", tmp_path / "name"
    link.symlink_to(place.source)
    name.hardlink_to(place.source)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for target in (
        tmp_path,
        tmp_path / "no" / "out",
        place.source,
        link,
        name,
        tmp_path / "circle",
        place.source / "x",
    ):
        with pytest.raises(ConfigError, match="OUT = "):
            batch.run(place.source, target, connect)
    if os.geteuid():
        place.target.write_text("x")
        place.target.chmod(0o444)
        with pytest.raises(ConfigError, match="OUT = .*cannot be written"):
            batch.run(place.source, place.target, connect)
    assert len(place.source.read_text().splitlines()) == 1


def test_a_run_that_cannot_begin_leaves_everything_as_it_was(place):
    def connect():
        raise ConfigError("model.path", "x", "is broken", "Mend it.")

    place.fill(*prompts("a"))
    with pytest.raises(ConfigError, match="model.path"):
        batch.run(place.source, place.target, connect)
    assert place.names == ["in.jsonl"]
    place.target.write_text("earlier\n")
    with pytest.raises(ConfigError, match="model.path"):
        batch.run(place.source, place.target, connect)
    assert place.names == ["in.jsonl", "out.jsonl"] and place.target.read_text() == "earlier\n"


def test_earlier_answers_stay_until_the_run_is_at_its_end(place):
    place.target.write_text("earlier\n")
    place.target.chmod(0o640)
    seen = []
    look = lambda: seen.append((place.target.read_text(), place.names))  # noqa: E731
    place.fill(*prompts("a", "b")).run(Echo(script={"b": [look]}))
    assert seen[0][0] == "earlier\n"
    assert place.texts() == ["a", "b"] and place.names == ["in.jsonl", "out.jsonl"]
    assert stat.S_IMODE(place.target.stat().st_mode) == 0o640


@pytest.mark.parametrize("lines", [[], [{"prompt": "x", "bad": 1}]])
def test_a_run_without_an_answer_replaces_none(place, lines, capfd):
    place.target.write_text("earlier\n")
    place.fill(*lines).run()
    assert place.target.read_text() == "earlier\n" and "keeps what it had" in capfd.readouterr().err
    if lines:  # the errors are somewhere, too
        assert "bad" in place.results(place.target.with_name("out.jsonl.new"))[0]["error"]


def test_links_stay_links(place, tmp_path):
    (tmp_path / "there").mkdir()
    real = tmp_path / "there" / "real.jsonl"
    place.target.symlink_to(real)
    place.fill(*prompts("a")).run()
    assert place.target.is_symlink() and place.texts(real) == ["a"]
    place.fill(*prompts("b")).run()
    assert place.target.is_symlink() and place.texts(real) == ["b"]
    other = tmp_path / "other"
    other.hardlink_to(real)
    place.fill(*prompts("c")).run()
    assert place.texts(other) == ["c"] and real.samefile(other)


def test_devices_are_written_to(place):
    place.fill(*prompts("a")).run(target=Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(batch.StoppedError, match="/dev/full cannot be written: No space left"):
        place.run(target=Path("/dev/full"))
    with pytest.raises(ConfigError, match="--resume"):
        place.run(target=Path("/dev/null"), resume=True)


def test_two_runs_do_not_write_one_output(place):
    def second():
        with pytest.raises(ConfigError, match="another run"):
            place.run()

    place.fill(*prompts("a", "b")).run(Echo(script={"b": [second]}))
    assert place.texts() == ["a", "b"]


@pytest.mark.parametrize("earlier", ["", '{"id": "z", "text": "earlier"}\n'])
def test_a_full_disk_loses_nothing_that_was_written(place, monkeypatch, earlier):
    place.target.write_text(earlier)
    room = 700  # bytes: two lines and a part of the third
    write = os.write

    def limited(fd, data):
        nonlocal room
        if stat.S_ISREG(os.fstat(fd).st_mode):
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = data[:room]
            room -= len(data)
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "write", limited)
        place.fill(*prompts(*"abcdefgh"))
        with pytest.raises(batch.StoppedError, match="No space left on device.*--resume"):
            place.run()
    done = place.texts(place.partial if earlier else place.target)
    assert done and done == list("abcdefgh")[: len(done)]
    assert not earlier or place.target.read_text() == earlier
    backend = Echo()
    totals = place.run(backend, resume=True)
    assert place.texts() == list("abcdefgh") and totals.num_skipped == len(done)
    assert len(backend.calls) == 8 - len(done) and place.names == ["in.jsonl", "out.jsonl"]


# Interruptions


@pytest.mark.parametrize("earlier", [False, True])
def test_interrupted_run_keeps_what_is_finished_and_resume_goes_on(place, earlier):
    """Of two requests in flight, the first is interrupted; the finished ones behind it are kept, too."""
    if earlier:
        place.target.write_text('{"id": "z", "text": "earlier"}\n')
    later = threading.Event()
    script = {"c": [lambda: later.wait(10), None], "e": [later.set, None]}

    def interrupt():
        later.wait(10)
        raise KeyboardInterrupt

    script["c"] = [interrupt]
    backend = Echo(script=script)
    place.fill(*prompts(*"abcdef"))
    with pytest.raises(KeyboardInterrupt):
        place.run(backend, concurrency=2)
    assert backend.closed
    kept = place.texts(place.partial if earlier else place.target)
    assert kept[:3] == ["a", "b", "d"] and "c" not in kept
    backend = Echo()
    totals = place.run(backend, resume=True)
    assert place.texts() == list("abcdef") and [call[0] for call in backend.calls][0] == "c"
    assert totals.num_skipped == len(kept) and place.names == ["in.jsonl", "out.jsonl"]


def test_resume_asks_again_for_errors_only_and_keeps_the_order(place):
    place.fill(*prompts(*"abc"), "{bad", *prompts("d"))
    refusal = InvalidRequestError("prompt", "b", "is refused", "No.")
    assert place.run(Echo(script={"b": [refusal]})).num_errors == 2
    backend = Echo()
    totals = place.run(backend, resume=True)
    assert [call[0] for call in backend.calls] == ["b"]
    assert place.texts() == ["a", "b", "c", None, "d"]
    assert (totals.num_records, totals.num_errors, totals.num_skipped) == (5, 1, 3)
    assert place.run(backend, resume=True).num_skipped == 4  # again: nothing changes
    assert place.texts() == ["a", "b", "c", None, "d"]


def test_resume_without_an_earlier_run_begins(place):
    assert place.fill(*prompts("a")).run(resume=True).num_skipped == 0
    assert place.texts() == ["a"]


@pytest.mark.parametrize("torn", ['{"id": "b", "te', '{"id": "b", "text": "\xff', "\0\0\0", ""])
def test_resume_mends_the_last_line_of_a_run_that_was_killed(place, torn):
    place.fill(*prompts("a", "b", "c"))
    place.target.write_bytes(b'{"id": "a", "text": "earlier"}\n' + torn.encode("latin-1"))
    place.run(resume=True)
    assert place.texts() == ["earlier", "b", "c"]


def test_resume_goes_by_id_or_line_and_equal_ids_by_their_order(place):
    same = [{"id": "s", "prompt": "s1"}, {"id": "s", "prompt": "s2"}, {"id": "s", "prompt": "s3"}]
    numbers = [{"id": 1, "prompt": "one"}, {"id": "1", "prompt": "text one"}, {"prompt": "line 6"}]
    place.fill(*same, *numbers)
    refusal = InvalidRequestError("prompt", "s2", "is refused", "No.")
    place.run(Echo(script={"s2": [refusal]}))
    backend = Echo()
    place.run(backend, resume=True)
    assert [call[0] for call in backend.calls] == ["s2"]
    assert place.texts() == ["s1", "s2", "s3", "one", "text one", "line 6"]


def test_resume_finds_answers_of_an_input_in_another_order_and_loses_none(place):
    place.fill(*prompts(*"abcd")).run()
    place.fill(*prompts("c", "new", "a"))
    backend = Echo()
    place.run(backend, resume=True)
    assert [call[0] for call in backend.calls] == ["new"]
    assert place.texts() == ["c", "new", "a", "b", "d"]
    place.run(backend, resume=True, limit=1)
    assert place.texts() == ["c", "new", "a", "b", "d"]


def test_resume_refuses_a_file_that_is_no_output(place):
    place.target.write_text("my notes\n")
    with pytest.raises(ConfigError, match="line 1 is no record"):
        place.fill(*prompts("a")).run(resume=True)
    assert place.target.read_text() == "my notes\n"


def test_an_interrupted_or_killed_resume_loses_nothing(place):
    place.fill(*prompts(*"abcd")).run(Echo(script={text: [InvalidRequestError("p", 1, "x", "y")] for text in "ac"}))
    with pytest.raises(KeyboardInterrupt):
        place.run(Echo(script={"c": [KeyboardInterrupt()]}), resume=True)
    assert place.texts() == ["a", "b", None, "d"] and place.names == ["in.jsonl", "out.jsonl"]
    # One that was killed has left its file beside.
    place.target.with_name("out.jsonl.resumed").write_text('{"id": "a", "text": "a"}\n{"id": "b", "text": "b"}\n{"id"')
    place.run(resume=True)
    assert place.texts() == list("abcd") and place.names == ["in.jsonl", "out.jsonl"]


def test_a_new_run_that_fails_at_once_keeps_an_interrupted_one(place):
    place.target.write_text('{"id": "z", "text": "earlier"}\n')
    place.fill(*prompts("a", "b"))
    with pytest.raises(KeyboardInterrupt):
        place.run(Echo(script={"b": [KeyboardInterrupt()]}))
    with pytest.raises(batch.StoppedError):
        place.run(Echo(script={"a": [WorkerError("dead")]}))
    assert place.texts(place.partial) == ["a"] and "earlier" in place.target.read_text()
    place.run(resume=True)
    assert place.texts() == ["a", "b"] and place.names == ["in.jsonl", "out.jsonl"]


# Servers that are full or away


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, str(FULL)),
        call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "rate limit of the proxy"),
        call_error(grpc.StatusCode.UNAVAILABLE),
        call_error(grpc.StatusCode.CANCELLED),
    ],
)
def test_what_is_no_fault_of_the_record_is_asked_again(place, error, capfd):
    totals = place.fill(*prompts(*"abc")).run(Echo(script={"a": [error] * 3, "c": [error]}), concurrency=3)
    assert place.texts() == list("abc") and totals.num_errors == 0
    assert totals.num_retries == totals.as_dict()["num_retries"] == 4
    assert "asking again" in capfd.readouterr().err


def test_an_answer_that_breaks_off_is_asked_for_again(place, monkeypatch):
    class Breaking(Echo):
        def stream(self, prompt, sampling, lookahead):
            chunks = list(super().stream(prompt, sampling, lookahead))
            yield from chunks[:1] if len(self.calls) == 1 else chunks

    assert place.fill(*prompts("ab")).run(Breaking()).num_retries == 1
    assert place.texts() == ["ab"]


@pytest.mark.parametrize(
    "error",
    [
        call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (17 vs. 16)"),
        call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "cache.capacity = 5: the conversation fills its cache."),
        ResourceExhaustedError("cache.capacity", 5, "the conversation fills its cache", "Begin a new one."),
        call_error(grpc.StatusCode.INVALID_ARGUMENT),
        call_error(grpc.StatusCode.INTERNAL),
    ],
)
def test_what_is_the_records_own_fault_is_not(place, error):
    totals = place.fill(*prompts(*"abc")).run(Echo(script={"b": [error]}))
    assert place.texts() == ["a", None, "c"] and totals.num_retries == 0


@pytest.mark.parametrize("error", [FULL, call_error(grpc.StatusCode.UNAVAILABLE)])
def test_patience_ends_and_nothing_is_lost(place, error):
    place.fill(*prompts(*"abcd"))
    backend = Echo(script={"b": [error] * 10_000, "d": [error] * 10_000})
    with pytest.raises(batch.StoppedError, match="nothing was answered for 0.2 s.*--resume goes on"):
        place.run(backend, concurrency=2, patience_s=0.2)
    assert place.texts() == ["a", "c"]  # no error is written down for the others
    place.run(resume=True)
    assert place.texts() == list("abcd")


@pytest.mark.parametrize("error", [WorkerError("the workers failed"), call_error(grpc.StatusCode.UNAUTHENTICATED)])
def test_what_every_record_would_meet_ends_the_run_at_once(place, error):
    backend = Echo(script={"b": [error] * 100})
    with pytest.raises(batch.StoppedError, match="stopped after 1 record:.*--resume"):
        place.fill(*prompts("a", "b", "b", "c")).run(backend)
    assert place.texts() == ["a"] and [call[0] for call in backend.calls] == ["a", "b"]


# Progress


def test_progress_has_counts_and_the_time_to_go(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    lines = progress.Progress()
    lines._started_s -= 60
    lines.show("30 records", 0.5, 0.0)
    lines.show("30 records", None, 0.0)
    lines.show("40 records, 20 skipped", 0.6, 0.2)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "outrider: 30 records after 0:01:00, 50%, about 0:01:00 to go"
    assert second == "outrider: 30 records after 0:01:00"
    assert third.endswith("60%, about 0:01:00 to go")


# The command, in a process of its own

SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, it is ignored
sys.path.insert(0, {root!r})
from cluster.cli import commands
from tests.cluster.cli.test_batch import Echo
commands._backend = lambda *_: (Echo(delays={delays!r}), {{"sampling": {{}}, "lookahead": {{}}}})
sys.argv = ["outrider", "batch", *{arguments!r}]
commands.main()
"""


def command(*arguments, delays=(), **how):
    script = SCRIPT.format(root=str(ROOT), delays=dict(delays), arguments=[str(argument) for argument in arguments])
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen([sys.executable, "-c", script], text=True, **how)


@pytest.mark.system
def test_standard_input_and_output_and_figures_on_standard_error(place):
    process = command("-", "-", "--json", stdin=subprocess.PIPE)
    out, err = process.communicate('{"prompt": "a"}\n{"prompt": "b", "x": 1}\n')
    assert process.returncode == 1
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 2]
    totals = next(json.loads(line) for line in err.splitlines() if line.startswith("{"))
    assert (totals["num_records"], totals["num_errors"], totals["num_retries"], totals["num_skipped"]) == (2, 1, 0, 0)


@pytest.mark.system
def test_a_process_substitution_is_read_once(place):
    place.fill(*prompts("a", "b"))
    read_fd, write_fd = os.pipe()
    os.write(write_fd, place.source.read_bytes())
    os.close(write_fd)
    process = command(f"/dev/fd/{read_fd}", place.target, "--json", pass_fds=[read_fd])
    os.close(read_fd)
    out, err = process.communicate()
    assert process.returncode == 0 and place.texts() == ["a", "b"]
    assert json.loads(out)["num_records"] == 2 and "2 records (0 errors)" in err


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.system
def test_a_signal_ends_the_run_and_says_how_to_go_on(place, name, code):
    import signal

    place.fill(*prompts("a", "b", "c"))
    process = command(place.source, place.target, delays={"b": 1.0})
    deadline = time.monotonic() + 60
    while not (place.target.exists() and place.target.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert "--resume goes on from there" in err and place.texts()[0] == "a"
    assert command(place.source, place.target, "--resume").wait() == 0
    assert place.texts() == ["a", "b", "c"]


@pytest.mark.system
def test_nobody_reads_any_more_and_the_run_ends_quietly(place):
    place.fill(*prompts(*(f"p{number}" for number in range(2000))))
    process = command(place.source, "-")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""


@pytest.mark.system
def test_exit_codes_of_what_cannot_be_and_of_a_full_disk(place, tmp_path):
    place.fill(*prompts("a"))
    for arguments, code in (((place.source, tmp_path), 2), ((place.source, "/dev/full"), 1)):
        process = command(*arguments)
        _, err = process.communicate()
        assert process.returncode == code and err.startswith("outrider: ") and "Traceback" not in err


def test_a_standard_output_that_is_closed_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", None)  # a device stands in for it by then, and would keep nothing
    with pytest.raises(ConfigError, match="OUT = '-': cannot be written"):
        output.open_output(Path("-"), os.stat("/dev/null"), resume=False)


def test_priorities_and_deadlines_are_those_of_records_then_of_the_job(place):
    backend = Echo()
    place.fill(
        {"prompt": "one"},
        {"prompt": "two", "priority": -3, "deadline": 5},
        {"prompt": "six", "deadline": 5000.5},
    ).run(backend, priority=7, deadline_s=100.0)
    one, two, six = backend.urgencies
    assert (one["priority"], two["priority"], six["priority"]) == (7, -3, 7)
    assert 90 < one["deadline_s"] <= 100 and 4 < two["deadline_s"] <= 5 and 90 < six["deadline_s"] <= 100
    backend = Echo()
    place.fill({"prompt": "one"}, {"prompt": "two", "priority": 2}).run(backend)
    assert backend.urgencies == [{}, {"priority": 2}]


def test_a_record_whose_time_has_passed_is_an_error_and_is_not_asked_for(place):
    backend = Echo(delays={"one": 0.4}, script={"two": [FULL] * 1000})
    totals = place.fill(
        {"prompt": "one"}, {"prompt": "two", "deadline": 0.2}, {"prompt": "three", "deadline": 30}, {"prompt": "four"}
    ).run(backend, deadline_s=0.7, concurrency=1)
    one, two, three, four = place.results()
    assert one["text"] == "one" and "deadline" in two["error"]
    assert three["text"] == "three" and four["text"] == "four" and totals.num_errors == 1
    place.target.unlink()
    backend = Echo(delays={"one": 0.4})
    place.fill({"prompt": "one"}, {"prompt": "two"}).run(backend, deadline_s=0.3)
    assert "its time has passed" in place.results()[1]["error"] and len(backend.calls) == 1


@pytest.mark.parametrize("line", [{"priority": 1.5}, {"deadline": 0}, {"deadline": "5"}, {"priority": True}])
def test_what_is_no_priority_and_no_deadline_is_the_records_error(place, line):
    place.fill({"prompt": "one", **line}, {"prompt": "two"}).run()
    bad, good = place.results()
    assert next(iter(line)) in bad["error"] and good["text"] == "two"
    for options in ({"priority": 1.5}, {"deadline_s": -1.0}):
        with pytest.raises(InvalidRequestError, match="^--"):
            place.run(**options)
