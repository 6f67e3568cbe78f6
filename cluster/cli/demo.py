"""`make demo`: two workers on a local Ray, a server of its own, one answer with lookahead and one without."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import psutil
from rich.console import Console
from rich.table import Table

from cluster.actors import processes
from cluster.cli import terminal
from cluster.client.client import Client
from cluster.wire.answers import Chunk
from runtime.errors import OutriderError
from runtime.progress import doing, tell
from runtime.request import Usage
from runtime.tokenizer import Tokenizer

PROMPT = "Write a Python function that returns the n-th Fibonacci number, then explain it step by step."
MAX_NEW_TOKENS = 96
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
SERVE = (sys.executable, "-m", "cluster.cli", "serve", "--set", "parallel.lp=2", "--set", "server.port=0")

err = Console(stderr=True)


def main() -> int:
    """Run the demo; the exit code is 1 if the answers differ or a process is left over."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended either way
    started = time.perf_counter()
    try:
        with _server() as (server, address):
            _progress(started, f"serving on {address}: one coordinator, two Ray workers (lp=2)")
            tokenizer = _embedded_tokenizer()
            with Client(address) as client:
                info = client.server_info()
                print(f"\n{info.model.name}, {info.model.dtype} on {info.model.device}\n> {PROMPT}\n")
                ahead = _answer(client, tokenizer, lookahead=True)
                _progress(started, "the same prompt with lookahead off")
                plain = _answer(client, None, lookahead=False)
            family = [server, *server.children(recursive=True)]
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, OutriderError) as error:
        err.print(f"the demo failed: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    _progress(started, "shut down")
    left = processes.alive([*family, *processes.descendants()])
    identical = _tokens(ahead) == _tokens(plain)
    _print_table(_usage(ahead), _usage(plain), identical)
    for process in left:
        err.print(f"left over: {processes.describe(process)}", style="red", markup=False, soft_wrap=True)
    return 0 if identical and not left else 1


@contextmanager
def _server() -> Iterator[tuple[psutil.Process, str]]:
    """`outrider serve` as a process of its own: (process, address). Ends it with SIGTERM."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(SERVE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        log: list[str] = []
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
        threading.Thread(target=_listen, args=(process.stderr, log), daemon=True).start()
        server = psutil.Process(process.pid)
        try:
            with doing("starting Ray and two workers, and loading the model"):
                line = _first_word(lines)
            if not line.startswith("serving on "):
                problem = "did not start" if process.poll() is None else f"ended with exit code {process.poll()}"
                raise RuntimeError(f"the server {problem}:\n{''.join(log[-20:])}")
            yield server, line.removeprefix("serving on ").strip()
        finally:
            family = [server, *server.children(recursive=True)] if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                processes.end(family, 0)


def _first_word(lines: queue.SimpleQueue[str | None]) -> str:
    """The server's first line on standard output; empty if none comes."""
    try:
        return lines.get(timeout=START_TIMEOUT_S) or ""
    except queue.Empty:
        return ""


def _pass_on(pipe: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _listen(pipe: IO[str], log: list[str]) -> None:
    """Keep what the server says, and show what it says of its start: its log has time stamps, progress has none."""
    for line in pipe:
        log.append(line)
        if line.strip() and not line[:1].isdigit():
            tell(line.rstrip())


def _answer(client: Client, tokenizer: Tokenizer | None, lookahead: bool) -> list[Chunk]:
    """One call; written to standard output as it streams if there is a tokenizer to colour it with."""
    stream = terminal.TextStream(sys.stdout, terminal.wants_color(sys.stdout), tokenizer)
    chunks = []
    with client.generate(
        messages=[{"role": "user", "content": PROMPT}],
        sampling={"max_new_tokens": MAX_NEW_TOKENS},
        lookahead={"enabled": lookahead},
    ) as call:
        for chunk in call:
            chunks.append(chunk)
            if tokenizer is not None:
                stream.write(chunk)
    if tokenizer is not None:
        print("\n")
    return chunks


def _embedded_tokenizer() -> Tokenizer:
    from runtime.model.loader import resolve_model

    return Tokenizer(resolve_model(None))


def _tokens(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def _usage(chunks: list[Chunk]) -> Usage:
    usage = chunks[-1].usage
    assert usage is not None
    return usage


def _print_table(ahead: Usage, plain: Usage, identical: bool) -> None:
    table = Table(title="green: tokens accepted in parallel" if terminal.wants_color(sys.stdout) else None)
    for heading in ("", "lookahead", "without"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("tokens", str(ahead.num_new_tokens), str(plain.num_new_tokens))
    table.add_row("steps", str(ahead.num_steps), str(plain.num_steps))
    table.add_row("tokens per step", f"{ahead.tokens_per_step:.2f}", f"{plain.tokens_per_step:.2f}")
    rates = [f"{terminal.tokens_per_second(usage):.1f}" for usage in (ahead, plain)]
    table.add_row("tokens/s", *rates)
    Console().print(table)
    print(f"identical: {'yes' if identical else 'no'}")


def _progress(started: float, text: str) -> None:
    err.print(
        f"[{time.perf_counter() - started:5.1f} s] {text}", style="dim", markup=False, highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    sys.exit(main())
