"""A long conversation through a server's Converse: what each turn costs; and a client that vanishes frees its slot.

python -m benchmarks.conversation --turns 200 --cache-size 512
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks.common import DEFAULT_PROMPTS, plot_lines, print_json, print_table, sink, stderr
from cluster.cli.batch import parse, read_lines
from cluster.client.client import Client
from cluster.client.own_server import own_server
from runtime.request import Usage

PARTS = 10
"""Stretches of the conversation that the table compares."""
VANISH_AFTER = 3
"""Chunks of its last answer that the client still reads."""


@dataclass(frozen=True)
class Turn:
    usage: Usage
    seconds: float
    """From sending the turn to its last token, at the client."""


def main(
    turns: Annotated[int, typer.Option(min=PARTS, help="Turns of the conversation.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer, end tokens ignored.")] = 24,
    cache_size: Annotated[int, typer.Option(help="Sinks and window of the cache.")] = 512,
    config: Annotated[Path | None, typer.Option(help="Run config, YAML; its cache section is not used.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write a plot (PNG) into this directory.")] = None,
) -> None:
    """Converse with a server of our own, then vanish in the middle of an answer."""
    cache = sink(cache_size)
    settings = [*set_, "cache.policy=sink", f"cache.num_sinks={cache.num_sinks}", f"cache.window={cache.window}"]
    messages = [parse(line, number).prompt for number, line in enumerate(read_lines(DEFAULT_PROMPTS, None), 1)]
    sampling = {"max_new_tokens": max_new_tokens, "ignore_eos": True}
    with own_server(settings, config) as (_, address), Client(address) as client:
        done: list[Turn] = []
        conversation = client.converse()
        for number in track(range(turns), "turns", console=stderr, transient=True):
            started = time.perf_counter()
            *_, last = conversation.ask(messages=messages[number % len(messages)], sampling=sampling)
            assert last.usage is not None
            done.append(Turn(last.usage, time.perf_counter() - started))
        freed_s = vanish(client, address, messages[0], cache_size)
        conversation.close()
    result = report(done, cache_size, out)
    print(f"a client that vanished in mid-turn: its slot was free after {freed_s:.2f} s")
    print_json({"benchmark": "conversation", "cache_size": cache_size, "turns": result, "slot_freed_s": freed_s})


def vanish(client: Client, address: str, messages: Any, cache_size: int) -> float:
    """A second client breaks its connection in the middle of an answer: seconds until its session is gone."""
    before = client.server_info().cache.num_sessions
    with Client(address) as other:
        answer = other.converse().ask(messages=messages, sampling={"max_new_tokens": cache_size, "ignore_eos": True})
        for _ in range(VANISH_AFTER):
            next(answer)
        assert client.server_info().cache.num_sessions == before + 1
    started = time.perf_counter()
    while client.server_info().cache.num_sessions > before or client.server_info().counters.num_running:
        time.sleep(0.01)
    return time.perf_counter() - started


def report(turns: list[Turn], cache_size: int, out: Path | None) -> list[dict[str, float]]:
    """Print and draw the conversation's stretches; returns their figures."""
    figures, rows = [], []
    for part in range(PARTS):
        first, end = len(turns) * part // PARTS, len(turns) * (part + 1) // PARTS
        stretch = turns[first:end]
        num_steps = sum(turn.usage.num_steps for turn in stretch)
        figure = {
            "first_turn": first,
            "num_seen_tokens": stretch[-1].usage.num_seen_tokens,
            "median_s": median(turn.seconds for turn in stretch),
            "worst_s": max(turn.seconds for turn in stretch),
            "median_ttft_s": median(turn.usage.ttft_s for turn in stretch),
            "tokens_per_step": sum(turn.usage.num_new_tokens for turn in stretch) / num_steps,
            "kept_last": stretch[-1].usage.kept_last,
        }
        figures.append(figure)
        shown = [f"{figure[name]:.2f}" for name in ("median_s", "worst_s", "median_ttft_s", "tokens_per_step")]
        rows.append([f"{first + 1} - {end}", f"{figure['num_seen_tokens']:,}", *shown, f"{figure['kept_last']:.3f}"])
    title = f"seconds per turn of {turns[0].usage.num_new_tokens} tokens, sink cache of {cache_size} tokens"
    print_table(title, ["turns", "seen", "median", "worst", "first token", "tokens/step", "kept KV"], rows)
    if out:
        lines = {"turn": (range(1, len(turns) + 1), [turn.seconds for turn in turns])}
        plot_lines(out / "conversation.png", title, ("turn", "seconds"), lines, ylim=(0, None))
    return figures


if __name__ == "__main__":
    typer.run(main)
