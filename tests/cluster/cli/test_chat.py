"""The terminal client: lines in, answers out; commands, Ctrl-C, and what happens when the conversation cannot go on."""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.cli import chat
from cluster.cli import commands as cli
from cluster.client.backends import InProcess, Remote
from cluster.client.client import Client
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.answers import Chunk
from cluster.wire.statuses import CallError
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.errors import InvalidRequestError, NumericsError, ResourceExhaustedError
from runtime.request import FinishReason, Usage
from tests.cluster.serving.serving import serving
from tests.models import save_tiny_model

pytestmark = pytest.mark.timeout(120)

USAGE = Usage(1, 4, 2, 8, 0.1, 0.2, num_seen_tokens=40, kept_last=0.25, kept_sum=0.5)


class Echo:
    """A backend and its conversations: answers with what was said, in two chunks, or raises what it is told to."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        """The messages of each turn, or its raw text, by conversation."""
        self.parameters: list[tuple[Any, Any]] = []
        self.errors: dict[str, Exception] = {}
        self.num_stops = self.num_closed = 0
        self.interrupts = 0
        """How often Ctrl-C is pressed while an answer runs."""

    def converse(self) -> Echo:
        self.asked.append([])
        return self

    def ask(
        self, prompt: str = "", *, messages: Sequence[dict[str, str]] = (), sampling: Any, lookahead: Any
    ) -> Iterator[Chunk]:
        self.asked[-1].append(list(messages) or prompt)
        self.parameters.append((sampling, lookahead))
        text = messages[-1]["content"] if messages else prompt
        if text in self.errors:
            raise self.errors[text]
        return self._chunks(text)

    def _chunks(self, text: str) -> Iterator[Chunk]:
        yield Chunk("s#0", text[:2], (1, 2, 3), 2, None, None)
        for _ in range(self.interrupts):
            os.kill(os.getpid(), signal.SIGINT)
        reason = FinishReason.CANCELLED if self.num_stops else FinishReason.STOP
        yield Chunk("s#0", text[2:], (4,), 0, reason, USAGE)

    def stop(self) -> None:
        self.num_stops += 1

    def cache_info(self) -> pb.CacheInfo:
        return pb.CacheInfo(policy="sink", bytes_per_token=2**20, bytes_per_sequence=64 * 2**20, tokens_per_sequence=99)

    def close(self) -> None:
        self.num_closed += 1


def talk(backend: Any, *lines: str | BaseException, **options: Any) -> None:
    """A chat of these lines, then Ctrl-D."""
    given = iter(lines)

    def read() -> str:
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    chat.Chat(backend, **{"sampling": {}, "lookahead": {}, **options}).run(read)


def test_a_line_is_a_turn_and_its_answer_goes_to_standard_output(capsys):
    backend = Echo()
    parameters = {"sampling": {"seed": 1}, "lookahead": {"enabled": False}}
    talk(backend, "hello", "", "   ", "again", **parameters)
    captured = capsys.readouterr()
    assert captured.out == "hello\nagain\n"
    assert captured.err.count("4 tokens in 2 steps, 2.00 tokens per step") == 2
    assert backend.asked == [[[{"role": "user", "content": text}] for text in ("hello", "again")]]
    assert backend.parameters == [({"seed": 1}, {"enabled": False})] * 2
    assert backend.num_closed == 1


def test_accepted_tokens_are_coloured(capsys):
    talk(Echo(), "hello", color=True)
    assert capsys.readouterr().out == "\x1b[1;32mhe\x1b[0mllo\n"


def test_the_system_message_begins_every_conversation(capsys):
    backend = Echo()
    talk(backend, "one", "two", "/reset", "three", system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    assert backend.asked == [[[system, one], [two]], [[system, three]]]
    assert backend.num_closed == 2 and "new conversation" in capsys.readouterr().err


def test_commands(capsys):
    backend = Echo()
    talk(
        backend, "/stats", "hi", "hi", "/stats", "/reset", "/stats", "/help", "/nonsense x", " /help me", "/quit", "no"
    )
    captured = capsys.readouterr()
    assert captured.out == "hi\nhi\n /help me\n"
    assert captured.err.count("nothing said yet") == 2
    assert "2 turns, 8 tokens in 4 steps: 2.00 tokens per step" in captured.err
    assert "10 of 40 seen tokens (25.0%; 50.0% over the whole conversation), cache policy sink" in captured.err
    assert "10.0 of at most 64.0 MiB" in captured.err
    assert "/nonsense is no command" in captured.err
    for command in ("/reset", "/stats", "/quit", "/help", "Ctrl-C"):
        assert command in chat.HELP and f"\n{command}" in f"\n{captured.err}"


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys):
    backend, before = Echo(), signal.getsignal(signal.SIGINT)
    backend.interrupts = 1
    talk(backend, "hello", "more")
    captured = capsys.readouterr()
    assert backend.num_stops == 2 and captured.out == "hello\nmore\n" and captured.err.count("(stopped)") == 2
    assert signal.getsignal(signal.SIGINT) is before and len(backend.asked) == 1


def test_a_second_ctrl_c_ends_the_program():
    backend, before = Echo(), signal.getsignal(signal.SIGINT)
    backend.interrupts = 2
    with pytest.raises(KeyboardInterrupt):
        talk(backend, "hello", "more", interactive=True)
    assert len(backend.asked[0]) == backend.num_closed == 1 and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_forgets_the_line(capsys):
    talk(Echo(), KeyboardInterrupt(), "hi", interactive=True)
    captured = capsys.readouterr()
    assert captured.out == "hi\n" and "it ends at 99 tokens; with --set cache.policy=sink" in captured.err
    with pytest.raises(KeyboardInterrupt):
        talk(Echo(), KeyboardInterrupt(), "hi")


def test_mistakes_can_be_mended_by_those_who_are_there(capsys):
    refused = InvalidRequestError("prompt", "long", "does not fit", "Shorten it.")
    closed = CallError("host:1", grpc.StatusCode.DEADLINE_EXCEEDED, "no turn came for 600 s")
    backend = Echo()
    backend.errors = {"long": refused, "late": closed}
    talk(backend, "one", "long", "two", "late", "three", interactive=True)
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\nthree\n" and "does not fit. Shorten it." in captured.err
    assert [len(turns) for turns in backend.asked] == [4, 1]  # what the server closed begins anew
    for text, error in backend.errors.items():
        with pytest.raises(type(error)):
            talk(backend, text, "one")


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhaustedError("cache.capacity", 64, "the conversation fills its cache", "Begin a new one."),
        CallError("host:1", grpc.StatusCode.RESOURCE_EXHAUSTED, "cache.capacity = 64"),
        CallError("host:1", grpc.StatusCode.UNAVAILABLE, "the server is shutting down"),
    ],
)
def test_what_cannot_be_mended_ends_the_chat(error):
    backend = Echo()
    backend.errors = {"more": error}
    with pytest.raises(type(error)):
        talk(backend, "one", "more", "two", interactive=True)
    assert len(backend.asked[0]) == 2 and backend.num_closed == 1


def test_lines_that_are_piped_in(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n\nsans fin"), encoding="utf-8"))
    read = chat.make_reader()
    assert [read(), read(), read()] == ["caf\ufffd", "", "sans fin"]
    with pytest.raises(EOFError):
        read()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("no UTF-8") == 1  # no prompt


def test_lines_are_raw_text_where_that_is_wanted(capsys):
    backend = Echo()
    talk(backend, "once upon", " a time", raw=True)
    assert backend.asked == [["once upon", " a time"]] and capsys.readouterr().out == "once upon\n a time\n"


@pytest.mark.parametrize("interactive", [True, False])
@pytest.mark.parametrize(
    "error", [NumericsError("NaN"), CallError("host:1", grpc.StatusCode.DATA_LOSS, "NaN")], ids=["here", "remote"]
)
def test_an_answer_without_numbers_is_said_and_the_chat_goes_on(capsys, error, interactive):
    backend = Echo()
    backend.errors = {"bad": error}
    told = chat.Chat(backend, sampling={}, lookahead={}, interactive=interactive)
    lines = iter(["one", "bad", "two"])
    told.run(lambda: next(lines, "/quit"))
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n" and "NaN" in captured.err and told.num_failed == 1
    assert [len(turns) for turns in backend.asked] == [2, 1]


# With a model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def outrider(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `outrider chat` with lines piped in: (exit code, standard output, standard error)."""

    def run(lines: Sequence[str], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as ended:
            cli.main(["chat", *arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


SINK = ["cache.policy=sink", "cache.num_sinks=2", "cache.window=32"]


def settings(*values: str) -> list[str]:
    return [argument for value in values for argument in ("--set", value)]


SAMPLING = ["--max-new-tokens", "6", "--ignore-eos"]
LINES = ["abc", "abc", "/stats", "something else", "abc"]


def test_with_and_without_a_server(outrider, model):
    config = Config.load(None, [f"model.path={model}", "server.port=0", *SINK])
    with Engine.from_config(config) as engine, serving(engine) as server:
        remote = outrider(LINES, "--address", server.address, *SAMPLING)
        with Client(server.address) as client:
            assert client.server_info().cache.num_sessions == 0
    local = outrider(LINES, *settings(f"model.path={model}", *SINK), *SAMPLING)
    assert remote[0] == local[0] == 0 and remote[1] == local[1] != ""
    for _, _, err in (remote, local):
        assert err.count("6 tokens in") == 4 and "2 turns, 12 tokens in" in err
        # Two turns: abc in its template and 6 tokens, of which the last is not cached yet.
        assert "kept KV: 24 of 24 seen tokens (100.0%; 100.0% over the whole conversation), cache policy sink" in err


def test_a_long_chat_in_a_small_cache(outrider, model):
    """The newest token sees 34, however many there were."""
    code, out, err = outrider(["abc"] * 12 + ["/stats"], *settings(f"model.path={model}", *SINK), *SAMPLING)
    assert code == 0 and out.count("\n") >= 12 and "kept KV: 34 of 154 seen tokens" in err


def test_a_full_cache_ends_the_chat_with_the_remedy(outrider, model):
    code, out, err = outrider(["abc"] * 9, *settings(f"model.path={model}", "cache.capacity=48"), *SAMPLING)
    assert code != 0 and err.count("6 tokens in") in (3, 4)
    assert "the conversation fills its cache" in err and "--set cache.policy=sink" in err


def test_what_a_chat_cannot_use_is_refused(outrider, model):
    code, out, err = outrider(["abc"], *settings(f"model.path={model}"), "--temperature", "-1")
    assert (code, out) == (2, "") and "sampling.temperature" in err or "temperature" in err
    code, _, err = outrider(["abc"], "--address", "localhost:1")
    assert code == 1 and "localhost:1" in err


def test_a_model_without_a_chat_template(outrider, model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    code, out, err = outrider(["abc"], *settings(f"model.path={bare}"), *SAMPLING)
    assert (code, out) == (2, "") and "no chat template" in err and "--raw" in err
    code, out, err = outrider(["abc", "def"], "--raw", *settings(f"model.path={bare}"), *SAMPLING)
    assert code == 0 and out.strip() and err.count("6 tokens in") == 2
    code, _, err = outrider(["abc"], "--raw", "--system", "Be brief.", *settings(f"model.path={bare}"))
    assert code == 2 and "--system" in err


@pytest.mark.parametrize("kind", ["in process", "remote"])
def test_backends_converse_alike(model, kind):
    config = Config.load(None, [f"model.path={model}", "server.port=0", "scheduler.max_sequences=2", *SINK])
    backend: Any
    if kind == "in process":
        backend = InProcess(config)
        engine, stack = backend.engine, None
    else:
        engine = Engine.from_config(config)
        stack = serving(engine)
        backend = Remote(stack.__enter__().address)
    sampling = {"max_new_tokens": 5, "ignore_eos": True}
    try:
        conversation = backend.converse()
        first = list(conversation.ask("abc", sampling=sampling))
        assert [chunk.finish_reason for chunk in first][-1] is FinishReason.LENGTH and first[-1].usage is not None
        unread = conversation.ask(token_ids=[5, 6], sampling={"max_new_tokens": 4000, "ignore_eos": True})
        next(unread)
        conversation.stop()
        *_, last = unread
        assert last.finish_reason is FinishReason.CANCELLED and last.usage.num_new_tokens < 4000
        next(conversation.ask("x", sampling={"max_new_tokens": 4000, "ignore_eos": True}))
        again = list(conversation.ask(messages=[{"role": "user", "content": "x"}], sampling=sampling))
        assert again[-1].usage is not None and again[-1].usage.num_new_tokens == 5
        with pytest.raises(InvalidRequestError, match="Give one of"):
            conversation.ask("x", token_ids=[1])
        with pytest.raises((ResourceExhaustedError, CallError), match="max_sessions"):
            list(backend.converse().ask("abc"))
        conversation.close()
        conversation.close()
        assert backend.cache_info().num_sessions == 0
        third = backend.converse()
        # In fewer steps, perhaps: what the first answer taught is known.
        assert "".join(c.text for c in third.ask("abc", sampling=sampling)) == "".join(c.text for c in first)
        third.close()
    finally:
        backend.close()
        if stack is not None:
            stack.__exit__(None, None, None)
            engine.close()


@pytest.mark.slow
def test_at_a_terminal(model):
    """A prompt, Ctrl-C in an endless answer, another line, Ctrl-D."""
    main, child = pty.openpty()
    arguments = settings(f"model.path={model}", *SINK, "model.device=cpu")
    command = [sys.executable, "-m", "cluster.cli", "chat", *arguments, "--max-new-tokens", "1000000", "--ignore-eos"]
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        command,
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
        start_new_session=True,
        preexec_fn=claim_terminal,
    )
    os.close(child)
    seen = ""

    def wait_for(text: str, num_more: int = 0) -> None:
        """Read until `text` has come, and some characters more."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen or len(seen) < seen.index(text) + len(text) + num_more:
            assert time.monotonic() < deadline, seen
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 65536).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for("> ")
        os.write(main, b"abc\n")
        wait_for("abc", num_more=20)
        os.write(main, b"\x03")
        wait_for("(stopped)")
        wait_for("> ")
        os.write(main, b"/stats\n")
        wait_for("1 turn, ")
        wait_for("> ")
        os.write(main, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def claim_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
