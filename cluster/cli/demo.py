"""`make demo`: two workers on a local Ray, a server of its own, one answer with lookahead and one without."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table

from cluster.actors import processes
from cluster.cli import terminal
from cluster.client.client import Client
from cluster.client.own_server import own_server
from cluster.wire.answers import Chunk
from runtime.errors import OutriderError
from runtime.progress import doing
from runtime.request import Usage
from runtime.tokenizer import Tokenizer

PROMPT = "Write a Python function that returns the n-th Fibonacci number, then explain it step by step."
MAX_NEW_TOKENS = 64

err = Console(stderr=True)


def main() -> int:
    """Run the demo; the exit code is 1 if the answers differ or a process is left over."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended either way
    started = time.perf_counter()
    try:
        with ExitStack() as stack:
            with doing("starting Ray and two workers, and loading the model"):
                server, address = stack.enter_context(own_server(["parallel.lp=2"]))
            _progress(started, f"serving on {address}: one coordinator, two Ray workers (lp=2)")
            with Client(address) as client:
                info = client.server_info()
                print(f"\n{info.model.name}, {info.model.dtype} on {info.model.device}\n> {PROMPT}\n")
                ahead = _answer(client, shown=True, lookahead=True)
                _progress(started, "the same prompt with lookahead off")
                plain = _answer(client, shown=False, lookahead=False)
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


def _answer(client: Client, shown: bool, lookahead: bool) -> list[Chunk]:
    """One call; written to standard output as it streams, if it is to be shown."""
    in_color = shown and terminal.wants_color(sys.stdout)
    stream = terminal.TextStream(sys.stdout, in_color, _embedded_tokenizer() if in_color else None)
    chunks = []
    with client.generate(
        messages=[{"role": "user", "content": PROMPT}],
        sampling={"max_new_tokens": MAX_NEW_TOKENS},
        lookahead={"enabled": lookahead},
    ) as call:
        for chunk in call:
            chunks.append(chunk)
            if shown:
                stream.write(chunk)
    if shown:
        print("\n")
    return chunks


def _embedded_tokenizer() -> Tokenizer:
    from runtime.model.directory import resolve_model

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
