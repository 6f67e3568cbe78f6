"""`outrider chat`: a conversation at the terminal, one line a turn. Answers go to standard output, the rest to
standard error."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import grpc

from cluster.cli import streams, terminal
from cluster.client.backends import Backend, Conversation
from cluster.wire.answers import Chunk
from cluster.wire.statuses import CallError
from runtime.errors import InvalidRequestError, NumericsError
from runtime.request import FinishReason, Usage

HELP = """\
/reset   begin a new conversation
/stats   tokens, tokens per step, and what the cache keeps
/quit    end (Ctrl-D does, too)
/help    this
Ctrl-C stops the answer that is running. A line that begins with a space is never a command."""

_ENDS_THE_CONVERSATION_ONLY = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED)


class Chat:
    """Lines in, answers out. `raw`: lines are text that goes on, without a chat template. `interactive`: there is
    somebody who can mend a mistake, and likes a greeting."""

    def __init__(
        self,
        backend: Backend,
        *,
        sampling: Mapping[str, Any],
        lookahead: Mapping[str, Any],
        system: str | None = None,
        raw: bool = False,
        color: bool = False,
        interactive: bool = False,
    ) -> None:
        self._backend, self._sampling, self._lookahead, self._system = backend, sampling, lookahead, system
        self._raw, self._color, self._interactive = raw, color, interactive
        self.num_failed = 0
        """Answers that the model could not give."""
        self._tokenizer = getattr(getattr(backend, "engine", None), "tokenizer", None)
        self._commands = {"/reset": self._reset, "/stats": self._print_stats, "/help": lambda: _say(HELP)}
        self._conversation: Conversation | None = None
        self._usages: list[Usage] = []  # of the conversation's turns

    def run(self, read: Callable[[], str]) -> None:
        """Answer lines until `read` raises EOFError or one says /quit. Raises OutriderError where it cannot go on."""
        if self._interactive:
            self._greet()
        try:
            while True:
                try:
                    line = read()
                except KeyboardInterrupt:
                    if not self._interactive:
                        raise
                    _say("")  # forgets the line
                    continue
                except EOFError:
                    if self._interactive:
                        _say("")
                    return
                if line.strip() == "/quit":
                    return
                self._take(line)
        finally:
            self._close()

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/"):
            name = line.split()[0]
            command = self._commands.get(name)
            _say(f"{name} is no command; /help lists them") if command is None else command()
            return
        try:
            self._answer(line)
        except (InvalidRequestError, NumericsError, CallError) as error:
            failed = isinstance(error, NumericsError) or getattr(error, "code", None) is grpc.StatusCode.DATA_LOSS
            mendable = not isinstance(error, CallError) or error.code in _ENDS_THE_CONVERSATION_ONLY
            if not failed and not (mendable and self._interactive):
                raise
            self.num_failed += failed
            _say(f"outrider: {error}")
            if not isinstance(error, InvalidRequestError):
                self._reset()

    def _answer(self, text: str) -> None:
        begins = self._conversation is None
        if self._conversation is None:
            self._conversation = self._backend.converse()
        turn: dict[str, Any] = {"prompt": text} if self._raw else {"messages": self._messages(text, begins)}
        stream = terminal.TextStream(sys.stdout, self._color, self._tokenizer)
        last: Chunk | None = None
        with _stopped_by_ctrl_c(self._conversation):
            try:
                for last in self._conversation.ask(**turn, sampling=self._sampling, lookahead=self._lookahead):
                    stream.write(last)
            finally:
                if last is not None:
                    print(flush=True)
        assert last is not None and last.usage is not None
        self._usages.append(last.usage)
        notes = {FinishReason.CANCELLED: " (stopped)", FinishReason.LENGTH: " (cut short: see --max-new-tokens)"}
        _say(terminal.summary(last.usage) + notes.get(last.finish_reason or FinishReason.STOP, ""))

    def _messages(self, text: str, begins: bool) -> list[dict[str, str]]:
        messages = [{"role": "user", "content": text}]
        if begins and self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    def _reset(self) -> None:
        self._close()
        self._usages = []
        _say("a new conversation")

    def _close(self) -> None:
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None

    def _greet(self) -> None:
        cache = self._backend.cache_info()
        end = "it may go on for ever"
        if cache.HasField("tokens_per_sequence"):
            end = f"it ends at {cache.tokens_per_sequence} tokens; with --set cache.policy=sink it may go on for ever"
        _say(f"A conversation with cache policy {cache.policy}: {end}. /help lists the commands.")

    def _print_stats(self) -> None:
        if not self._usages:
            _say("nothing said yet")
            return
        cache, last = self._backend.cache_info(), self._usages[-1]
        num_tokens = sum(usage.num_new_tokens for usage in self._usages)
        num_steps = sum(usage.num_steps for usage in self._usages)
        kept = last.kept_last * last.num_seen_tokens
        counts = (len(self._usages), "turn"), (num_tokens, "token"), (num_steps, "step")
        turns, tokens, steps = (terminal.counted(number, noun) for number, noun in counts)
        _say(
            f"{turns}, {tokens} in {steps}: {num_tokens / max(num_steps, 1):.2f} tokens per step\n"
            f"kept KV: {kept:.0f} of {last.num_seen_tokens} seen tokens ({last.kept_last:.1%}; "
            f"{last.kept_sum:.1%} over the whole conversation), cache policy {cache.policy}\n"
            f"memory on a worker: {_mib(kept * cache.bytes_per_token)} of at most {_mib(cache.bytes_per_sequence)} MiB"
        )


def make_reader() -> Callable[[], str]:
    """Reads a line from standard input, without its end: with a prompt and a history at a terminal. Raises EOFError."""
    stdin = streams.require_input()
    if isinstance(stdin, io.TextIOWrapper):  # bytes that are no text are no reason to end
        stdin.reconfigure(encoding=None if stdin.isatty() else "utf-8-sig", errors="replace")
    if not stdin.isatty():
        return _read_line
    import readline  # noqa: F401  input() uses it

    return _read_from_terminal


def _read_from_terminal() -> str:
    if sys.stdout.isatty():
        return input("> ")
    _say("> ", end="")
    return input()


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    if "\ufffd" in line:
        _say("outrider: the line has bytes that are no UTF-8; U+FFFD stands for them")
    return line.removesuffix("\n")


@contextmanager
def _stopped_by_ctrl_c(conversation: Conversation) -> Iterator[None]:
    """The first Ctrl-C stops the answer, the second ends the program."""
    if threading.current_thread() is not threading.main_thread():  # signals are not ours to handle
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        conversation.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
